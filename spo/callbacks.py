"""What a run says while it goes on: its metrics lines, and the caller's callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from spo.learn.checkpoint import State
from spo.metrics import MetricsWriter

EVENTS = ("on_iteration", "on_evaluation", "on_checkpoint")
Report = Callable[[dict], None]


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Raise ValueError unless it is a list of objects with one of the methods EVENTS each."""
    if not isinstance(callbacks, list | tuple):
        raise ValueError(f"callbacks: expected a list, found {callbacks!r:.60}")
    for one in callbacks:
        if not any(callable(getattr(one, event, None)) for event in EVENTS):
            raise ValueError(
                f"callbacks: expected objects with a method {', '.join(EVENTS[:-1])} or "
                f"{EVENTS[-1]}, found {one!r:.60}"
            )


class Log:
    """The lines of a run, written, reported and given to the callbacks. Other ranks have no writer,
    and say nothing.

    Attributes:
        lines: those written so far.
        stopped: whether a callback returned False.
    """

    def __init__(
        self,
        writer: MetricsWriter | None,
        state: State,
        report: Report,
        callbacks: Sequence[Any] = (),
    ):
        self._writer, self._state = writer, state
        self._report, self._callbacks = report, callbacks
        self.lines: list[dict] = []
        self.stopped = False

    def write(self, line: dict) -> None:
        """A line of the run as it stands now; its `stage` says which of the callbacks hear it."""
        if self._writer is None:
            return
        state = self._state
        head = {
            "iteration": state.iteration,
            "seconds": state.seconds,
            "generated_tokens": state.generated_tokens,
        }
        self.lines.append(head | line)
        self._writer.write(self.lines[-1])
        self._report(self.lines[-1])
        self.tell("on_evaluation" if line["stage"] == "eval" else "on_iteration", self.lines[-1])

    def tell(self, event: str, what: Any) -> None:
        """Call the method `event` of every callback that has it."""
        for one in self._callbacks if self._writer is not None else ():
            method = getattr(one, event, None)
            said = None if method is None else method(what)
            if said is False or (hasattr(said, "dtype") and not said):  # NumPy's, or PyTorch's
                self.stopped = True
