"""Data of a Python caller: rows that live in this process, under a name that recipes can hold."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from spo.tasks.values import json_values, plain

PREFIX = "memory:"

_held: dict[str, Sequence[Mapping[str, Any]]] = {}  # name -> rows


def data_settings(data: Any) -> dict[str, str]:
    """The settings `data.train` and `data.test`, as far as the data has these splits.

    Args:
        data: what `name_of` takes: then there is `train` alone. A `datasets.DatasetDict`, or a dict
            of the above by split, gives its "train" and "test".

    Without a test split, say what to test on: `data.test=same`, or `data.test_share`. Raises
    ValueError as `name_of` does, and for a dict without one of these splits.
    """
    if not isinstance(data, Mapping):
        return {"train": name_of(data)}
    splits = [split for split in ("train", "test") if split in data]
    if not splits:
        found = ", ".join(map(str, data)) or "none"
        raise ValueError(f"data: expected a split train or test, found {found:.200}")
    return {split: name_of(data[split], f"data.{split}") for split in splits}


def name_of(data: Any, where: str = "data") -> str:
    """The name of one set of rows in a recipe.

    Args:
        data: rows (a list of dicts), a `datasets.Dataset`, a pandas frame, or a path, which is a
            name as recipes write it (file, folder, hub data set).
        where: the setting, which errors name.

    Rows and data sets get the name `memory:` with a fingerprint of their JSON values. This process
    keeps them, and equal rows have equal names: a saved recipe holds the name, and a run is resumed
    only with the same rows.

    Raises ValueError with one sentence for other data, and for data without rows.
    """
    if isinstance(data, str | os.PathLike):
        return os.fspath(data)
    if hasattr(data, "iterrows"):  # of pandas
        data = data.astype(object).where(data.notna(), None).to_dict("records")
    table = not isinstance(data, list | tuple)
    if table and not (hasattr(data, "format") and hasattr(data, "__len__")):
        raise ValueError(
            f"{where}: expected rows (a list of dicts), a datasets.Dataset, a DataFrame or a path, "
            f"found {type(data).__name__}"
        )
    if table and data.format["type"] != "custom":  # rows of dicts, whatever the caller looks at
        data = data.with_format(None, columns=data.format["columns"])
    digest, kept = hashlib.sha256(), []
    for number, row in enumerate(data, 1):
        row = _row(row, f"{where}: row {number}")
        digest.update(json.dumps(json_values(row), sort_keys=True).encode() + b"\n")
        if not table:  # a list may be changed by its owner later; a `Dataset` cannot
            kept.append(row)
    if not len(data):
        raise ValueError(f"{where}: expected rows, found none")
    name = PREFIX + digest.hexdigest()[:16]
    _held[name] = data if table else kept
    return name


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of that name. Raises ValueError if this process does not have them."""
    if name not in _held:
        raise ValueError(
            f"data set {name}: rows of a Python caller, which this process does not have; pass the "
            "same rows as data again"
        )
    return [plain(row) for row in _held[name]]


def _row(row: Any, where: str) -> dict[str, Any]:
    """A row of plain values. Raises ValueError if it is none."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected a dict, found {type(row).__name__}")
    for name in row:
        if not isinstance(name, str):
            raise ValueError(f"{where}: expected columns named by texts, found {name!r:.60}")
    return plain(row)
