"""Settings as keywords of a Python call: dotted, by group, or by a name that only one group has."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from spo import named
from spo.config.data import DataConfig
from spo.config.engine import EngineConfig
from spo.config.evaluation import EvalConfig
from spo.config.grading import GradingConfig
from spo.config.loss import PolicyLossConfig
from spo.config.policy import PolicyConfig
from spo.config.sampling import SamplingConfig
from spo.config.train import TrainConfig

PLAIN = ("name", "task", "out", "reward", "log")  # keys of a recipe that are no group
GROUPS: dict[str, type] = {
    "data": DataConfig,
    "policy": PolicyConfig,
    "engine": EngineConfig,
    "sampling": SamplingConfig,
    "grading": GradingConfig,
    "train": TrainConfig,
    "eval": EvalConfig,
}
UNIONS = {"shape": "kind", "credit": "type"}  # group -> the key that chooses its class
DEFAULTS = {"shape": "tree", "credit": "values"}


def with_keywords(tree: Mapping[str, Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's settings with those of keywords: `**{"train.iterations": 5}`, `train={…}`, or
    `learning_rate=1e-6`.

    A group's dict changes the settings that it names; one that chooses a kind of shape or a type of
    credit replaces the group. A task may be a class. Raises ValueError for a bare name that no
    group or several have, and for a class that cannot be imported by its name.
    """
    tree = copy.deepcopy(dict(tree))
    groups = sorted(keywords, key=lambda name: name not in (*GROUPS, *UNIONS))  # kinds come first
    for name in groups:
        value = (
            os.fspath(keywords[name]) if isinstance(keywords[name], os.PathLike) else keywords[name]
        )
        if name in PLAIN:
            given = name == "task" and isinstance(value, type)
            tree[name] = named.importable(name, value) if given else value
        elif name in (*GROUPS, *UNIONS, "loss"):
            if not isinstance(value, Mapping):
                raise ValueError(f"{name}: expected a dict of settings, found {value!r:.60}")
            kept = {} if UNIONS.get(name) in value else tree.get(name) or {}
            tree[name] = kept | dict(value)
        else:
            *path, key = (name if "." in name else f"{_group_of(name, tree)}.{name}").split(".")
            inner = tree
            for group in path:
                inner[group] = dict(inner.get(group) or {})
                inner = inner[group]
            inner[key] = value
    return tree


def _group_of(name: str, tree: Mapping[str, Any]) -> str:
    """The one group that has a setting of this name."""
    known = {group: _fields(kind) for group, kind in GROUPS.items()}
    known["loss"] = _fields(PolicyLossConfig)
    for group, choice in UNIONS.items():
        kind = (tree.get(group) or {}).get(choice, DEFAULTS[group])
        known[group] = _fields(named.find(f"{group}.{choice}", kind))
    found = [group for group, names in known.items() if name in names]
    if len(found) == 1:
        return found[0]
    if found:
        choices = " or ".join(f'**{{"{group}.{name}": …}}' for group in found)
        raise ValueError(f"{name}: several groups have this setting; write {choices}")
    for group in UNIONS:
        for kind in named.OWN[(key := f"{group}.{UNIONS[group]}")]:
            if name in _fields(named.find(key, kind)):
                raise ValueError(
                    f"{name}: a setting of {key}={kind}, and the recipe has another; write "
                    f"{group}={{{UNIONS[group]!r}: {kind!r}, {name!r}: …}}"
                )
    every = {n: f"{group}.{n}" for group, names in known.items() for n in names}
    close = [every[n] for n in get_close_matches(name, every, 3)]
    hint = f"; close to it: {', '.join(close)}" if close else ""
    raise ValueError(f"{name}: no group of a recipe has this setting{hint}")


def _fields(kind: type) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.init]
