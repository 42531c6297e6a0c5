"""Cutpoints to segments, and segment values to token advantages, in Triton.

Every kernel checks the offsets that it reads, so that no address is wrong, and raises a flag that
is read at the end, with the number of segments.
"""

# The parameters that kernels declare as tl.constexpr are given plain Python values.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spo_kernels.triton.configs import PER_ITEM, PER_SEQUENCE


@triton.jit
def starts_with_cutpoint(logprobs, log_threshold, begin, end):
    first = tl.load(logprobs + begin, mask=begin < end, other=float("inf"))
    return (first < log_threshold).to(tl.int64)


@triton.jit(do_not_specialize=["tokens", "seqs", "interval"])
def count_segments_kernel(
    logprobs,
    tokens,
    cu_seqlens,
    seqs,
    log_threshold,
    interval,
    counts,  # segments of every sequence, behind a zero
    malformed,
    BLOCK: tl.constexpr,
):
    """Boundaries of a sequence: its start, and cutpoints number 0, interval, 2 interval, ...

    The first cutpoint counts once if it is the start. Program 0 has no sequence.
    """
    seq = tl.program_id(0).to(tl.int64) - 1
    count = seq * 0
    if seq < 0:
        wrong = (tl.load(cu_seqlens) != 0) | (tl.load(cu_seqlens + seqs) != tokens)
    else:
        begin = tl.load(cu_seqlens + seq)
        end = tl.load(cu_seqlens + seq + 1)
        wrong = (begin < 0) | (begin > end) | (end > tokens)
        if wrong == 0:
            cutpoints = tl.zeros((BLOCK,), tl.int64)
            unknown = tl.zeros((BLOCK,), tl.int32)
            for first in range(begin, end, BLOCK):
                token = first + tl.arange(0, BLOCK)
                logprob = tl.load(logprobs + token, mask=token < end, other=float("inf"))
                unknown |= (logprob != logprob).to(tl.int32)
                cutpoints += (logprob < log_threshold).to(tl.int64)
            wrong = tl.max(unknown, 0) != 0
            starts = starts_with_cutpoint(logprobs, log_threshold, begin, end)
            count = (tl.sum(cutpoints, 0) + interval - 1) // interval - starts
            count += (begin < end).to(tl.int64)
    if wrong:
        tl.store(malformed, 1)
    tl.store(counts + seq + 1, count)


