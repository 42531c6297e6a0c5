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


@triton.jit(do_not_specialize=["vocab"])  # a vocabulary of 1 would be a plain number
def prepare_kernel(
    num_tokens,
    vocab,
    tokens,  # TokenArgs
    temperature_stride,
    uses,
    scales,
    counts,
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
    run_count = tl.zeros((), tl.int64)
    dropped_count = tl.zeros((), tl.int64)
    bad = tl.zeros((), tl.int64)
    most_policy = 0.0
    most_kl = 0.0
    most_entropy = 0.0
    late = False
    if tokens.old_logprobs is None:  # the probability mask is that of the rows
        late = tokens.log_threshold < float("inf")
    all_kept = late | (tokens.entropy_coef != 0)
    if tokens.metrics:
        all_kept = True
    for begin in range(0, num_tokens, BLOCK):
        i = begin + lanes
        trained = i < num_tokens
        inside = i < num_tokens
        if tokens.loss_mask is not None:
            trained = trained & (tl.load(tokens.loss_mask + i, mask=inside, other=0) != 0)
        if tokens.old_logprobs is not None:
            old = tl.load(tokens.old_logprobs + i, mask=inside, other=0.0)
            kept_by_old = (old < tokens.log_threshold) | (old != old)
        else:
            old = tl.zeros((BLOCK,), tl.float32)
            kept_by_old = inside
        advantage = tl.load(tokens.advantages + i, mask=inside, other=0.0)
        id = tl.load(tokens.token_ids + i, mask=inside, other=0)
        if tokens.drop_nan:
            dropped_count += tl.sum((trained & (old != old)).to(tl.int64), 0)
            trained = trained & (old == old)
        kept = trained & kept_by_old
        runs = kept & ((advantage != 0) | all_kept)
        if tokens.kl_estimator == 0:
            in_kl = kept & (i < 0)
        elif tokens.kl_scope == 1:
            in_kl = trained
        else:
            in_kl = kept
        if tokens.metrics:
            runs = runs | in_kl
        else:
            runs = runs | (in_kl & (tokens.kl_coef > 0))
        if tokens.temperature is not None:
            heat = tl.load(tokens.temperature + i * temperature_stride, mask=inside, other=1.0)
        else:
            heat = tl.full((BLOCK,), 1.0, tl.float32) * tokens.temperature_value
        good = (id >= 0) & (id < vocab) & (heat > 0) & (heat < float("inf")) & (old == old)
        wrong = (kept | in_kl) & (good == 0)
        bad = bad | tl.max(wrong.to(tl.int64), 0)
        use = kept.to(tl.uint8) + 2 * in_kl.to(tl.uint8) + 8 * runs.to(tl.uint8)
        if index is not None:  # rows of other tokens are not run
            tl.store(logprobs + i, float("nan"), mask=inside)
            if entropies is not None:
                tl.store(entropies + i, float("nan"), mask=inside)
            for k in tl.static_range(8):
                tl.store(stats + 8 * i + k, 0.0, mask=inside)
            state = i.to(tl.int64)
            if hidden_index is not None:
                state = tl.load(hidden_index + i, mask=runs, other=0)
            lost = runs & ((state < 0) | (state >= num_states))
            bad = bad | (2 * tl.max(lost.to(tl.int64), 0))
            use += 4 * lost.to(tl.uint8)
            slot = run_count + tl.cumsum(runs.to(tl.int64), 0) - 1
            fits = runs & (slot < capacity)
            tl.store(index + slot, i.to(tl.int64), mask=fits)
            tl.store(states + slot, tl.where(lost, num_states, state), mask=fits)
            tl.store(sources + slot, tl.where(lost, 0, state), mask=fits)
        tl.store(uses + i, use, mask=inside)
        kept_count += tl.sum(kept.to(tl.int64), 0)
        run_count += tl.sum(runs.to(tl.int64), 0)
        if SCALED:  # see raise_slopes in csrc/prepare.h
            heat = heat / tokens.logit_scale
            ratio = tl.exp(tl.minimum(-old, tokens.log_ratio_clamp))
            ceiling = tl.where(advantage > 0, 1 + tokens.clip_eps_high, tokens.clip_ratio_max)
            slope = tl.abs(advantage) * tl.minimum(ratio, ceiling) / heat
            if tokens.weights is not None:
                slope *= tl.abs(tl.load(tokens.weights + i, mask=inside, other=0.0))
            moves = kept & runs
            most_policy = tl.maximum(most_policy, tl.max(tl.where(moves, slope, 0.0), 0))
            slope = (1 + tl.log(vocab.to(tl.float32))) / heat
            most_entropy = tl.maximum(most_entropy, tl.max(tl.where(moves, slope, 0.0), 0))
            if tokens.kl_estimator != 0:
                if tokens.kl_estimator == 1:
                    bound = 1.0
                elif tokens.kl_estimator == 2:
                    bound = 4096.0
                else:
                    bound = tl.exp(tl.minimum(tl.zeros((BLOCK,), tl.float32) + tokens.kl_clamp, 10))
                slope = bound / heat
                if tokens.kl_weights is not None:
                    slope *= tl.abs(tl.load(tokens.kl_weights + i, mask=inside, other=0.0))
                if tokens.kl_ratio:
                    slope *= 2 * ratio
                moves = in_kl & runs
                most_kl = tl.maximum(most_kl, tl.max(tl.where(moves, slope, 0.0), 0))
    if index is not None:
        if not STRICT:
            for begin in range(0, capacity, BLOCK):
                slot = begin + lanes
                free = (slot >= run_count) & (slot < capacity)
                tl.store(index + slot, num_tokens, mask=free)
                tl.store(states + slot, num_states, mask=free)
                tl.store(sources + slot, 0, mask=free)
    count = kept_count.to(tl.float32)
    if tokens.policy_norm is None:  # a count of a late mask is known only after the rows
        count = tl.where(late & (tokens.policy_norm_value < 0), 1.0, count)
    z = norm_of(tokens.policy_norm, tokens.policy_norm_value, count)
    if (z < 0) | (z == float("inf")) | (z != z):
        bad = bad | 4
    policy_scale = tl.where(z == 0, 0.0, tl.div_rn(1.0, tl.where(z == 0, 1.0, z)))
    kl_scale = 0.0
    z = norm_of(tokens.kl_norm, tokens.kl_norm_value, count)
    if (z < 0) | (z == float("inf")) | (z != z):
        bad = bad | 4
    if tokens.kl_estimator != 0:
        coef = tl.full((), 1.0, tl.float32) * tokens.kl_coef
        kl_scale = tl.where(z == 0, 0.0, tl.div_rn(coef, tl.where(z == 0, 1.0, z)))
    # Where nobody reads the counts, a bad norm shows in the loss.
    policy_scale = tl.where((bad & 4) != 0, float("nan"), policy_scale)
    kl_scale = tl.where((bad & 4) != 0, float("nan"), kl_scale)
    tl.store(counts, kept_count)
    tl.store(counts + 2, run_count)
    tl.store(counts + 3, bad)
    overflow = tl.zeros((), tl.int64)
    if index is not None:
        overflow = (run_count > capacity).to(tl.int64)
    tl.store(counts + 4, overflow)
    tl.store(counts + 5, dropped_count)
    power = 0.0
    if SCALED:  # see write_scales in csrc/prepare.h
        entropy_size = tl.abs(tl.full((), 1.0, tl.float32) * tokens.entropy_coef) * most_entropy
        size = policy_scale * (most_policy + entropy_size) + kl_scale * most_kl
        fits = (size > 0) & (size < float("inf"))
        power = tl.where(fits, tl.floor(tl.log2(tl.where(fits, size, 1.0))) - 14, 0.0)
        power = tl.minimum(tl.maximum(power, -100.0), 0.0)
    tl.store(scales, policy_scale)
    tl.store(scales + 1, kl_scale)
    tl.store(scales + 2, policy_scale * tokens.entropy_coef)
    tl.store(scales + 3, tl.exp2(-power))


@triton.jit
def total(sums, count):
    """A sum, or its mean over a count; 0 over none."""
    sum = tl.sum(sums, 0)
    return tl.where(count > 0, sum / tl.maximum(count, 1).to(tl.float64), 0.0).to(tl.float32)


@triton.jit
def finish_kernel(
    num_tokens,
    tokens,  # TokenArgs
    uses,
    scales,
    counts,
    stats,
    loss,
    figures,
    BLOCK: tl.constexpr,
):
    """`policy_finish_cpu` in csrc/cpu/policy_prepare.cpp."""
    lanes = tl.arange(0, BLOCK)
    policy = tl.zeros((BLOCK,), tl.float64)
    kl = tl.zeros((BLOCK,), tl.float64)
    entropy = tl.zeros((BLOCK,), tl.float64)
    ratio = tl.zeros((BLOCK,), tl.float64)
    estimate = tl.zeros((BLOCK,), tl.float64)
    low = tl.zeros((BLOCK,), tl.float64)
    high = tl.zeros((BLOCK,), tl.float64)
    most = tl.zeros((BLOCK,), tl.float64)
    kept = tl.zeros((), tl.int64)
    measured = tl.zeros((), tl.int64)
    in_kl = tl.zeros((), tl.int64)
    for begin in range(0, num_tokens, BLOCK):
        i = begin + lanes
        inside = i < num_tokens
        use = tl.load(uses + i, mask=inside, other=0)
        runs = (use & 8) != 0
        kept += tl.sum(((use & 1) != 0).to(tl.int64), 0)
        measured += tl.sum((runs & ((use & 1) != 0)).to(tl.int64), 0)
        in_kl += tl.sum((runs & ((use & 2) != 0)).to(tl.int64), 0)
        row = stats + 8 * i
        policy += tl.load(row, mask=inside, other=0.0)
        kl += tl.load(row + 1, mask=inside, other=0.0)
        entropy += tl.load(row + 2, mask=inside, other=0.0)
        ratio += tl.load(row + 3, mask=inside, other=0.0)
        estimate += tl.load(row + 4, mask=inside, other=0.0)
        low += tl.load(row + 5, mask=inside, other=0.0)
        high += tl.load(row + 6, mask=inside, other=0.0)
        most += tl.load(row + 7, mask=inside, other=0.0)
    late = 1.0
    if tokens.old_logprobs is None:
        if tokens.policy_norm is None:
            is_late = (tokens.log_threshold < float("inf")) & (tokens.policy_norm_value < 0)
            inverse = tl.where(kept > 0, tl.div_rn(1.0, tl.maximum(kept, 1).to(tl.float32)), 0.0)
            late = tl.where(is_late, inverse, 1.0)
    policy_sum = late * tl.sum(policy, 0).to(tl.float32)
    kl_sum = late * tl.sum(kl, 0).to(tl.float32)
    entropy_sum = late * tl.sum(entropy, 0).to(tl.float32)
    tl.store(counts, kept)
    tl.store(counts + 1, measured)
    tl.store(counts + 6, in_kl)
    tl.store(figures, policy_sum)
    tl.store(figures + 1, kl_sum)
    tl.store(figures + 2, entropy_sum)
    tl.store(figures + 3, total(low + high, kept))
    tl.store(figures + 4, total(low, kept))
    tl.store(figures + 5, total(high, kept))
    tl.store(figures + 6, total(most, kept))
    tl.store(figures + 7, total(ratio, measured))
    tl.store(figures + 8, total(estimate, in_kl))
    tl.store(figures + 9, late / tl.load(scales + 3))
    tl.store(loss, policy_sum + kl_sum + entropy_sum)


def policy_prepare(
    *,
    vocab: int,
    tokens: int,
    temperature_stride: int,
    strict: bool,
    scaled: bool,
    uses: Tensor,  # (N,)
    scales: Tensor,  # (4,)
    counts: Tensor,  # (7,)
    logprobs: Tensor,  # (N,)
    entropy: Tensor | None,  # (N,)
    stats: Tensor,  # (N, 8)
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
    *,
    tokens: int,
    uses: Tensor,
    scales: Tensor,
    counts: Tensor,
    stats: Tensor,
    loss: Tensor,
    figures: Tensor,  # (10,)
    **fields: Any,  # of `Tokens`; what the rows need
) -> None:
    """Fill loss, figures and the rest of counts: `policy_finish_cpu` on `PolicyLossArgs`."""
    with torch.cuda.device_of(counts):
        finish_kernel[(1,)](
            *(tokens, token_args(fields), uses, scales, counts, stats, loss, figures),
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
