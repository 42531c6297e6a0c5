"""masked_ppo_loss in Triton: one program per row, which sweeps the row, forms the objective and
sweeps it again to write dlogits. Rows that carry no loss are never read.
"""

# The parameters that kernels declare as tl.constexpr are given plain Python values.
# What row_sums returns has no type that Python knows.
# pyright: reportArgumentType=false, reportOperatorIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from spo_kernels.triton.configs import aligned_alike, row_sweep
from spo_kernels.triton.objective import kl_term, policy_term, token_args
from spo_kernels.triton.softmax import LN2, LOG2E, expm1, row_start, row_sums, write_row, zero_row


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
    tokens,  # TokenArgs; kl_mask None: no KL term
    temperature_stride,
    logprobs,
    entropies,  # None: not wanted
    stats,
    DLOGITS_ZEROED: tl.constexpr,
    ALIKE: tl.constexpr,  # as in write_row
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = row_start(row, logits_block_rows, logits_block_stride, logits_row_stride)
    advantage = tl.load(tokens.advantages + row)
    # A zero advantage makes the policy term and its gradient 0: such a row needs no logprob.
    in_policy = (tl.load(tokens.policy_mask + row) != 0) & (advantage != 0)
    used = in_policy
    in_kl = row < 0  # False
    if tokens.kl_mask is not None:
        in_kl = tl.load(tokens.kl_mask + row) != 0
        used = in_policy | in_kl
    logprob = 0.0
    entropy = 0.0
    policy = 0.0
    kl = 0.0
    clipped = 0.0
    ratio = 0.0
    slope = 0.0
    row_max = 0.0
    row_sum = 1.0
    inv_temperature = 1.0
    token = -1
    if used:
        inv_temperature = tl.div_rn(1.0, tl.load(tokens.temperature + row * temperature_stride))
        id = tl.load(tokens.token_ids + row)
        known = (id >= 0) & (id < vocab)  # else NaN: in a CUDA graph Python cannot check ids
        token = tl.where(known, id, -1).to(tl.int32)
        # Before the sweeps: dlogits may be the logits.
        chosen = tl.load(logits + start + id, mask=known, other=float("nan")).to(tl.float32)
        scale = LOG2E * inv_temperature
        row_max, row_sum, weighted = row_sums(
            logits, start, vocab, scale, entropies is not None, BLOCK_V, STAGES
        )
        log_sum = tl.log(row_sum)
        logprob = (chosen - row_max) * inv_temperature - log_sum
        entropy = log_sum - LN2 * weighted / row_sum
        if in_policy:
            policy, clipped, ratio, slope = policy_term(logprob, row, tokens, advantage)
        if tokens.kl_mask is not None:
            if in_kl:
                kl, kl_slope = kl_term(logprob, row, tokens)
                slope += kl_slope
    tl.store(logprobs + row, logprob)
    if entropies is not None:
        tl.store(entropies + row, entropy)
    tl.store(stats + 4 * row, policy)
    tl.store(stats + 4 * row + 1, kl)
    tl.store(stats + 4 * row + 2, clipped)
    tl.store(stats + 4 * row + 3, ratio)
    if dlogits is not None:
        out_start = row_start(row, dlogits_block_rows, dlogits_block_stride, dlogits_row_stride)
        if slope != 0:
            g = slope * inv_temperature
            # 1 - p of the token itself; 1 - exp(logprob) would cancel.
            own = -g * expm1(logprob)
            write_row(
                logits,
                start,
                dlogits,
                out_start,
                vocab,
                row_max,
                LOG2E * inv_temperature,
                -g / row_sum,
                0.0,
                token,
                own,
                False,
                ALIKE,
                BLOCK_V,
                STAGES,
            )
        elif not DLOGITS_ZEROED:
            zero_row(dlogits, out_start, vocab, BLOCK_V)


def policy_loss(
    *,
    rows: int,
    vocab: int,
    dtype: int,  # for native code, as dlogits_dtype: the tensors know theirs
    logits: Tensor,  # (..., V)
    logits_layout: tuple[int, int, int],
    dlogits: Tensor | None,  # as in logprobs_backward; None: forward only
    dlogits_layout: tuple[int, int, int] = (1, 0, 0),
    dlogits_dtype: int = 0,
    dlogits_zeroed: bool,
    temperature_stride: int,
    logprobs: Tensor,  # (N,)
    entropy: Tensor | None,  # (N,)
    stats: Tensor,  # (N, 4)
    **fields: Any,  # of `Tokens`
) -> None:
    """Fill logprobs, entropy, stats and dlogits: `policy_loss_cpu` on `PolicyLossArgs`."""
    with torch.cuda.device_of(logits):
        policy_loss_kernel[(rows,)](
            logits,
            *logits_layout,
            dlogits,
            *dlogits_layout,
            vocab,
            token_args(**fields),
            temperature_stride,
            logprobs,
            entropy,
            stats,
            DLOGITS_ZEROED=dlogits_zeroed,
            ALIKE=aligned_alike(logits_layout, dlogits_layout),
            **row_sweep(vocab),
        )
