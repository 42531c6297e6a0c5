"""masked_ppo_loss in Triton: one program per row, which sweeps the row, forms the objective and
sweeps it again to write dlogits. Rows that carry no loss are never read.
"""

# The parameters that kernels declare as tl.constexpr are given plain Python values.
# What row_sums returns has no type that Python knows.
# pyright: reportArgumentType=false, reportOperatorIssue=false
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spo_kernels.rows import scaling
from spo_kernels.triton.configs import aligned_alike, row_sweep
from spo_kernels.triton.objective import importance_ratio, kl_term, policy_term, token_args
from spo_kernels.triton.prepare import policy_finish, policy_prepare
from spo_kernels.triton.softmax import (
    LN2,
    LOG2E,
    capped,
    expm1,
    row_start,
    row_sums,
    write_row,
    zero_row,
)


@triton.jit
def policy_loss_kernel(
    logits,
    logits_block_rows,
    logits_block_stride,
    logits_row_stride,
    dlogits,  # None: forward only
    dlogits_block_rows,
    dlogits_block_stride,
    dlogits_row_stride,
    vocab,
    num_tokens,
    tokens,  # TokenArgs
    temperature_stride,
    divisor,  # of the temperature
    tanh_scale,  # None: no cap
    uses,
    scales,
    counts,
    index,  # None: row i belongs to token i
    logprobs,
    entropies,  # None: not wanted
    stats,
    STRICT: tl.constexpr,  # after bad input no row is touched
    DLOGITS_ZEROED: tl.constexpr,
    SLOPED: tl.constexpr,  # the loss has an entropy term
    ALIKE: tl.constexpr,  # as in write_row
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row_start(row, logits_block_rows, logits_block_stride, logits_row_stride)
    token = row
    if index is not None:
        token = tl.load(index + row)
    exists = token < num_tokens  # else there are fewer tokens than rows
    run = True
    if STRICT:
        run = tl.load(counts + 3) == 0
    exists = exists & run
    use = tl.load(uses + token, mask=exists, other=0)
    logprob = float("nan")
    entropy = float("nan")
    policy = 0.0
    kl = 0.0
    entropy_term = 0.0
    estimate = 0.0
    low = 0.0
    high = 0.0
    most = 0.0
    ratio = 0.0
    g = 0.0
    h = 0.0
    row_max = 0.0
    row_sum = 1.0
    log_sum = 0.0
    inv_temperature = 1.0
    column = -1
    if (use & 8) != 0:
        if tokens.temperature is not None:
            heat = tl.load(tokens.temperature + token * temperature_stride)
        else:
            heat = tokens.temperature_value
        inv_temperature = tl.div_rn(1.0, tl.div_rn(heat, divisor))
        id = tl.load(tokens.token_ids + token).to(tl.int64)
        # Else NaN: in a CUDA graph Python cannot check ids and hidden states.
        known = (id >= 0) & (id < vocab) & ((use & 4) == 0)
        column = tl.where(known, id, -1).to(tl.int32)
        # Before the sweeps: dlogits may be the logits.
        chosen = tl.load(logits + start + id, mask=known, other=float("nan"))
        chosen, _ = capped(chosen, tanh_scale)
        scale = LOG2E * inv_temperature
        row_max, row_sum, weighted = row_sums(
            logits, start, vocab, scale, entropies is not None, BLOCK_V, STAGES, tanh_scale
        )
        log_sum = tl.log(row_sum)
        logprob = (chosen - row_max) * inv_temperature - log_sum
        entropy = log_sum - LN2 * weighted / row_sum
        if tokens.old_logprobs is None:  # the probability mask is that of this pass
            if logprob >= tokens.log_threshold:
                if tokens.kl_scope == 1:
                    use = use & 254
                else:
                    use = use & 252
            tl.store(uses + token, use)
        full_ratio, ratio_slope = importance_ratio(logprob, token, tokens)
        if (use & 1) != 0:
            ratio = full_ratio
            advantage = tl.load(tokens.advantages + token)
            policy, low, high, most, g = policy_term(
                ratio, ratio_slope, token, tokens, advantage, tl.load(scales)
            )
            if SLOPED:
                h = -tl.load(scales + 2)
                entropy_term = h * entropy
        if tokens.kl_estimator != 0:
            if (use & 2) != 0:
                kl, estimate, kl_slope = kl_term(
                    logprob, full_ratio, ratio_slope, token, tokens, tl.load(scales + 1)
                )
                g += kl_slope
    tl.store(logprobs + token, logprob, mask=exists)
    if entropies is not None:
        tl.store(entropies + token, entropy, mask=exists)
    row_stats = stats + 8 * token
    tl.store(row_stats, policy, mask=exists)
    tl.store(row_stats + 1, kl, mask=exists)
    tl.store(row_stats + 2, entropy_term, mask=exists)
    tl.store(row_stats + 3, ratio, mask=exists)
    tl.store(row_stats + 4, estimate, mask=exists)
    tl.store(row_stats + 5, low, mask=exists)
    tl.store(row_stats + 6, high, mask=exists)
    tl.store(row_stats + 7, most, mask=exists)
    if dlogits is not None:
        out_start = row_start(row, dlogits_block_rows, dlogits_block_stride, dlogits_row_stride)
        if (g != 0) | (h != 0):
            power = inv_temperature * tl.load(scales + 3)
            g *= power
            h *= power
            # 1 - p of the token itself; 1 - exp(logprob) would cancel.
            own = -g * expm1(logprob)
            factor = -g / row_sum
            slope = 0.0
            if SLOPED:
                factor -= h * (entropy - log_sum) / row_sum
                slope = -h * LN2 / row_sum
                p_log_p = tl.exp(logprob) * (logprob + entropy)
                own -= h * tl.where(logprob == float("-inf"), 0.0, p_log_p)
            write_row(
                logits,
                start,
                dlogits,
                out_start,
                vocab,
                row_max,
                LOG2E * inv_temperature,
                factor,
                slope,
                column,
                own,
                SLOPED,
                ALIKE,
                BLOCK_V,
                STAGES,
                tanh_scale,
            )
        elif run & (not DLOGITS_ZEROED):
            zero_row(dlogits, out_start, vocab, BLOCK_V)


def policy_loss(
    *,
    rows: int,
    vocab: int,
    tokens: int,
    logits: Tensor,  # (..., V)
    logits_layout: tuple[int, int, int],
    dlogits: Tensor | None,  # as in logprobs_backward; None: forward only
    dlogits_layout: tuple[int, int, int] = (1, 0, 0),
    dlogits_zeroed: bool = False,
    index: Tensor | None = None,  # (rows,)
    strict: bool,
    temperature_stride: int,
    uses: Tensor,  # (N,)
    scales: Tensor,  # (4,)
    counts: Tensor,  # (7,)
    logprobs: Tensor,  # (N,)
    entropy: Tensor | None,  # (N,)
    stats: Tensor,  # (N, 8)
    **fields: Any,  # of `Tokens`; dtypes and sizes for native code
) -> None:
    """Fill logprobs, entropy, stats and dlogits: `policy_loss_cpu` on `PolicyLossArgs`."""
    if rows == 0:
        return
    cap = fields["logit_softcap"]
    divisor, tanh_scale = scaling(fields["logit_scale"], cap if cap < math.inf else None)
    with torch.cuda.device_of(logits):
        policy_loss_kernel[(rows,)](
            logits,
            *logits_layout,
            dlogits,
            *dlogits_layout,
            vocab,
            tokens,
            token_args(fields),
            temperature_stride,
            divisor,
            tanh_scale or None,
            uses,
            scales,
            counts,
            index,
            logprobs,
            entropy,
            stats,
            STRICT=strict,
            DLOGITS_ZEROED=dlogits_zeroed,
            SLOPED=fields["entropy_coef"] != 0,
            ALIKE=aligned_alike(logits_layout, dlogits_layout),
            **row_sweep(vocab, capped=tanh_scale != 0),
        )


def policy_step(**fields: Any) -> None:
    """All three phases: `policy_step_cpu` on `PolicyLossArgs`."""
    policy_prepare(**fields)
    policy_loss(**fields)
    policy_finish(**fields)
