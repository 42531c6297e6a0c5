"""The functions behind `spo.train`, `spo.evaluate`, `spo.rollout` and the command line."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from spo import loop
from spo.config.data import Part, parts_of
from spo.config.recipe import Recipe, check_recipe, load_recipe
from spo.engines.make import engine_of
from spo.engines.protocol import Engine
from spo.forest import Forest
from spo.grow.evaluate import Accuracy
from spo.grow.sampler import Sampler
from spo.grow.stats import RolloutStats
from spo.learn import distributed
from spo.learn.checkpoint import check_folder, choose, find, load_saved
from spo.learn.model import sequence_logprobs
from spo.learn.policy import load_policy
from spo.learn.policy_folder import whole_policy
from spo.models.given import is_loaded, save_given
from spo.reward import reward_given
from spo.run import Run
from spo.tasks.memory import data_settings, name_of
from spo.tasks.sources import has_own_test

HELD_OUT = 0.05  # of training problems, where a Python caller names no test problems
START = "start"  # folder of a run's start policy, where a caller gave a loaded model
RecipeLike = Recipe | str | os.PathLike
"""A recipe, the path of its YAML file, or the name of one that ships with the package."""


def train(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    policy: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    reward: Any = None,
    engine: Any = None,
    report: Callable[[dict], None] = lambda line: None,
    callbacks: Sequence[Any] = (),
    **settings: Any,
) -> Run:
    """Run a recipe; returns the run: its trained model, scores, metrics and forests.

        spo.train("spo-tree", policy="my/model", data=rows, reward=reward, learning_rate=1e-6)

    Args:
        overrides: such as `train.learning_rate=1e-5`; for a recipe given by name or path.
        resume: continue from the newest checkpoint in the run's folder, with the same data and
            reward.
        policy: folder or hub id of the model that is trained, or a loaded model of transformers,
            which stays as it is: the run saves it as `start` in its folder and trains that.
        tokenizer: of a loaded model; by default that of the folder it was loaded from.
        data: rows (dicts), a `datasets.Dataset` or a path, or {"train": …, "test": …} of these.
            Without test problems one in twenty is held out. With a reward the task is `rows`.
        reward: a function (docs/own-reward.md), a name as in recipes, or a list of these.
        engine: "hf" or "vllm", or an engine to sample with, which stays open.
        report: called with every metrics line.
        callbacks: objects with any of `on_iteration(line)`, `on_evaluation(line)` and
            `on_checkpoint(folder)`; after a False the run saves a checkpoint and ends.
        settings: of the recipe: `learning_rate=1e-6` if one group alone has the name,
            `train={"learning_rate": 1e-6}`, or `**{"train.learning_rate": 1e-6}`. `task` is a name
            or a class.

    Raises ValueError for settings that cannot work, RuntimeError if training cannot go on.
    """
    chosen = recipe_of(
        recipe, overrides, policy=policy, data=data, reward=reward, engine=engine, **settings
    )
    ranks = distributed.join(chosen.train.parallel, chosen.policy.device)
    if is_loaded(policy, tokenizer):
        chosen = _keep_policy(chosen, policy, tokenizer, resume)
    given = {"report": report, "callbacks": callbacks}
    loop.train(chosen, resume=resume, engine=_engine(engine), **given)
    distributed.gather(ranks, None)  # rank 0 has written its last line
    return Run(chosen.out_dir)


def evaluate(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    checkpoint: str | os.PathLike | None = None,
    policy: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    reward: Any = None,
    engine: Any = None,
    limits: int | Sequence[int] = (),
    samples: int | None = None,
    temperature: float | None = None,
    **settings: Any,
) -> list[Accuracy]:
    """The figures of every evaluation set, the recipe's own first: greedy Pass@1, and if `samples`
    > 0 also those of that many samples: Pass@1, Pass@k and, where the task finds answers, the
    majority vote, each with its standard error.

    Args:
        checkpoint: test the newest policy in this run folder, or the policy of this checkpoint
            folder; by default the recipe's policy.
        policy, tokenizer, data, reward, settings: as in `train`; `data` alone are the test
            problems.
        engine: "hf" or "vllm", or an engine that holds the weights already and stays open.
        limits: maximum lengths of the response, in tokens; by default the recipe's.
        samples: per problem; by default the set's own if these are more than one, else none.
        temperature: of the samples, 0 is greedy; by default the recipe's.

    Raises ValueError for settings that cannot work and for a folder without a checkpoint.
    """
    if data is not None and not isinstance(data, Mapping):
        data = {"test": data}
    recipe = recipe_of(
        recipe, overrides, policy=policy, data=data, reward=reward, engine=engine, **settings
    )
    if temperature is None:
        temperature = recipe.sampling.temperature
    if samples is not None and (type(samples) is not int or samples < 0):
        raise ValueError(f"samples: expected 0 or more, found {samples!r}")
    if not isinstance(temperature, int | float) or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected 0 (greedy) or more, found {temperature!r}")
    limits = [limits] if isinstance(limits, int) else limits
    if any(type(limit) is not int or limit < 1 for limit in limits):
        raise ValueError(f"limits: expected positive numbers of tokens, found {list(limits)}")
    if checkpoint is not None:
        checkpoint = choose(Path(checkpoint))
    with (
        _with_policy(recipe, policy, tokenizer, checkpoint) as recipe,
        Sampler(recipe, engine=_engine(engine)) as sampler,
    ):
        results, limits = [], sorted(set(limits))
        for name, one in sampler.sets.items():
            results += sampler.accuracies(name, limits=limits)
            own = one.eval.samples if one.eval.samples > 1 else 0
            if count := own if samples is None else samples:
                results += sampler.accuracies(
                    name, temperature=temperature, limits=limits, samples=count
                )
    return results


def rollout(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    policy: Any = None,
    tokenizer: Any = None,
    data: Any = None,
    reward: Any = None,
    engine: Any = None,
    **settings: Any,
) -> tuple[Forest, RolloutStats]:
    """The forest of a first iteration, and its cost. Raises ValueError if it cannot grow.

    Args:
        policy, tokenizer, data, reward, settings: as in `train`.
        engine: "hf" or "vllm", or an engine that holds the weights already and stays open.
    """
    recipe = recipe_of(
        recipe, overrides, policy=policy, data=data, reward=reward, engine=engine, **settings
    )
    with _with_policy(recipe, policy, tokenizer) as recipe:
        return _rollout(recipe, _engine(engine))


def _rollout(recipe: Recipe, engine: Engine | None) -> tuple[Forest, RolloutStats]:
    limit, temperature = recipe.engine.max_model_len, recipe.sampling.temperature
    model = load_policy(recipe.policy, limit=limit) if recipe.shape.rescores else None

    def rescore(prefix: list[int], token_ids: list[int]) -> list[float]:
        assert model is not None  # only shapes that rescore call this
        return sequence_logprobs(model, prefix, token_ids, temperature)

    with Sampler(recipe, engine=engine, rescore=rescore) as sampler:
        prompts = list(islice(sampler.train_prompts(), recipe.train.prompts))
        forest, stats = sampler.grow(prompts)
        return Forest.of(forest, sampler.tokenizer), stats


def compare(
    recipes: Sequence[Recipe],
    out: Path,
    report: Callable[[str, dict], None] = lambda name, line: None,
) -> dict[str, list[dict]]:
    """Train several recipes in turn on one engine, each in a folder of `out`.

    Returns the metrics lines by recipe name. Raises ValueError unless the recipes have different
    names, one policy and one engine.
    """
    if not recipes:
        raise ValueError("compare: expected at least one recipe, found none")
    if len({recipe.name for recipe in recipes}) < len(recipes):
        raise ValueError("compare: expected recipes with different names, found a name twice")
    first = recipes[0]
    if any((r.engine, r.policy) != (first.engine, first.policy) for r in recipes):
        raise ValueError("compare: expected recipes with one policy and one engine, found several")
    engine = engine_of(first)
    results = {}
    try:
        for recipe in recipes:
            results[recipe.name] = loop.train(
                dataclasses.replace(recipe, out=str(out / recipe.name)),
                engine=engine,
                report=lambda line, name=recipe.name: report(name, line),
            )
    finally:
        engine.close()
    return results


def recipe_of(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    policy: Any = None,
    data: Any = None,
    reward: Any = None,
    engine: Any = None,
    **settings: Any,
) -> Recipe:
    """The recipe itself, or the one of that name or path, with its settings; see `train`.

    Raises ValueError for string overrides of a `Recipe`.
    """
    if isinstance(overrides, str):
        raise ValueError(f"overrides: expected a list such as [{overrides!r}], found a string")
    if not isinstance(recipe, Recipe | str | os.PathLike):
        raise ValueError(
            f"recipe: expected a name, a path or a Recipe, found {type(recipe).__name__}"
        )
    if isinstance(recipe, Recipe) and overrides:
        raise ValueError("overrides: expected none for a Recipe; give its name or path to use them")
    if policy is not None and not is_loaded(policy):
        settings["policy"] = policy if isinstance(policy, Mapping) else {"path": os.fspath(policy)}
    if data is not None:
        settings["data"] = data_of(data)
    if reward is not None:
        settings["reward"] = reward_given(reward)
        if data is not None and not any(text.startswith("task=") for text in overrides):
            settings.setdefault("task", "rows")
    if isinstance(engine, str | Mapping):
        settings["engine"] = {"name": engine} if isinstance(engine, str) else engine
    if isinstance(recipe, Recipe) and not settings:
        check_recipe(recipe)
        return recipe
    return load_recipe(recipe, overrides, **settings)


def data_of(data: Any) -> dict[str, Any]:
    """The settings of `data` that rows, data sets, a path, a mixture, or a dict of settings with
    these mean.

    Without test problems, `HELD_OUT` of the training problems are held out, unless these are one
    data set with a test split of its own.
    """
    if _is_mixture(data):
        data = {"train": data}
    settings: dict[str, Any] = dict(data if _by_split(data) else data_settings(data))
    for split in settings.keys() & {"train", "test"}:
        given, where = settings[split], f"data.{split}"
        if _is_mixture(given):
            settings[split] = [{**part, "path": name_of(part["path"], where)} for part in given]
        elif not _by_split(given):
            settings[split] = name_of(given, where)
    if "train" in settings and not settings.keys() & {"test", "test_share"}:
        parts = parts_of(settings["train"])
        if len(parts) != 1 or not has_own_test(parts[0].path):
            settings["test_share"] = HELD_OUT
    return settings


def _by_split(data: Any) -> bool:
    """Whether it is a dict of settings or weights; a `datasets.DatasetDict` is one of data sets."""
    return isinstance(data, Mapping) and not hasattr(data, "column_names")


def _keep_policy(recipe: Recipe, model: Any, tokenizer: Any, resume: bool) -> Recipe:
    """The recipe with a caller's model as its start policy, saved in the run's folder `start`.

    Raises ValueError, and writes nothing, if the folder holds another run, or one of another model.
    """
    ranks = distributed.join(recipe.train.parallel, recipe.policy.device)
    out = recipe.out_dir
    check_folder(out)
    if ranks.main:
        out.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=out, prefix=".start-") as scratch:
            given = Path(scratch) / START
            save_given(model, tokenizer, given)
            find(_at(recipe, given), resume)
            shutil.rmtree(out / START, ignore_errors=True)
            given.rename(out / START)
    distributed.gather(ranks, None)
    return _at(recipe, out / START)


@contextmanager
def _with_policy(
    recipe: Recipe, model: Any, tokenizer: Any, checkpoint: Path | None = None
) -> Iterator[Recipe]:
    """The recipe, whose policy is that of a checkpoint or a caller's loaded model, if given."""
    if checkpoint is not None:
        with whole_policy(checkpoint, load_saved(checkpoint).policy) as folder:
            yield _at(recipe, folder)
    elif is_loaded(model, tokenizer):
        with TemporaryDirectory(prefix="spo-policy-") as folder:
            save_given(model, tokenizer, Path(folder))
            yield _at(recipe, folder)
    else:
        yield recipe


def _at(recipe: Recipe, folder: str | os.PathLike) -> Recipe:
    policy = dataclasses.replace(recipe.policy, path=os.fspath(folder))
    return dataclasses.replace(recipe, policy=policy)


def _is_mixture(data: Any) -> bool:
    """Whether it is a list of data sets, as a recipe writes a mixture, and no list of rows."""
    known = {field.name for field in dataclasses.fields(Part)}
    parts = data if isinstance(data, list) else []
    return bool(parts) and all(
        isinstance(part, Mapping) and "path" in part and part.keys() <= known for part in parts
    )


def _engine(engine: Any) -> Engine | None:
    """The caller's engine; None where it is a name, or settings."""
    if engine is None or isinstance(engine, str | Mapping):
        return None
    if not hasattr(engine, "submit"):
        raise ValueError(f"engine: expected hf, vllm or an engine, found {type(engine).__name__}")
    return engine
