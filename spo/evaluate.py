"""Pass@1 on a task's test split, through the same engine and grader as training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from spo.engines import Engine
from spo.metrics import mean_stderr
from spo.records import Prompt
from spo.rollout import RolloutOptions, grow
from spo.shapes import star
from spo.tasks.grading import Grader


def pass_at_1(
    prompts: Sequence[Prompt],
    engine: Engine,
    grader: Grader,
    decode: Callable[[list[int]], str],
    options: RolloutOptions,
    max_new_tokens: int,
    samples: int = 1,
) -> tuple[float, float]:
    """Mean accuracy and its standard error over problems; temperature 0 is greedy.

    A truncated response counts as wrong. A failed grading is left out, never a zero.
    """
    options = dataclasses.replace(options, truncated="zero")
    shape = star(samples, max_new_tokens)
    forest, _ = grow(prompts, engine, shape, grader, decode, options)
    scores: dict[int, list[float]] = {}
    for tree, reward in zip(forest.prompt.tolist(), forest.rewards.tolist(), strict=True):
        if reward == reward:
            scores.setdefault(tree, []).append(reward)
    return mean_stderr(sum(s) / len(s) for s in scores.values())
