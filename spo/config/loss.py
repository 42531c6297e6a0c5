"""`loss`: the settings of the loss; the credit rule chooses which one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from spo.config.ranges import NotNegative, Positive, Probability


@dataclass(frozen=True)
class PolicyLossConfig:
    """Masked PPO: the clipped ratio of trained tokens, weighted by their credit."""

    prob_threshold: Probability | None = 0.9
    """Train only tokens whose sampling probability is below this; null trains all tokens."""
    clip_eps_low: NotNegative = 0.2
    """The ratio is clipped at 1 - this."""
    clip_eps_high: NotNegative = 0.2
    """The ratio is clipped at 1 + this."""
    log_ratio_clamp: Positive = 10.0
    """Bound on the log ratio before it is exponentiated."""
    policy_norm: Literal["tokens", "constant"] = "tokens"
    """Divisor of the sum over tokens. tokens: the number of tokens that train in the step.
    constant: prompts of the step * sampling.max_new_tokens, so that the weight of a response does
    not depend on any length, and the step can be a multiple of the policy gradient."""
    kl_coef: NotNegative = 0.0
    """Weight of the KL term, a mean over the tokens that it covers, towards the reference: the
    start policy, or that of `train.reference_every`. 0 loads no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimator of the KL term."""
    kl_scope: Literal["masked", "all"] = "masked"
    """Tokens that the KL term covers. masked: those that train and that the mask keeps. all: every
    token of the responses, also of those whose advantage is 0 (probes and dropped responses are
    left out)."""


@dataclass(frozen=True)
class LikelihoodLossConfig:
    """-(1/Z) sum of credit * logprob over every token that has credit. It has no settings."""

    prob_threshold: ClassVar[None] = None
    policy_norm: ClassVar[str] = "tokens"
    kl_coef: ClassVar[float] = 0.0
    kl_scope: ClassVar[str] = "masked"


LossConfig = PolicyLossConfig | LikelihoodLossConfig

LOSSES: dict[str, type[LossConfig]] = {
    "policy": PolicyLossConfig,
    "likelihood": LikelihoodLossConfig,
}
"""By the name that a credit rule gives as its `loss`."""
