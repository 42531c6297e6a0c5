"""token_logprobs in Triton: one program per row; a sweep forward, a sweep backward."""

# The parameters that kernels declare as tl.constexpr are given plain Python values.
# pyright: reportArgumentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spo_kernels.triton.configs import aligned_alike, row_sweep
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
def logprobs_kernel(
    logits,
    block_rows,
    block_stride,
    row_stride,
    vocab,
    token_ids,
    mask,  # None: all rows
    temperature,
    temperature_stride,
    tanh_scale,  # None: no cap
    logprobs,
    entropies,  # None: not wanted
    row_maxes,
    row_logsums,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    kept = row >= 0
    if mask is not None:
        kept = tl.load(mask + row) != 0
    logprob = 0.0
    entropy = 0.0
    if kept:
        start = row_start(row, block_rows, block_stride, row_stride)
        inv_temperature = tl.div_rn(1.0, tl.load(temperature + row * temperature_stride))
        id = tl.load(token_ids + row)
        known = (id >= 0) & (id < vocab)  # else NaN: in a CUDA graph Python cannot check ids
        chosen = tl.load(logits + start + id, mask=known, other=float("nan"))
        chosen, _ = capped(chosen, tanh_scale)
        row_max, row_sum, weighted = row_sums(
            logits,
            start,
            vocab,
            LOG2E * inv_temperature,
            entropies is not None,
            BLOCK_V,
            STAGES,
            tanh_scale,
        )
        log_sum = tl.log(row_sum)
        logprob = (chosen - row_max) * inv_temperature - log_sum
        entropy = log_sum - LN2 * weighted / row_sum
        tl.store(row_maxes + row, row_max)
        tl.store(row_logsums + row, log_sum)
    tl.store(logprobs + row, logprob)
    if entropies is not None:
        tl.store(entropies + row, entropy)


@triton.jit
def logprobs_backward_kernel(
    logits,
    block_rows,
    block_stride,
    row_stride,
    dlogits,
    dlogits_block_rows,
    dlogits_block_stride,
    dlogits_row_stride,
    vocab,
    token_ids,
    mask,  # None: all rows
    temperature,
    temperature_stride,
    tanh_scale,  # None: no cap
    logprobs,
    entropies,
    row_maxes,
    row_logsums,
    grad_logprobs,
    grad_entropy,  # None: zero
    ALIKE: tl.constexpr,  # as in write_row
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dlogits_j = g (1[j = token] - p_j) - h p_j (log p_j + H), g and h divided by temperature.

    Under a cap these are the derivatives by y, and `write_row` makes them those by the logits.
    """
    row = tl.program_id(0).to(tl.int64)
    out_start = row_start(row, dlogits_block_rows, dlogits_block_stride, dlogits_row_stride)
    kept = row >= 0
    if mask is not None:
        kept = tl.load(mask + row) != 0
    g = 0.0
    h = 0.0
    inv_temperature = 1.0
    if kept:
        inv_temperature = tl.div_rn(1.0, tl.load(temperature + row * temperature_stride))
        g = tl.load(grad_logprobs + row) * inv_temperature
        if grad_entropy is not None:
            h = tl.load(grad_entropy + row) * inv_temperature
    if (g != 0) | (h != 0):
        start = row_start(row, block_rows, block_stride, row_stride)
        id = tl.load(token_ids + row)
        token = tl.where((id >= 0) & (id < vocab), id, -1).to(tl.int32)
        scale = LOG2E * inv_temperature
        row_max = tl.load(row_maxes + row)
        log_sum = tl.load(row_logsums + row)
        logprob = tl.load(logprobs + row)
        inv_sum = tl.exp(-log_sum)
        own = -g * expm1(logprob)
        factor = -g * inv_sum
        slope = 0.0
        if grad_entropy is not None:
            entropy = tl.load(entropies + row)
            p_log_p = tl.where(logprob == float("-inf"), 0.0, tl.exp(logprob) * (logprob + entropy))
            own -= h * p_log_p
            factor -= h * (entropy - log_sum) * inv_sum
            slope = -h * inv_sum * LN2
        write_row(
            logits,
            start,
            dlogits,
            out_start,
            vocab,
            row_max,
            scale,
            factor,
            slope,
            token,
            own,
            grad_entropy is not None,
            ALIKE,
            BLOCK_V,
            STAGES,
            tanh_scale,
        )
    else:
        zero_row(dlogits, out_start, vocab, BLOCK_V)


def logprobs(
    *,
    rows: int,
    vocab: int,
    dtype: int,  # for native code; the tensors know theirs
    logits: Tensor,  # (..., V)
    logits_layout: tuple[int, int, int],
    token_ids: Tensor,  # (N,) int64
    mask: Tensor | None = None,  # (N,) bool, None: all rows
    temperature: Tensor,  # (N,) or (1,)
    temperature_stride: int,
    tanh_scale: float = 0.0,  # 0: no cap
    logprobs: Tensor,  # (N,)
    entropy: Tensor | None,  # (N,)
    row_max: Tensor,  # (N,)
    row_logsum: Tensor,  # (N,)
) -> None:
    """Fill logprobs, entropy, row_max and row_logsum: `logprobs_cpu` on `LogprobsArgs`."""
    with torch.cuda.device_of(logits):
        logprobs_kernel[(rows,)](
            logits,
            *logits_layout,
            vocab,
            token_ids,
            mask,
            temperature,
            temperature_stride,
            tanh_scale or None,
            logprobs,
            entropy,
            row_max,
            row_logsum,
            **row_sweep(vocab),
        )


def logprobs_backward(
    *,
    rows: int,
    vocab: int,
    dtype: int,  # for native code, as dlogits_dtype: the tensors know theirs
    logits: Tensor,  # (..., V)
    logits_layout: tuple[int, int, int],
    dlogits: Tensor,  # (..., V), may be logits itself, or bf16 where they are fp32
    dlogits_layout: tuple[int, int, int],
    dlogits_dtype: int,
    token_ids: Tensor,  # (N,) int64
    mask: Tensor | None = None,  # (N,) bool, None: all rows
    temperature: Tensor,  # (N,) or (1,)
    temperature_stride: int,
    tanh_scale: float = 0.0,  # 0: no cap
    logprobs: Tensor,  # (N,) of the forward, as the next three
    entropy: Tensor | None,
    row_max: Tensor,
    row_logsum: Tensor,
    grad_logprobs: Tensor,  # (N,)
    grad_entropy: Tensor | None,  # (N,), None: zero
) -> None:
    """Fill dlogits: `logprobs_backward_cpu` on `LogprobsArgs`."""
    with torch.cuda.device_of(logits):
        logprobs_backward_kernel[(rows,)](
            logits,
            *logits_layout,
            dlogits,
            *dlogits_layout,
            vocab,
            token_ids,
            mask,
            temperature,
            temperature_stride,
            tanh_scale or None,
            logprobs,
            entropy,
            row_max,
            row_logsum,
            grad_logprobs,
            grad_entropy,
            ALIKE=aligned_alike(logits_layout, dlogits_layout),
            **row_sweep(vocab),
        )
