"""Advantages from a trained critic, token by token: PPO."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from spo.config.credit import Models, Rule
from spo.config.critic import CriticConfig
from spo.config.ranges import Share
from spo.config.shape import ShapeConfig
from spo.credit.nodes import figures, of_tokens, whiten
from spo.credit.values import Values
from spo.records import Credit, Forest, Targets
from spo_kernels import gae


@dataclass(frozen=True)
class Gae(Rule):
    """Generalised advantage estimates from a critic that learns beside the policy."""

    gamma: Share = 1.0
    """Discount per token."""
    lam: Share = 1.0
    """Weight of longer estimates; 1 uses the reward and none of the critic's later values."""
    whiten: Literal["off", "batch"] = "off"
    """batch: shift and scale the trained tokens' advantages to mean 0 and standard deviation 1."""
    critic: CriticConfig | None = field(default_factory=CriticConfig)
    """How the critic learns."""

    def check(self, shape: ShapeConfig) -> None:
        shape.require_whole_responses("credit.type=gae")
        if self.critic is None:
            raise ValueError("credit.critic: expected settings with credit.type=gae, found null")

    def assign(self, forest: Forest, models: Models) -> Credit:
        trained = of_tokens(forest, forest.trained)
        (values,) = models.score(("critic",), forest, trained.float())
        advantages, returns = token_credit(forest, values, gamma=self.gamma, lam=self.lam)
        if self.whiten == "batch":
            advantages = whiten(advantages, trained)
        reported = figures(forest, Values().values(forest), advantages[trained])
        return Credit(advantages, reported, Targets(values, returns))


def token_credit(
    forest: Forest,
    values: Tensor,  # (T,) fp32, of the state before every token; read only on trained leaves
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:  # advantages (T,), returns (T,), 0 on tokens that do not train
    """Generalised advantages and the critic's targets on a star; the last token has the reward.

    Raises ValueError if a trained node is not a graded leaf under its prompt.
    """
    leaf = forest.is_leaf & forest.rewards.isfinite() & (forest.parent >= 0)
    under_prompt = forest.parent[forest.parent.clamp(min=0).long()] < 0
    if not (leaf & under_prompt)[forest.trained].all():
        raise ValueError("credit.type=gae: expected every trained node to be a graded response")
    sizes = forest.cu_tokens.diff()[forest.trained]
    cu_seqlens = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    tokens = forest.trained.repeat_interleave(forest.cu_tokens.diff())
    rewards = values.new_zeros(int(cu_seqlens[-1]))
    rewards[cu_seqlens[1:] - 1] = forest.rewards[forest.trained]
    packed = gae(rewards, values[tokens], cu_seqlens, gamma=gamma, lam=lam)
    advantages, returns = (torch.zeros_like(values).masked_scatter(tokens, x) for x in packed)
    return advantages, returns
