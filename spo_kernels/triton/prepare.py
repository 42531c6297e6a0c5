"""What masked_ppo_loss does before and after its rows, in Triton: one program, in a fixed order."""

# The parameters that kernels declare as tl.constexpr are given plain Python values.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spo_kernels.triton.objective import token_args

BLOCK = 1024  # tokens at a time
NUM_WARPS = 16  # two tokens a thread: with more, ptxas spills


@triton.jit
def norm_of(given, value, count):
    """The norm: what is given on the device, else its value, else the count."""
    if given is not None:
        norm = tl.load(given).to(tl.float32)
    else:
        norm = tl.where(value < 0, count, value)
    return norm


@triton.jit
def prepare_kernel(
    num_tokens,
    vocab,
    tokens,  # TokenArgs
    temperature_stride,
    uses,
    scales,
    counts,
    figures,
    logprobs,
    entropies,
    stats,
    index,  # None: rows are not gathered
    states,
    sources,
    capacity,
    hidden_index,
    num_states,
    STRICT: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`policy_prepare_cpu` in csrc/cpu/policy_prepare.cpp."""
    lanes = tl.arange(0, BLOCK)
    kept_count = tl.zeros((), tl.int64)
    policy_count = tl.zeros((), tl.int64)
    used_count = tl.zeros((), tl.int64)
    bad = tl.zeros((), tl.int64)
    most_policy = 0.0
    most_kl = 0.0
    for begin in range(0, num_tokens, BLOCK):
        i = begin + lanes
        trained = i < num_tokens
        inside = i < num_tokens
        if tokens.loss_mask is not None:
            trained = trained & (tl.load(tokens.loss_mask + i, mask=inside, other=0) != 0)
        old = tl.load(tokens.old_logprobs + i, mask=inside, other=0.0)
        advantage = tl.load(tokens.advantages + i, mask=inside, other=0.0)
        id = tl.load(tokens.token_ids + i, mask=inside, other=0)
        kept = trained & ((old < tokens.log_threshold) | (old != old))
        if tokens.kl_estimator == 0:
            in_kl = kept & (i < 0)
        elif tokens.kl_scope == 1:
            in_kl = trained
        else:
            in_kl = kept
        policy = kept & (advantage != 0)
        takes = policy | in_kl
        if tokens.temperature is not None:
            heat = tl.load(tokens.temperature + i * temperature_stride, mask=inside, other=1.0)
        else:
            heat = tl.full((BLOCK,), 1.0, tl.float32) * tokens.temperature_value
        good = (id >= 0) & (id < vocab) & (heat > 0) & (heat < float("inf")) & (old == old)
        wrong = (kept | in_kl) & (good == 0)
        bad = bad | tl.max(wrong.to(tl.int64), 0)
        use = kept.to(tl.uint8) + 2 * in_kl.to(tl.uint8)
        if index is not None:  # rows of other tokens are not run
            tl.store(logprobs + i, 0.0, mask=inside)
            if entropies is not None:
                tl.store(entropies + i, 0.0, mask=inside)
            for k in tl.static_range(4):
                tl.store(stats + 4 * i + k, 0.0, mask=inside)
            state = i.to(tl.int64)
            if hidden_index is not None:
                state = tl.load(hidden_index + i, mask=takes, other=0)
            lost = takes & ((state < 0) | (state >= num_states))
            bad = bad | (2 * tl.max(lost.to(tl.int64), 0))
            use += 4 * lost.to(tl.uint8)
            slot = used_count + tl.cumsum(takes.to(tl.int64), 0) - 1
            fits = takes & (slot < capacity)
            tl.store(index + slot, i.to(tl.int64), mask=fits)
            tl.store(states + slot, tl.where(lost, num_states, state), mask=fits)
            tl.store(sources + slot, tl.where(lost, 0, state), mask=fits)
        tl.store(uses + i, use, mask=inside)
        kept_count += tl.sum(kept.to(tl.int64), 0)
        policy_count += tl.sum(policy.to(tl.int64), 0)
        used_count += tl.sum(takes.to(tl.int64), 0)
        if SCALED:  # see raise_slopes in csrc/objective.h
            ratio = tl.exp(tl.minimum(-old, tokens.log_ratio_clamp))
            clipped = tl.minimum(ratio, 1 + tokens.clip_eps_high)
            slope = tl.abs(advantage) * tl.where(advantage > 0, clipped, ratio) / heat
            most_policy = tl.maximum(most_policy, tl.max(tl.where(policy, slope, 0.0), 0))
            if tokens.kl_estimator == 1:
                bound = 1.0
            elif tokens.kl_estimator == 2:
                bound = 4096.0
            else:
                bound = 22027.0
            most_kl = tl.maximum(most_kl, tl.max(tl.where(in_kl, bound / heat, 0.0), 0))
    if index is not None:
        if not STRICT:
            for begin in range(0, capacity, BLOCK):
                slot = begin + lanes
                free = (slot >= used_count) & (slot < capacity)
                tl.store(index + slot, num_tokens, mask=free)
                tl.store(states + slot, num_states, mask=free)
                tl.store(sources + slot, 0, mask=free)
    count = kept_count.to(tl.float32)
    z = norm_of(tokens.policy_norm, tokens.policy_norm_value, count)
    if (z < 0) | (z == float("inf")) | (z != z):
        bad = bad | 4
    policy_scale = tl.where(z == 0, 0.0, tl.div_rn(1.0, tl.where(z == 0, 1.0, z)))
    kl_scale = 0.0
    if tokens.kl_estimator != 0:
        z = norm_of(tokens.kl_norm, tokens.kl_norm_value, count)
        if (z < 0) | (z == float("inf")) | (z != z):
            bad = bad | 4
        coef = tl.full((), 1.0, tl.float32) * tokens.kl_coef
        kl_scale = tl.where(z == 0, 0.0, tl.div_rn(coef, tl.where(z == 0, 1.0, z)))
    tl.store(counts, kept_count)
    tl.store(counts + 1, policy_count)
    tl.store(counts + 2, used_count)
    tl.store(counts + 3, bad)
    overflow = tl.zeros((), tl.int64)
    if index is not None:
        overflow = (used_count > capacity).to(tl.int64)
    tl.store(counts + 4, overflow)
    power = 0.0
    if SCALED:  # see write_scales in csrc/objective.h
        size = policy_scale * most_policy + kl_scale * most_kl
        fits = (size > 0) & (size < float("inf"))
        power = tl.where(fits, tl.floor(tl.log2(tl.where(fits, size, 1.0))) - 14, 0.0)
        power = tl.minimum(tl.maximum(power, -100.0), 0.0)
    tl.store(scales, policy_scale)
    tl.store(scales + 1, kl_scale)
    tl.store(scales + 2, tl.exp2(-power))
    tl.store(figures + 4, tl.exp2(power))


@triton.jit
def finish_kernel(num_tokens, counts, stats, loss, figures, BLOCK: tl.constexpr):
    """`policy_finish_cpu` in csrc/cpu/policy_prepare.cpp."""
    lanes = tl.arange(0, BLOCK)
    policy = tl.zeros((BLOCK,), tl.float64)
    kl = tl.zeros((BLOCK,), tl.float64)
    clipped = tl.zeros((BLOCK,), tl.float64)
    ratio = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, num_tokens, BLOCK):
        i = begin + lanes
        inside = i < num_tokens
        policy += tl.load(stats + 4 * i, mask=inside, other=0.0)
        kl += tl.load(stats + 4 * i + 1, mask=inside, other=0.0)
        clipped += tl.load(stats + 4 * i + 2, mask=inside, other=0.0)
        ratio += tl.load(stats + 4 * i + 3, mask=inside, other=0.0)
    count = tl.maximum(tl.load(counts + 1), 1).to(tl.float64)
    policy_sum = tl.sum(policy, 0).to(tl.float32)
    kl_sum = tl.sum(kl, 0).to(tl.float32)
    tl.store(figures, policy_sum)
    tl.store(figures + 1, kl_sum)
    tl.store(figures + 2, (tl.sum(clipped, 0) / count).to(tl.float32))
    tl.store(figures + 3, (tl.sum(ratio, 0) / count).to(tl.float32))
    tl.store(loss, policy_sum + kl_sum)


def policy_prepare(
    *,
    vocab: int,
    tokens: int,
    temperature_stride: int,
    strict: bool,
    scaled: bool,
    uses: Tensor,  # (N,)
    scales: Tensor,  # (3,)
    counts: Tensor,  # (5,)
    figures: Tensor,  # (5,)
    logprobs: Tensor,  # (N,)
    entropy: Tensor | None,  # (N,)
    stats: Tensor,  # (N, 4)
    index: Tensor | None = None,  # (capacity,)
    states: Tensor | None = None,  # (capacity,)
    sources: Tensor | None = None,  # (capacity,)
    capacity: int = 0,
    hidden_index: Tensor | None = None,  # (N,)
    num_states: int = 0,
    **fields: Any,  # of `Tokens`; what the rows need
) -> None:
    """Fill uses, scales, counts, index and states: `policy_prepare_cpu` on `PolicyLossArgs`."""
    with torch.cuda.device_of(counts):
        prepare_kernel[(1,)](
            tokens,
            vocab,
            token_args(fields),
            temperature_stride,
            uses,
            scales,
            counts,
            figures,
            logprobs,
            entropy,
            stats,
            index,
            states,
            sources,
            capacity,
            hidden_index,
            num_states,
            STRICT=strict,
            SCALED=scaled,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )


def policy_finish(
    *, tokens: int, counts: Tensor, stats: Tensor, loss: Tensor, figures: Tensor, **_: Any
) -> None:
    """Fill loss and figures: `policy_finish_cpu` on `PolicyLossArgs`."""
    with torch.cuda.device_of(counts):
        finish_kernel[(1,)](tokens, counts, stats, loss, figures, BLOCK=BLOCK, num_warps=NUM_WARPS)
