"""The metrics of a run: one JSON object per line of `metrics.jsonl`, appended during the run.

Every line holds `iteration`, `seconds` (since the run began), `generated_tokens` (so far) and
`stage` ("train", "eval" or "skipped"); all other keys are free. JSON has no NaN and no
infinity: both are written as null, and null is read as NaN.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsFloat

STAGES = ("train", "eval", "skipped")


def plus_minus(mean: float, error: float, sign: str = "") -> str:
    """A mean with its standard error, where that is known: of one problem it is not.

    Args:
        sign: + writes a sign in front of positive numbers too.
    """
    return f"{mean:{sign}.3f}" + (f" ± {error:.3f}" if math.isfinite(error) else "")


class MetricsWriter:
    """Appends lines to a metrics file; each is written whole and flushed.

    Opening an existing file first drops a broken last line, which a killed process may leave. With
    `resume_at` it also drops every line of that iteration and later, which the resumed run writes
    again. The evaluation of that iteration tested the policy that the run goes on with: it stays,
    unless the first line that is written is an evaluation too, which then takes its place. Raises
    ValueError with the line's number if another line is broken.
    """

    def __init__(self, path: str | os.PathLike, *, resume_at: int | None = None) -> None:
        path = Path(path)
        self._before: int | None = None  # size of the file without an evaluation that may go
        if path.exists():
            before, tested = _kept(path, math.inf if resume_at is None else resume_at)
            _rewrite(path, before + tested)
            self._before = len(before) if tested else None
        self._file = open(path, "ab")  # O_APPEND: a line is written at the end in one piece

    def write(self, line: Mapping[str, object]) -> None:
        """Append one line. Raises ValueError or TypeError that names a bad key."""
        _check(line)
        clean = {
            key: finite(value) if isinstance(value, Real) and not isinstance(value, bool) else value
            for key, value in line.items()
        }
        if self._before is not None and line["stage"] == "eval":
            self._file.truncate(self._before)
        self._before = None
        self._file.write(json.dumps(clean, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """Lines of a metrics file in order, null as NaN; a broken last line is left out.

    Raises ValueError with the line's number if any other line is broken.
    """
    return [
        {key: math.nan if value is None else value for key, value in line.items()}
        for _, line in _whole_lines(Path(path))
    ]


def mean_stderr(values: Iterable[float]) -> tuple[float, float]:
    """Mean of independent samples and its standard error, sqrt(sum((x - mean)^2) / (n (n - 1))).

    For right-or-wrong samples that is sqrt(p (1 - p) / (n - 1)). The error of one sample is NaN.
    Raises ValueError if there is no sample: a missing result is not a zero.
    """
    samples = [float(value) for value in values]
    n = len(samples)
    if n == 0:
        raise ValueError("values: expected at least one sample, found none")
    mean = math.fsum(samples) / n
    if n == 1:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in samples) / (n * (n - 1)))


def _check(line: Mapping[str, object]) -> None:
    for key in ("iteration", "seconds", "generated_tokens", "stage"):
        if key not in line:
            raise ValueError(f"metrics line: expected the key {key!r}, found {sorted(line)}")
    if line["stage"] not in STAGES:
        raise ValueError(f"stage: expected one of {STAGES}, found {line['stage']!r}")
    for key in ("iteration", "generated_tokens"):
        value = line[key]
        if not isinstance(value, Integral) or isinstance(value, bool):
            raise ValueError(f"{key}: expected a whole number, found {value!r}")
    for key, value in line.items():
        if not isinstance(value, (str, Real)):
            raise TypeError(f"metric {key!r}: expected a number or a string, found {type(value)}")


def finite(value: SupportsFloat) -> int | float | None:
    """`value` for JSON: None if it is not finite."""
    if isinstance(value, Integral):
        return int(value)
    return float(value) if math.isfinite(value) else None


def finite_tree(value: Any) -> Any:
    """The same dicts and lists for JSON: None for what is not finite."""
    if isinstance(value, dict):
        return {key: finite_tree(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_tree(item) for item in value]
    return finite(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def scored(line: Mapping[str, object]) -> list[str]:
    """The accuracies that the line of an evaluation holds: keys with a standard error beside."""
    return [key for key in line if f"{key}_stderr" in line]


def _whole_lines(path: Path) -> list[tuple[bytes, dict]]:
    """(raw line, parsed line); only the last line may be broken, and then it is left out."""
    raws = path.read_bytes().splitlines(keepends=True)
    lines = []
    for number, raw in enumerate(raws, start=1):
        try:
            line = json.loads(raw)
            _check({key: math.nan if value is None else value for key, value in line.items()})
        except (ValueError, TypeError, AttributeError):  # not JSON, not an object, or not complete
            line = None
        if line is not None and raw.endswith(b"\n"):
            lines.append((raw, line))
        elif number < len(raws):
            raise ValueError(f"{path}, line {number} is not a metrics line: {raw[:80]!r}")
    return lines


def _kept(path: Path, iteration: float) -> tuple[bytes, bytes]:
    """The lines before an iteration, and its evaluation; a run that begins anew, at 0, has none."""
    lines = _whole_lines(path)
    before = b"".join(raw for raw, line in lines if line["iteration"] < iteration)
    tested = [raw for raw, x in lines if (x["iteration"], x["stage"]) == (iteration, "eval")]
    return before, b"".join(tested[:1] if iteration else [])


def _rewrite(path: Path, kept: bytes) -> None:
    """Write a new file and rename it, so that a kill leaves either the old or the new one."""
    if len(kept) == path.stat().st_size:
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
