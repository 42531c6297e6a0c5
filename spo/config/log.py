"""`log`: where the lines of a run go besides metrics.jsonl."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

TRACKERS = ("tensorboard", "wandb", "trackio", "mlflow")
"""A tracker has the name of the package that it needs."""


def tracker_names(value: Any) -> list[str]:
    """The trackers that a recipe's `log` names: one name, a list of names, or None for none.

    Raises ValueError for anything else.
    """
    names = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(names, list | tuple):
        raise ValueError(f"log: expected a list of {', '.join(TRACKERS)}, found {value!r:.60}")
    for name in names:
        if name not in TRACKERS:
            close = get_close_matches(str(name), TRACKERS, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"log: expected names of {', '.join(TRACKERS)}, found {name!r}{hint}")
    return list(dict.fromkeys(names))
