"""The recipe of a run: YAML, then dotted overrides; one file of this package per group of settings.

An unknown key, a wrong type or a number out of range raises one sentence that names the setting.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from spo import named
from spo.config.credit import Rule
from spo.config.data import WRITES, DataConfig
from spo.config.engine import EngineConfig
from spo.config.evaluation import TEST, EvalConfig, EvalSet, figures
from spo.config.grading import GradingConfig
from spo.config.keywords import DEFAULTS, GROUPS, UNIONS, with_keywords
from spo.config.log import tracker_names
from spo.config.loss import LOSSES, LossConfig, PolicyLossConfig
from spo.config.pairs import check_pairs
from spo.config.policy import PolicyConfig
from spo.config.reward import RewardConfig, reward_settings, with_simplified
from spo.config.sampling import SamplingConfig
from spo.config.shape import Cost, ShapeConfig
from spo.config.train import TrainConfig
from spo.config.variance import check_variance
from spo.reward import check_reward, with_full_names

SHIPPED = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class Recipe:
    """One run."""

    name: str = "run"
    """Shown in reports and used as the default output folder, runs/<name>. By default the name of
    the YAML file."""
    task: str = "arithmetic"
    """The task: arithmetic, countdown, knights_knaves, point24, gsm8k, math, aime24, rows (any
    table), or a task of your own, `module:Name` or `./file.py:Name`. `data.options` holds its
    settings."""
    out: str | None = None
    """Folder for checkpoints, metrics and the report."""
    log: list[str] = field(default_factory=list)
    """Trackers that get the figures besides metrics.jsonl: tensorboard, wandb, trackio, mlflow.
    docs/metrics.md describes them."""
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    shape: ShapeConfig = field(default_factory=lambda: named.find("shape.kind", "tree")())
    """What grows under each prompt: `kind` star, tree, chain, `module:Name` or `./file.py:Name`.
    The other keys are the settings of that kind."""
    credit: Rule = field(default_factory=lambda: named.find("credit.type", "values")())
    """What each token is worth: `type` values, gae, correct, pairs, `module:Name` or
    `./file.py:Name`. The other keys are the settings of that rule, which also chooses the loss."""
    loss: LossConfig = field(default_factory=PolicyLossConfig)
    reward: RewardConfig | None = None
    """What a response earns in training; by default 1 if the task's own test says that it is right,
    else 0. `module:function`, `./file.py:function`, a rule that ships (`{rule: boxed}`), or a list
    of these with weights. docs/own-reward.md describes them. `{simplified: true}` alone keeps the
    task's own test, with `data.options.simplified`."""
    grading: GradingConfig = field(default_factory=GradingConfig)
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


def load_recipe(
    recipe: Recipe | str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
    **keywords: Any,
) -> Recipe:
    """Read a recipe and apply settings.

    Args:
        recipe: a YAML file, or the name of one that ships with the package (`spo-tree`), or a
            recipe. None takes the defaults.
        overrides: such as `train.learning_rate=1e-5`.
        keywords: the same in Python: `learning_rate=1e-5` if one group alone has the name,
            `train={"learning_rate": 1e-5}`, or `**{"train.learning_rate": 1e-5}`.

    Raises ValueError with one sentence for a missing file, bad YAML, an unknown key, a wrong type,
    a number out of range, or settings that contradict each other.
    """
    if isinstance(recipe, Recipe):
        tree, folder = as_tree(recipe), None
    else:
        tree, folder = ({}, None) if recipe is None else _read(Path(recipe))
    for override in overrides:
        _override(tree, override)
    return _resolve(with_keywords(tree, keywords), folder)


