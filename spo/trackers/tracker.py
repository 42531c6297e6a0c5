"""What all trackers share: which lines they hear, how a run goes on in them, and what if they fail.

A line is sent once. What has been sent is kept in the run's folder, so that a resumed run goes on
after it: iterations that it repeats are not sent again, and lines of metrics.jsonl that a tracker
lacks, because it failed or was not asked for, are sent first.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import TracebackType
from typing import Any, Protocol

from spo.config.log import tracker_names
from spo.config.recipe import Recipe
from spo.extras import missing
from spo.metrics import read_metrics
from spo.trackers.names import figures

BEFORE = (-1, False)  # nothing was sent


class Service(Protocol):
    """A run in one tracker; each module of this folder has one.

    It is made of the recipe, the run that goes on (None: a new one) and the iteration at which this
    process starts.
    """

    run: str  # the name under which the tracker finds it again
    holds_before: float  # iteration from which on it holds no line, although some were sent

    def log(self, figures: Mapping[str, float], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class Tracker:
    """A callback that sends each line to one tracker.

    If that fails, one warning says so, and the run goes on without it. Raises ValueError with one
    sentence if the tracker does not start.
    """

    def __init__(self, name: str, recipe: Recipe, resumed: bool, start: int):
        self._name = name
        self._file = recipe.out_dir / f"tracker-{name}.json"
        kind = import_module(f"spo.trackers.{name}").Service
        saved: dict[str, Any] = {}
        try:
            if resumed and self._file.exists():
                saved = json.loads(self._file.read_text())
            service: Service = kind(recipe, saved.get("run"), start)
        except Exception as error:  # the packages share no class of errors
            raise ValueError(f"log: {name} does not start ({_reason(error)})") from None
        sent = tuple(saved.get("sent", BEFORE))
        self._sent = min(sent, (service.holds_before - 1, True))
        self._service: Service | None = service
        for line in read_metrics(recipe.out_dir / "metrics.jsonl"):
            self.on_iteration(line)

    def on_iteration(self, line: Mapping[str, Any]) -> None:
        """Send a line, unless it or a later one was sent."""
        here = (line["iteration"], line["stage"] != "eval")  # an iteration's evaluation comes first
        if self._service is None or here <= self._sent:
            return
        try:
            self._service.log(figures(line), line["iteration"])
            self._sent = here
            temporary = self._file.with_suffix(".tmp")
            temporary.write_text(json.dumps({"run": self._service.run, "sent": here}))
            temporary.replace(self._file)
        except Exception as error:
            self._service = None
            warnings.warn(
                f"log: {self._name} is left out from iteration {here[0]} on, as it failed "
                f"({_reason(error)}); the run goes on, and --resume sends what is missing",
                stacklevel=2,
            )

    on_evaluation = on_iteration

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._service is not None:
            try:
                self._service.close(failed=kind is not None)
            except Exception as problem:
                said = f"log: {self._name} failed at the end of the run ({_reason(problem)})"
                warnings.warn(said, stacklevel=2)


def require_installed(recipe: Recipe) -> None:
    """Raise ModuleNotFoundError with one sentence if the package of a tracker is missing."""
    for name in tracker_names(recipe.log):
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is no package
            raise ModuleNotFoundError(missing(ModuleNotFoundError(name=name)), name=name)


@contextmanager
def opened(recipe: Recipe, main: bool, resumed: bool, start: int) -> Iterator[Sequence[Tracker]]:
    """The trackers that the recipe names, closed at the end; none on ranks that are not `main`.

    Args:
        resumed: whether the run goes on, from iteration `start`.

    Raises ValueError for one that does not start.
    """
    names = tracker_names(recipe.log) if main else []
    with ExitStack() as stack:
        yield [stack.enter_context(Tracker(name, recipe, resumed, start)) for name in names]


def _reason(error: Exception) -> str:
    """The error in one line, without secrets: those of addresses and of the environment."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = re.sub(r"(?<=//)[^/@\s]+(?=@)|(?<=token=)[^&\s]+", "…", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("KEY|TOKEN|PASSWORD|SECRET", name):
            text = text.replace(value, "…")
    return f"{text:.300}"
