"""The recipe of a run: one file a group. YAML in, dotted overrides on top; an unknown key, a wrong
type or a number out of range is one sentence that names it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spo import named
from spo.config.credit import Rule
from spo.config.data import DataConfig
from spo.config.engine import EngineConfig
from spo.config.evaluation import EvalConfig
from spo.config.loss import LOSSES, LossConfig, PolicyLossConfig
from spo.config.policy import PolicyConfig
from spo.config.sampling import SamplingConfig
from spo.config.shape import ShapeConfig
from spo.config.train import TrainConfig

SHIPPED = Path(__file__).parents[1] / "recipes"
UNIONS = {"shape": "kind", "credit": "type"}  # group -> the key that chooses what the others are


@dataclass(frozen=True)
class Recipe:
    """One run."""

    name: str = "run"
    """Shown in reports and used as the default output folder, runs/<name>."""
    task: str = "arithmetic"
    """What is trained on: arithmetic, countdown, knights_knaves, point24, gsm8k, math, aime24, or a
    task of your own, `module:Name` or `./file.py:Name`. `data.options` are its settings."""
    out: str | None = None
    """Folder for checkpoints, metrics and the report."""
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    shape: ShapeConfig = field(default_factory=lambda: named.find("shape.kind", "tree")())
    """What grows under each prompt: `kind` star, tree, chain, `module:Name` or `./file.py:Name`;
    the other keys are that kind's."""
    credit: Rule = field(default_factory=lambda: named.find("credit.type", "values")())
    """What each token is worth: `type` values, gae, correct, pairs, `module:Name` or
    `./file.py:Name`; the other keys are that rule's, and it fixes which loss reads the credit."""
    loss: LossConfig = field(default_factory=PolicyLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def out_dir(self) -> Path:
        return Path(self.out or f"runs/{self.name}")

    @property
    def shape_kind(self) -> str:
        """The name of the shape, as a recipe writes it."""
        return named.name_of("shape.kind", type(self.shape))

    @property
    def credit_type(self) -> str:
        """The name of the credit rule, as a recipe writes it."""
        return named.name_of("credit.type", type(self.credit))


def load_recipe(recipe: str | os.PathLike | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe and apply overrides such as `train.learning_rate=1e-5`.

    Args:
        recipe: a YAML file, or the name of one that ships with the package (`spo-tree`); None: the
            defaults.

    Raises ValueError with one sentence for a missing file, bad YAML, an unknown key, a wrong type,
    a number out of range, or settings that contradict each other.
    """
    tree, folder = ({}, None) if recipe is None else _read(Path(recipe))
    for override in overrides:
        _override(tree, override)
    return _resolve(tree, folder)


def as_tree(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as YAML has it: plain lists, dicts, numbers and strings."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    tree["shape"] = {"kind": recipe.shape_kind} | tree["shape"]
    tree["credit"] = {"type": recipe.credit_type} | tree["credit"]
    return tree


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe as YAML that `load_recipe` reads back."""
    path.write_text(yaml.safe_dump(as_tree(recipe), sort_keys=False), encoding="utf-8")


def shipped_recipes() -> dict[str, Path]:
    """Name -> file, of the recipes that ship with the package."""
    return {path.stem: path for path in sorted(SHIPPED.rglob("*.yaml"))}


def _read(path: Path) -> tuple[dict[str, Any], Path]:
    """A recipe's settings, and the folder that its relative files are looked for in."""
    if not path.exists() and not path.suffix and len(path.parts) == 1:
        if path.name not in shipped_recipes():
            raise ValueError(
                f"recipe {path}: there is no such file, and the package ships "
                f"{', '.join(shipped_recipes())}"
            )
        path = shipped_recipes()[path.name]
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"recipe {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path}: not UTF-8 text ({error.reason})") from error
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise ValueError(f"recipe {path}: not valid YAML ({where})") from error
    if not isinstance(loaded or {}, dict):
        raise ValueError(f"recipe {path}: expected a mapping of settings")
    return loaded or {}, path.parent


def _override(tree: dict[str, Any], text: str) -> None:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"override {text!r}: expected key=value, such as train.learning_rate=1e-5")
    *groups, key = name.lstrip("-").split(".")
    for group in groups:
        if tree.get(group) is None:
            tree[group] = {}
        tree = tree[group]
        if not isinstance(tree, dict):
            raise ValueError(f"override {text!r}: {group} is a value, not a group of settings")
    try:
        tree[key] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"override {text!r}: the value is not valid YAML") from error