def as_tree(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as plain lists, dicts, numbers and strings, ready for YAML.

    Raises ValueError if a setting of a class from outside the package cannot be written so.
    """
    tree: dict[str, Any] = {}
    for f in dataclasses.fields(recipe):
        value = getattr(recipe, f.name)
        tree[f.name] = (
            named.settings_of(value, f.name) if dataclasses.is_dataclass(value) else value
        )
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
    """A recipe's settings, and the folder in which its relative files are searched."""
    if not os.path.isfile(path):
        shipped = SHIPPED / f"{path}.yaml"
        by_name = shipped_recipes().get(str(path)) or (shipped if shipped.is_file() else None)
        if by_name is None and not path.suffix:
            raise ValueError(
                f"recipe {path}: no such file; the package ships {', '.join(shipped_recipes())}"
            )
        path = by_name or path
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"recipe {path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"recipe {path}: not UTF-8 text ({error.reason})") from error
    except (yaml.YAMLError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise ValueError(f"recipe {path}: not valid YAML ({where})") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise ValueError(
            f"recipe {path}: expected a mapping of settings, found {type(loaded).__name__}"
        )
    return {"name": path.stem} | (loaded or {}), path.parent


class _Loader(yaml.SafeLoader):
    """Refuses a key that occurs twice; YAML's own loader takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


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
            raise ValueError(f"override {text!r}: expected {group} to be a group, found a value")
    try:
        tree[key] = yaml.load(value, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"override {text!r}: the value is not valid YAML") from error


def _resolve(tree: Mapping[str, Any], folder: Path | None) -> Recipe:
    """The recipe that the settings describe, checked group by group."""
    tree = with_simplified(tree)
    plain = {"name": "run", "task": "arithmetic", "out": None}
    known = [f.name for f in dataclasses.fields(Recipe)]
    for key, value in tree.items():
        if key not in known:
            raise ValueError(f"recipe: unknown key {key}; known here: {', '.join(known)}")
        if key in plain and not isinstance(value, str) and not (key == "out" and value is None):
            raise ValueError(f"recipe: {key}: expected a string, found {value!r}")
    if "/" in tree.get("name", "run") or not tree.get("name", "run").strip("\0. "):
        raise ValueError(f"name: expected a folder name, found {tree['name']!r}")
    fields: dict[str, Any] = {key: tree.get(key, default) for key, default in plain.items()}
    for key, kind in GROUPS.items():
        fields[key] = named.build(kind, _group(tree, key), key)
    fields["log"] = tracker_names(tree.get("log"))
    task = named.find("task", fields["task"], folder)
    fields["task"] = named.name_of("task", task)
    options = fields["data"].options
    if "simplified" in options and "simplified" not in {f.name for f in dataclasses.fields(task)}:
        raise ValueError(f"reward.simplified: expected the task math, found {fields['task']}")
    named.build(task, options, "data.options")
    sets = {name: _found(one, name, folder) for name, one in fields["eval"].sets.items()}
    fields["eval"] = dataclasses.replace(fields["eval"], sets=sets)
    for key, choice in UNIONS.items():
        settings = _group(tree, key)
        name = settings.pop(choice, None)
        if name is None:
            name = DEFAULTS[key]
        if not isinstance(name, str):
            raise ValueError(f"recipe: {key}.{choice}: expected a name, found {name!r}")
        kind = named.find(f"{key}.{choice}", name, folder)
        if any(f.name == choice for f in dataclasses.fields(kind)):
            raise ValueError(f"{key}.{choice}: {name} has a field {choice}, which names the class")
        fields[key] = named.build(kind, settings, key, f"{key}.{choice}={name}")
    fields["loss"] = _loss(fields["credit"], _group(tree, "loss"))
    if tree.get("reward") is not None:
        reward = named.build(RewardConfig, reward_settings(tree["reward"]), "reward")
        fields["reward"] = with_full_names(reward, folder)
    recipe = Recipe(**fields)
    check_recipe(recipe)
    return recipe


def _found(one: EvalSet, name: str, folder: Path | None) -> EvalSet:
    """The same evaluation set, with a name of its task that is valid from any folder."""
    if one.task is None:
        return one
    try:
        task = named.find("task", one.task, folder)
    except ValueError as error:
        raise ValueError(f"eval.sets.{name}: {error}") from error
    return dataclasses.replace(one, task=named.name_of("task", task))


def evaluation_sets(recipe: Recipe) -> dict[str, Recipe]:
    """Name -> the recipe with the task, the data and the numbers of each evaluation set.

    The recipe's own set comes first, as `TEST`. Raises ValueError for settings that cannot work.
    """
    found, common = {TEST: recipe}, recipe.eval
    for name, one in common.sets.items():
        where, task = f"eval.sets.{name}.data", one.task or recipe.task
        kept = [f.name for f in dataclasses.fields(DataConfig)] if task == recipe.task else WRITES
        settings = {key: getattr(recipe.data, key) for key in kept} | one.data
        data = named.build(DataConfig, settings, where)
        named.build(named.find("task", task), data.options, f"{where}.options")
        counts = {key: getattr(one, key) or getattr(common, key) for key in ("problems", "samples")}
        asked = dataclasses.replace(common, sets={}, **counts)
        found[name] = dataclasses.replace(recipe, task=task, data=data, eval=asked)
    return found


def _group(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The settings of a group; {} if it is absent or has no value."""
    value = tree.get(key)
    if value is not None and not isinstance(value, Mapping):
        name = f", such as {key}.{UNIONS[key]}={value}" if key in UNIONS else ""
        raise ValueError(f"recipe: {key}: expected a group of settings{name}, found {value!r}")
    return dict(value or {})


def _loss(rule: Rule, settings: Mapping[str, Any]) -> LossConfig:
    """The settings of the loss that the credit rule chooses."""
    if not isinstance(rule.loss, str) or rule.loss not in LOSSES:
        raise ValueError(f"credit.loss: expected {' or '.join(LOSSES)}, found {rule.loss!r}")
    kind = LOSSES[rule.loss]
    if settings and not dataclasses.fields(kind):
        name = named.name_of("credit.type", type(rule))
        raise ValueError(
            f"loss.{next(iter(settings))}: expected no settings, as credit.type={name} trains the "
            "likelihood of the tokens, a loss without settings"
        )
    return named.build(kind, settings, "loss")


def check_recipe(recipe: Recipe) -> None:
    """Raise ValueError if settings are out of range or groups contradict each other."""
    for key, settings in as_tree(recipe).items():  # recipes made in Python are checked too
        group = getattr(recipe, key)
        if dataclasses.is_dataclass(group):
            settings.pop(UNIONS.get(key), None)
            named.build(type(group), settings, key)
    sets = evaluation_sets(recipe)
    tracker_names(recipe.log)
    sampling, train, engine = recipe.sampling, recipe.train, recipe.engine
    _asked(f"credit.type={recipe.credit_type}", recipe.credit.check, recipe.shape)
    check_pairs(
        recipe.policy,
        engine,
        sampling,
        recipe.shape,
        recipe.credit,
        recipe.loss,
        train,
        figures(sets),
    )
    check_reward(recipe.reward, recipe.sampling.truncated, recipe.task)
    who = f"shape.kind={recipe.shape_kind}"
    cost = _asked(who, recipe.shape.cost, sampling.max_new_tokens)
    if not isinstance(cost, Cost):
        raise ValueError(f"{who}: expected cost to return spo.config.shape.Cost, found {cost!r}")
    compare = [f"credit.type={recipe.credit_type}"] if recipe.credit.compares else []
    check_variance(who, cost.graded, compare, recipe.data, train)
    for _, limit in sampling.stages:
        try:
            _asked(who, recipe.shape.cost, limit)
        except ValueError as error:
            raise ValueError(f"sampling.stages: with a limit of {limit}, {error}") from error


def _asked(who: str, function: Callable[[Any], Any], argument: Any) -> Any:
    """`function(argument)` of a class, perhaps from outside; an exception becomes one sentence."""
    try:
        return function(argument)
    except ValueError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{who}: {function.__name__} failed ({reason})") from error
