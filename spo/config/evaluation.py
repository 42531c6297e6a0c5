"""`eval`: how the policy is tested."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spo import named
from spo.config.ranges import Count, NotNegativeInt, Probability, Share

TEST = "test"  # the recipe's own set, which `EvalConfig.sets` cannot name


@dataclass(frozen=True)
class EvalSet:
    """One more evaluation set; what it leaves out is as in the recipe."""

    task: str | None = None
    """Its task; by default the recipe's."""
    data: dict[str, Any] = field(default_factory=dict)
    """Settings of the group `data` that differ here, such as `test` and `options`. With a task of
    its own, the set keeps of the recipe's `data` only what writes a problem as a prompt."""
    problems: Count | None = None
    """Number of test problems; by default `eval.problems`."""
    samples: Count | None = None
    """Samples per problem; by default `eval.samples`."""


@dataclass(frozen=True)
class EvalConfig:
    """Pass@1 on the task's test split, Pass@k and majority vote, on one set or several."""

    every: NotNegativeInt = 10
    """Iterations between evaluations; 0 evaluates only at the start and at the end."""
    problems: Count = 200
    """Number of test problems. Of a split that is read and holds more, they are drawn, the same in
    all runs."""
    sampled: bool = True
    """Also draw samples at the training temperature, besides the greedy one."""
    samples: Count = 1
    """How many per problem. Of more than one, Pass@k and the majority vote are measured too."""
    top_p: Probability = 1.0
    """The samples are drawn from the most likely tokens whose probabilities reach this sum."""
    top_k: NotNegativeInt = 0
    """And from so many of the most likely tokens; 0: from all."""
    min_p: Share = 0.0
    """And from the tokens with at least this share of the largest probability. It comes first, then
    top_k, then top_p of what these leave."""
    sets: dict[str, EvalSet] = field(default_factory=dict)
    """Name -> a further evaluation set. Its figures are `NAME/greedy`, `NAME/sampled` and so on."""

    def __post_init__(self) -> None:
        for name in self.sets:
            if name in (TEST, "train") or not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(
                    "eval.sets: expected names of letters, digits, '.', '_' and '-', other than "
                    f"'train' and 'test', the recipe's own, found {name!r}"
                )
        asked = [self.samples, *(one.samples for one in self.sets.values())]
        if not self.sampled and any(n is not None and n > 1 for n in asked):
            raise ValueError("eval.samples: expected 1 with eval.sampled=false, found more")
        if not self.sampled and (self.top_p, self.top_k, self.min_p) != (1, 0, 0):
            raise ValueError(
                "eval.top_p, eval.top_k and eval.min_p: expected none with eval.sampled=false, as "
                "they change sampled responses alone"
            )


def pass_ks(samples: int) -> list[int]:
    """The k of the Pass@k that are measured with so many samples: 1, 2, 4, … and all."""
    return [*(2**i for i in range(samples.bit_length()) if 2**i < samples), samples]


def figures(
    sets: Mapping[str, Any],  # name -> recipe, as `evaluation_sets` returns them
) -> list[str]:
    """Names of the figures of these evaluation sets, as a metrics line has them.

    Raises ValueError if there is no task of such a name.
    """
    found = []
    for name, recipe in sets.items():
        settings = recipe.eval
        kinds = ["greedy"] + ["sampled"] * settings.sampled
        if settings.samples > 1:
            kinds += [f"pass_at_{k}" for k in pass_ks(settings.samples)[1:]]
            kinds += ["majority"] * hasattr(named.find("task", recipe.task), "answer")
        found += [kind if name == TEST else f"{name}/{kind}" for kind in kinds]
    return found
