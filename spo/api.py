"""The functions behind `spo.train`, `spo.evaluate`, `spo.rollout` and the command line."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path

from spo import loop
from spo.config.recipe import Recipe, check_recipe, load_recipe
from spo.engines.make import engine_of
from spo.engines.protocol import Engine
from spo.forest import Forest
from spo.grow.evaluate import Accuracy
from spo.grow.rollout import RolloutStats
from spo.grow.sampler import Sampler
from spo.learn.checkpoint import latest_checkpoint
from spo.learn.model import sequence_logprobs
from spo.learn.policy import load_policy

RecipeLike = Recipe | str | os.PathLike
"""A recipe, the path of its YAML file, or the name of one that ships with the package."""


def train(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    engine: Engine | None = None,
    report: Callable[[dict], None] = lambda line: None,
) -> list[dict]:
    """Run a recipe; returns the metrics lines written in this call. See `spo.loop.train`.

    Args:
        overrides: such as `train.learning_rate=1e-5`; for a recipe given by name or path.
        resume: continue from the newest checkpoint in the run's folder.
        engine: sample with this engine, which stays open.
        report: called with every metrics line.

    Raises ValueError for settings that cannot work, RuntimeError if training cannot go on.
    """
    return loop.train(recipe_of(recipe, overrides), resume=resume, engine=engine, report=report)


def evaluate(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    checkpoint: str | os.PathLike | None = None,
    engine: Engine | None = None,
    limits: Sequence[int] = (),
    samples: int | None = None,
    temperature: float | None = None,
) -> list[Accuracy]:
    """The figures of every evaluation set, the recipe's own first: greedy Pass@1, and if `samples`
    > 0 also those of that many samples: Pass@1, Pass@k and, where the task finds answers, the
    majority vote, each with its standard error.

    Args:
        checkpoint: test the newest policy in this run folder, or the policy of this checkpoint
            folder; by default the recipe's policy.
        engine: sample with this engine, which holds the weights already and stays open.
        limits: maximum lengths of the response, in tokens; by default the recipe's.
        samples: per problem; by default the set's own if these are more than one, else none.
        temperature: of the samples, 0 is greedy; by default the recipe's.

    Raises ValueError for settings that cannot work and for a folder without a checkpoint.
    """
    recipe = recipe_of(recipe, overrides)
    if temperature is None:
        temperature = recipe.sampling.temperature
    if samples is not None and samples < 0:
        raise ValueError(f"samples: expected 0 or more, found {samples}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature: expected 0 (greedy) or more, found {temperature:g}")
    if any(limit < 1 for limit in limits):
        raise ValueError(f"limits: expected positive numbers of tokens, found {list(limits)}")
    if checkpoint is not None:
        newest = latest_checkpoint(Path(checkpoint))
        if (Path(checkpoint) / "policy").is_dir():  # one checkpoint of a run
            newest = Path(checkpoint)
        if newest is None:
            raise ValueError(f"checkpoint: expected a complete checkpoint, {checkpoint} holds none")
        policy = dataclasses.replace(recipe.policy, path=str(newest / "policy"))
        recipe = dataclasses.replace(recipe, policy=policy)
    with Sampler(recipe, engine=engine) as sampler:
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
    recipe: RecipeLike, overrides: Sequence[str] = (), *, engine: Engine | None = None
) -> tuple[Forest, RolloutStats]:
    """The forest of a first iteration, and its cost. Raises ValueError if it cannot grow.

    Args:
        engine: sample with this engine, which holds the weights already and stays open.
    """
    recipe = recipe_of(recipe, overrides)
    model = (
        load_policy(recipe.policy, limit=recipe.engine.max_model_len)
        if recipe.shape.rescores
        else None
    )
    temperature = recipe.sampling.temperature

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


def recipe_of(recipe: RecipeLike, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe itself, or the one of that name or path, with its overrides.

    Raises ValueError for overrides of a `Recipe`.
    """
    if isinstance(overrides, str):
        raise ValueError(f"overrides: expected a list such as [{overrides!r}], found a string")
    if not isinstance(recipe, Recipe):
        return load_recipe(recipe, overrides)
    if overrides:
        raise ValueError("overrides: expected none for a Recipe; give its name or path to use them")
    check_recipe(recipe)
    return recipe
