"""The rows of data files: JSON and CSV as they are written, others with `datasets`.

`datasets` gives the columns of a file one type each, which would change the values of JSON and CSV;
of the other kinds it only reads, and asks no server.
"""

from __future__ import annotations

import csv
import glob
import json
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from spo.tasks.values import plain

READERS = {  # if a folder holds several kinds, the first of these is read
    ".parquet": "parquet",
    ".arrow": "arrow",  # as `save_to_disk` writes it
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
}
KINDS = ", ".join(READERS)
LONGEST_CELL = 2**31 - 1  # characters of a CSV's cell; 131072 by default


def rows_of_files(paths: Sequence[Path], most: int | None = None) -> list[tuple[dict, str]]:
    """The rows of files, each with its location; only the first `most` of them, if given.

    Lines of JSON are what `json.loads` makes of them, cells of CSV are texts. Raises ValueError
    with one sentence for a file that is damaged.
    """
    found: list[tuple[dict, str]] = []
    for path in paths:
        rows = _read(path, most)
        several = len(rows) > 1
        found += [(r, f"{path}, row {i}" if several else str(path)) for i, r in enumerate(rows, 1)]
        if most is not None and len(found) >= most:
            break
    return found[:most]


def _read(path: Path, most: int | None) -> list[dict]:
    if path.suffix not in READERS:
        found = path.suffix or "no suffix"
        raise ValueError(f"data file {path}: expected {KINDS}, found {found}")
    kind = READERS[path.suffix]
    try:
        if kind in ("json", "csv"):
            return list(islice(_json(path) if kind == "json" else _csv(path), most))
        return _table(path, kind, most)
    except OSError as error:
        raise ValueError(f"data file {path}: cannot be read ({short(error)})") from error
    except (ValueError, TypeError, RecursionError) as error:
        reason = f"damaged or of another kind ({short(error)})"
        raise ValueError(f"data file {path}: {reason}") from error


def _json(path: Path) -> Iterator[dict]:
    """The rows of JSON lines, or of one list or object; either may have either suffix."""
    with path.open("rb") as file:
        listed = file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    if listed or path.suffix == ".json":
        text = path.read_bytes()
        try:
            rows = json.loads(text) if text.strip() else []
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise
        else:
            yield from map(_row, rows if isinstance(rows, list) else [rows])
            return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    yield _row(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {getattr(error, 'msg', error)}") from error


def _row(value: Any) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"expected a row, {{column: value}}, found {value!r:.60}")
    return value


def _csv(path: Path) -> Iterator[dict]:
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            try:
                names = next(lines, [])
                for name in filter(None, names):
                    if names.count(name) > 1:
                        raise ValueError(f"expected each column once, found {name} twice")
                for cells in lines:
                    if len(cells) > len(names):
                        raise ValueError(f"expected {len(names)} cells, found {len(cells)}")
                    if cells:  # no empty line
                        row = dict(zip_longest(names, cells))
                        row.pop("", None)  # a column without a name, as of a row's number
                        yield row
            except (ValueError, csv.Error) as error:
                raise ValueError(f"line {lines.line_num}: {error}") from error
    finally:
        csv.field_size_limit(before)


def _table(path: Path, kind: str, most: int | None) -> list[dict]:
    """The rows of a file whose columns have types."""
    import datasets.config
    import pyarrow

    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else it tells the hub of local files too
    try:
        # Streaming writes nothing but locks.
        with tempfile.TemporaryDirectory() as cache:
            rows = datasets.load_dataset(
                kind,
                data_files=[glob.escape(str(path.absolute()))],
                split="train",
                streaming=True,
                cache_dir=cache,
            )
            return [plain(row) for row in islice(rows, most)]
    except pyarrow.ArrowException as error:
        raise ValueError(error) from error
    finally:  # as the caller had them
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def short(error: Exception) -> str:
    """The words of an error on one line, cut."""
    return " ".join(str(error).split())[:200]
