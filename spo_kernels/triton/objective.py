"""The objective of one token and its derivatives: Triton's csrc/objective.h."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from spo_kernels.tokens import TYPES
from spo_kernels.triton.softmax import expm1

TokenArgs = namedtuple("TokenArgs", tuple(TYPES))  # a kernel's per-token inputs and scalars


def token_args(fields: Mapping[str, Any]) -> TokenArgs:
    """The fields of `Tokens` for a kernel, which is compiled for each value of an int or a bool."""
    values = {name: fields[name] for name in TYPES}
    constants = {k: tl.constexpr(x) for k, x in values.items() if isinstance(x, int)}
    return TokenArgs(**values | constants)


@triton.jit
def of_token(values, row, absent):
    """The row's value of an array, or `absent` if there is none."""
    if values is not None:
        return tl.load(values + row)
    else:
        return absent


@triton.jit
def importance_ratio(logprob, row, tokens):
    """(ratio, derivative) of exp(clamp(logprob - old_logprob)); 1 and 1 on-policy.

    The comparisons here and below let NaN through to the result and count a boundary as inside, as
    in PyTorch.
    """
    if tokens.old_logprobs is not None:
        difference = logprob - tl.load(tokens.old_logprobs + row)
    else:
        difference = logprob - logprob
    bound = tokens.log_ratio_clamp
    below = difference < -bound
    above = difference > bound
    ratio = tl.exp(tl.where(below, -bound, tl.where(above, bound, difference)))
    return ratio, tl.where(below | above, 0.0, ratio)


@triton.jit
def policy_term(ratio, ratio_slope, row, tokens, advantage, policy_scale):
    """(policy, low, high, at maximum, d policy / d logprob) of -w min(ratio A, clip(ratio) A) / Z.

    For A < 0 it is at most -w clip_ratio_max A / Z.
    """
    floor = 1 - tokens.clip_eps_low
    ceiling = 1 + tokens.clip_eps_high
    low = (advantage < 0) & (ratio < floor)
    high = (advantage > 0) & (ratio > ceiling)
    most = (advantage < 0) & (ratio > tokens.clip_ratio_max)
    held = tl.where(low, floor, tl.where(high, ceiling, ratio))
    held = tl.where(most, tokens.clip_ratio_max, held)
    scale = -policy_scale * of_token(tokens.weights, row, 1.0) * advantage
    idle = (advantage == 0) | (policy_scale == 0)
    policy = tl.where(idle, 0.0, scale * held)
    slope = tl.where(low | high | most | idle, 0.0, scale * ratio_slope)
    return policy, low.to(tl.float32), high.to(tl.float32), most.to(tl.float32), slope


@triton.jit
def kl_term(logprob, ratio, ratio_slope, row, tokens, kl_scale):
    """(kl, estimate, d kl / d logprob) of k1, k2 or k3: 1, 2 and 3 of `KlEstimator` in csrc/ops.h.

    With p and q the two logprobs: p - q, (p - q)^2 / 2, exp(d) - d - 1 for d = q - p, which is
    clamped to +-kl_clamp.
    """
    difference = logprob - tl.load(tokens.ref_logprobs + row)
    if tokens.kl_estimator == 1:
        value = difference
        slope = 1.0
    elif tokens.kl_estimator == 2:
        value = 0.5 * difference * difference
        slope = difference
    else:
        bound = tokens.kl_clamp
        below = difference < -bound
        above = difference > bound
        d = tl.where(below, bound, tl.where(above, -bound, -difference))
        growth = expm1(d)
        value = growth - d
        slope = tl.where(below | above, 0.0, -growth)
    term = value
    if tokens.kl_ratio:  # a clamped ratio has no slope, not even times an infinite value
        slope = slope * ratio + tl.where(ratio_slope == 0, 0.0, value * ratio_slope)
        term = value * ratio
    scale = kl_scale * of_token(tokens.kl_weights, row, 1.0)
    none = kl_scale == 0
    return tl.where(none, 0.0, scale * term), value, tl.where(none, 0.0, scale * slope)