def _resolve(tree: Mapping[str, Any], folder: Path | None) -> Recipe:
    """The recipe that the settings describe, checked group by group."""
    plain = {"name": "run", "task": "arithmetic", "out": None}
    groups = {
        "data": DataConfig,
        "policy": PolicyConfig,
        "engine": EngineConfig,
        "sampling": SamplingConfig,
        "train": TrainConfig,
        "eval": EvalConfig,
    }
    known = [f.name for f in dataclasses.fields(Recipe)]
    for key, value in tree.items():
        if key not in known:
            raise ValueError(f"recipe: unknown key {key}; known here: {', '.join(known)}")
        if key in plain and not isinstance(value, str) and not (key == "out" and value is None):
            raise ValueError(f"recipe: {key}: expected a text, found {value!r}")
    fields: dict[str, Any] = {key: tree.get(key, default) for key, default in plain.items()}
    for key, kind in groups.items():
        fields[key] = named.build(kind, _group(tree, key), key)
    task = named.find("task", fields["task"], folder)
    fields["task"] = named.name_of("task", task)
    named.build(task, fields["data"].options, "data.options")
    for key, choice in UNIONS.items():
        settings = _group(tree, key)
        default = {"shape": "tree", "credit": "values"}[key]
        name = str(settings.pop(choice, default))
        kind = named.find(f"{key}.{choice}", name, folder)
        fields[key] = named.build(kind, settings, key, f"{key}.{choice}={name}")
    fields["loss"] = _loss(fields["credit"], _group(tree, "loss"))
    recipe = Recipe(**fields)
    _check(recipe)
    return recipe


def _group(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The settings of a group; one that stands there with nothing in it is empty."""
    value = tree.get(key)
    if not isinstance(value or {}, Mapping):
        raise ValueError(f"recipe: {key}: expected a group of settings, found {value!r}")
    return dict(value or {})


def _loss(rule: Rule, settings: Mapping[str, Any]) -> LossConfig:
    """The settings of the loss that the credit rule fixes."""
    if rule.loss not in LOSSES:
        raise ValueError(f"credit: loss must be one of {', '.join(LOSSES)}, found {rule.loss!r}")
    kind = LOSSES[rule.loss]
    if settings and not dataclasses.fields(kind):
        name = named.name_of("credit.type", type(rule))
        raise ValueError(
            f"loss.{next(iter(settings))}: credit.type={name} trains the likelihood of every token "
            "it credits, a loss without settings"
        )
    return named.build(kind, settings, "loss")


def _check(recipe: Recipe) -> None:
    """Raise ValueError where groups contradict each other."""
    recipe.credit.check(recipe.shape)
    if recipe.train.replay_nodes and not recipe.credit.replayable:
        raise ValueError(
            f"train.replay_nodes must be 0 for credit.type={recipe.credit_type}, whose credit does "
            f"not outlive its iteration, found {recipe.train.replay_nodes}"
        )
    sampling = recipe.sampling
    recipe.shape.cost(sampling.max_new_tokens)  # says if nothing is left for the last segment
    for _, limit in sampling.stages:
        try:
            recipe.shape.cost(limit)
        except ValueError as error:
            raise ValueError(f"sampling.stages: with a limit of {limit}, {error}") from error