@triton.jit(do_not_specialize=["tokens", "seqs", "interval"])
def write_segments_kernel(
    logprobs,
    tokens,
    cu_seqlens,
    seqs,
    log_threshold,
    interval,
    cu_segments,
    cu_seq_segments,
    malformed,
    num_segments,  # -1 if the input is malformed
    BLOCK: tl.constexpr,
):
    """One program per sequence writes its boundaries; program 0 writes what stands behind all."""
    seq = tl.program_id(0).to(tl.int64) - 1
    well_formed = tl.load(malformed) == 0
    if seq < 0:
        last = tl.load(cu_seq_segments + seqs)
        tl.store(num_segments, tl.where(well_formed, last, -1))
        if well_formed:
            tl.store(cu_segments + last, tokens)
    elif well_formed:
        begin = tl.load(cu_seqlens + seq)
        end = tl.load(cu_seqlens + seq + 1)
        # Index of cutpoint number 0: after the boundary at the start, unless it is that boundary.
        lead = 1 - starts_with_cutpoint(logprobs, log_threshold, begin, end)
        boundaries = cu_segments + tl.load(cu_seq_segments + seq) + lead
        tl.store(boundaries - 1, begin, mask=(begin < end) & (lead == 1))
        passed = begin * 0  # cutpoints before the block
        for first in range(begin, end, BLOCK):
            token = first + tl.arange(0, BLOCK)
            logprob = tl.load(logprobs + token, mask=token < end, other=float("inf"))
            cut = (logprob < log_threshold).to(tl.int32)
            number = passed + tl.cumsum(cut, 0) - cut
            boundary = (cut != 0) & (number % interval == 0)
            tl.store(boundaries + number // interval, token, mask=boundary)
            passed += tl.sum(cut, 0)


@triton.jit
def decreases(offsets, count, total, i):
    """Whether offsets (count + 1,) break, at place i, the rule: from 0 to total, never less."""
    value = tl.load(offsets + i, mask=i <= count, other=0)
    after = tl.load(offsets + i + 1, mask=i < count, other=0)
    return (i < count) & (after < value) | (i == 0) & (value != 0) | (i == count) & (value != total)


@triton.jit
def count_up_to(offsets, count, value, BLOCK: tl.constexpr):
    """How many of the offsets (count,) are at most the value of every lane: binary search."""
    low = tl.zeros((BLOCK,), tl.int64)
    high = low + count
    while tl.max((low < high).to(tl.int32), 0) > 0:
        middle = (low + high) // 2
        searching = low < high
        passed = tl.load(offsets + middle, mask=searching, other=0) <= value
        low = tl.where(searching & passed, middle + 1, low)
        high = tl.where(searching & (passed == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["tokens", "segments", "seqs"])
def advance_tokens_kernel(
    values,
    cu_segments,
    segments,
    cu_seq_segments,
    seqs,
    advantages,
    tokens,
    malformed,
    BLOCK: tl.constexpr,
):
    """A lane per token does two short binary searches, whatever the lengths of the segments."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    wrong = decreases(cu_segments, segments, tokens, i)
    wrong |= decreases(cu_seq_segments, seqs, segments, i)
    tl.store(malformed + tl.zeros((BLOCK,), tl.int32), 1, mask=wrong)
    segment = count_up_to(cu_segments, segments + 1, i, BLOCK) - 1
    # Every sequence has one value more than segments.
    seq = count_up_to(cu_seq_segments, seqs + 1, segment, BLOCK) - 1
    inside = (i < tokens) & (segment >= 0) & (segment < segments) & (seq >= 0) & (seq < seqs)
    start = tl.load(values + segment + seq, mask=inside, other=0.0)
    end = tl.load(values + segment + seq + 1, mask=inside, other=0.0)
    tl.store(advantages + i, end - start, mask=inside)


def segments(
    *,
    tokens: int,
    seqs: int,
    logprobs: Tensor,  # (T,) fp32
    cu_seqlens: Tensor,  # (B+1,) int64
    log_threshold: float,
    interval: int,
    cu_segments: Tensor,  # (T+1,) int64
    cu_seq_segments: Tensor,  # (B+1,) int64
) -> int:
    """Fill the offsets: `segments_cpu` on `SegmentsArgs`. The number of segments, or -1."""
    with torch.cuda.device_of(logprobs):
        shared = (logprobs, tokens, cu_seqlens, seqs, log_threshold, interval)
        grid = (seqs + 1,)
        malformed = cu_seqlens.new_zeros(1, dtype=torch.int32)
        num_segments = cu_seqlens.new_empty(1)
        counts = torch.empty_like(cu_seqlens)
        count_segments_kernel[grid](*shared, counts, malformed, **PER_SEQUENCE)
        torch.cumsum(counts, 0, out=cu_seq_segments)
        write_segments_kernel[grid](
            *shared, cu_segments, cu_seq_segments, malformed, num_segments, **PER_SEQUENCE
        )
        return int(num_segments.item())  # the only wait for the device


def segment_advantages(
    *,
    tokens: int,
    segments: int,
    seqs: int,
    values: Tensor,  # (M+B,) fp32
    cu_segments: Tensor,  # (M+1,) int64
    cu_seq_segments: Tensor,  # (B+1,) int64
    advantages: Tensor,  # (T,) fp32
) -> bool:
    """Fill advantages: `segment_advantages_cpu`. False if the input is malformed."""
    with torch.cuda.device_of(values):
        items = max(tokens, segments + 1, seqs + 1)
        malformed = cu_segments.new_zeros(1, dtype=torch.int32)
        advance_tokens_kernel[(triton.cdiv(items, PER_ITEM["BLOCK"]),)](
            values,
            cu_segments,
            segments,
            cu_seq_segments,
            seqs,
            advantages,
            tokens,
            malformed,
            **PER_ITEM,
        )
        return malformed.item() == 0
