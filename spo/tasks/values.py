"""The values of rows as JSON has them: plain numbers, texts, lists and dicts."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """A value of a row, or a row, as JSON would give it back.

    Arrays and tensors become lists (0-d: numbers), dates and times ISO texts, tuples lists, names
    inside a value texts. What has no such form, as an image, stays as it is.
    """
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(name): plain(cell) for name, cell in value.items()}
    if isinstance(value, list | tuple):
        return [plain(cell) for cell in value]
    if not hasattr(value, "tolist") or isinstance(value, memoryview):
        return value
    if getattr(getattr(value, "dtype", None), "kind", "") == "M":
        value = value.astype("datetime64[us]")  # nanoseconds would become numbers
    found = value.tolist()
    return value if type(found) is type(value) else plain(found)


def json_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that JSON can hold: no images, no bytes."""
    found = {}
    for name, value in row.items():
        try:
            json.dumps(value, sort_keys=True)
        except (TypeError, ValueError, RecursionError):
            continue
        found[str(name)] = value
    return found
