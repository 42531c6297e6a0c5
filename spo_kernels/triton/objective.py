"""The objective of one token and its derivative by the logprob: Triton's csrc/objective.h."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from spo_kernels.objective import TYPES
from spo_kernels.triton.softmax import expm1

TokenArgs = namedtuple("TokenArgs", tuple(TYPES))  # a kernel's per-token inputs and scalars


def token_args(fields: Mapping[str, Any]) -> TokenArgs:
    """The fields of `Tokens` for a kernel, which is compiled for each value of an int or a bool."""
    values = {name: fields[name] for name in TYPES}
    constants = {k: tl.constexpr(x) for k, x in values.items() if isinstance(x, int)}
    return TokenArgs(**values | constants)


@triton.jit
def policy_term(logprob, row, tokens, advantage, policy_scale):
    """(policy, clipped, ratio, d policy / d logprob) of -min(ratio A, clip(ratio) A) / Z.

    The comparisons let NaN through to the result and count a boundary as inside, as in PyTorch.
    """
    bound = tokens.log_ratio_clamp
    difference = logprob - tl.load(tokens.old_logprobs + row)
    below = difference < -bound
    above = difference > bound
    log_ratio = tl.where(below, -bound, tl.where(above, bound, difference))
    ratio = tl.exp(log_ratio)
    low = 1 - tokens.clip_eps_low
    high = 1 + tokens.clip_eps_high
    held = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    clipped = ratio * advantage > held * advantage
    policy = -policy_scale * tl.where(clipped, held, ratio) * advantage
    slope = tl.where(clipped | below | above, 0.0, -policy_scale * ratio * advantage)
    return policy, clipped.to(tl.float32), ratio, slope


@triton.jit
def kl_term(logprob, row, tokens, kl_scale):
    """(kl, d kl / d logprob) of k1, k2 or k3, the values 1, 2 and 3 of `KlEstimator` in csrc/ops.h.

    With p and q the two logprobs: p - q, (p - q)^2 / 2, exp(d) - d - 1 for d = clamp(q - p, +-10).
    """
    difference = logprob - tl.load(tokens.ref_logprobs + row)
    if tokens.kl_estimator == 1:
        value = difference
        slope = 1.0
    elif tokens.kl_estimator == 2:
        value = 0.5 * difference * difference
        slope = difference
    else:
        below = difference < -10.0
        above = difference > 10.0
        d = tl.where(below, 10.0, tl.where(above, -10.0, -difference))
        growth = expm1(d)
        value = growth - d
        slope = tl.where(below | above, 0.0, -growth)
    return kl_scale * value, kl_scale * slope
