"""Data of a Python caller: rows that live in this process, under a name that recipes can hold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

PREFIX = "memory:"

_held: dict[str, Sequence[Mapping[str, Any]]] = {}  # name -> rows


def data_settings(data: Any) -> dict[str, str]:
    """The settings `data.train` and `data.test`, as far as the data has these splits.

    Args:
        data: rows (a list of dicts), a `datasets.Dataset`, or a path, which is a name as recipes
            write it (file, folder, hub data set): then there is `train` alone. A
            `datasets.DatasetDict`, or a dict of the above by split, gives its "train" and "test".

    Rows and data sets get the name `memory:` with a fingerprint of their JSON values. This process
    keeps them, and equal rows have equal names: a saved recipe holds the name, and a run is resumed
    only with the same rows. Without a test split, say what to test on: `data.test=same`, or
    `data.test_share`.

    Raises ValueError with one sentence for other data, and for data without rows.
    """
    if not isinstance(data, Mapping):
        return {"train": _name(data)}
    if not data.keys() & {"train", "test"}:
        found = ", ".join(map(str, data)) or "none"
        raise ValueError(f"data: expected a split train or test, found {found}")
    return {split: _name(data[split]) for split in ("train", "test") if split in data}


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of that name. Raises ValueError if this process does not have them."""
    if name not in _held:
        raise ValueError(
            f"data set {name}: rows of a Python caller, which this process does not have; pass the "
            "same rows as data again"
        )
    return [dict(row) for row in _held[name]]


def json_values(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of a row that JSON can hold: no images, bytes or dates."""
    found = {}
    for name, value in row.items():
        try:
            json.dumps(value, sort_keys=True)
        except (TypeError, ValueError, RecursionError):
            continue
        found[str(name)] = value
    return found


def _name(data: Any) -> str:
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    table = hasattr(data, "column_names") and hasattr(data, "__len__")  # a `datasets.Dataset`
    if not table and not isinstance(data, list | tuple):
        raise ValueError(
            "data: expected rows (a list of dicts), a datasets.Dataset, a DatasetDict or a path, "
            f"found {type(data).__name__}"
        )
    digest, count = hashlib.sha256(), 0
    for row in data:
        if not isinstance(row, Mapping):
            raise ValueError(f"data: expected rows that are dicts, found {row!r:.60}")
        digest.update(json.dumps(json_values(row), sort_keys=True).encode() + b"\n")
        count += 1
    if not count:
        raise ValueError("data: expected rows, found none")
    name = PREFIX + digest.hexdigest()[:16]
    # a list may be changed by its owner later; a `Dataset` cannot
    _held[name] = data if table else [dict(row) for row in data]
    return name
