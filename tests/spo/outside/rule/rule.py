"""Rewards against their group's mean, less what a long response costs: a rule from outside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from annotated_types import Ge

from spo import Credit, Forest, Rule
from spo.config.credit import Models
from spo.config.shape import ShapeConfig
from spo.credit.nodes import figures, of_tokens
from spo.credit.values import Values


@dataclass(frozen=True)
class Terse(Rule):
    """Reward - mean of the group - `cost` * (length - mean length of the group)."""

    cost: Annotated[float, Ge(0)] = 0.01
    hold: Literal["off", "on"] = "off"
    """on: before a step, tokens that the policy has moved away from count for less."""

    def check(self, shape: ShapeConfig) -> None:
        shape.require_whole_responses("this rule")

    def assign(self, forest: Forest, models: Models | None) -> Credit:
        lengths = forest.cu_tokens.diff().float()
        worth = torch.zeros(forest.num_nodes)
        for tree in range(len(forest.prompts)):
            group = forest.trained & (forest.prompt == tree)
            for of_node, weight in ((forest.rewards, 1.0), (lengths, -self.cost)):
                worth[group] += weight * (of_node[group] - of_node[group].mean())
        values = Values().values(forest)
        return Credit(of_tokens(forest, worth), figures(forest, values, worth[forest.trained]))

    def before_step(
        self, forest: Forest, credit: Credit, trees: Sequence[int], models: Models
    ) -> Credit:
        if self.hold == "off":
            return credit
        (logprobs,) = models.score(("policy",), forest, credit.tokens, trees)
        scored = logprobs != 0
        moved = torch.where(scored, logprobs - forest.rollout_logprobs, 0.0).abs()
        return Credit(credit.tokens * (-moved).exp(), {"mean_moved": float(moved[scored].mean())})
