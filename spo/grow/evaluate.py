"""Pass@1 on a task's test split, through the same engine and grader as training."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from spo.engines.protocol import Engine
from spo.grow.rollout import RolloutOptions
from spo.grow.shapes import star
from spo.grow.stream import grow
from spo.metrics import mean_stderr
from spo.records import STOP, Prompt
from spo.tasks.grading import Grader


@dataclass(frozen=True)
class Accuracy:
    """Pass@1 with responses of at most `max_new_tokens`."""

    max_new_tokens: int
    pass_at_1: float  # mean over problems of the share of right samples
    stderr: float  # of that mean
    problems: int  # with at least one graded sample
    samples: int  # per problem
    temperature: float  # 0 is greedy
    truncated: float  # share of the responses that the limit cut
    mean_tokens: float  # of a response, cut ones included
    too_long: int = 0  # problems left out, as a response may not fit the context


def accuracies(
    prompts: Sequence[Prompt],
    engine: Engine,
    grader: Grader,
    decode: Callable[[list[int]], str],
    options: RolloutOptions,
    limits: Sequence[int],
    samples: int = 1,
) -> list[Accuracy]:
    """Pass@1 under every limit on the response, from one rollout with the largest limit.

    A response does not depend on the limit until it reaches it, so shorter limits need no extra
    rollout. A truncated response counts as wrong. A failed grading is left out, never a zero, and
    so is a problem whose prompt does not fit the context with the largest limit.
    """
    options = dataclasses.replace(options, truncated="zero")
    forest, stats = grow(prompts, engine, star(samples, max(limits)), grader, decode, options)
    responses = forest.parent >= 0
    sizes, rewards = forest.cu_tokens.diff()[responses], forest.rewards[responses]
    stopped, trees = forest.finish[responses] == STOP, forest.prompt[responses].tolist()
    results = []
    for limit in limits:
        whole = stopped & (sizes <= limit)
        scores: dict[int, list[float]] = {}
        for tree, reward in zip(trees, torch.where(whole, rewards, 0.0).tolist(), strict=True):
            if reward == reward:
                scores.setdefault(tree, []).append(reward)
        mean, stderr = mean_stderr(sum(s) / len(s) for s in scores.values())
        cut, tokens = (~whole).double().mean(), sizes.clamp(max=limit).double().mean()
        results.append(
            Accuracy(
                limit, mean, stderr, len(scores), samples, options.sampling.temperature, float(cut),
                float(tokens), stats.too_long,
            )
        )  # fmt: skip
    return results
