"""Segments of sampled sequences: where they start, and their values as token advantages.

SPO-chain cuts a trajectory at cutpoints, the tokens its policy was unsure of, and values the states
there (arXiv 2505.23564). Sequences are packed: `cu_seqlens` holds their offsets in tokens,
`cu_segments` the offsets of the segments. Nothing here is differentiable: results never carry a
gradient, whatever the inputs carry.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from spo_kernels.arguments import FLOATS, INTEGERS, check_offsets, check_vector
from spo_kernels.dispatch import choose, launch
from spo_kernels.library import define


def cutpoint_segments_ref(
    logprobs: Tensor,  # (T,) fp32 | fp64
    cu_seqlens: Tensor,  # (B+1,) int64
    prob_threshold: float,
    interval: int,
) -> tuple[Tensor, Tensor]:  # cu_segments (M+1,) int64, cu_seq_segments (B+1,) int64
    """`cutpoint_segments` in PyTorch: cumulative counts over the packed tokens."""
    check_offsets("cu_seqlens", cu_seqlens, logprobs.numel())
    if unknown := logprobs.isnan().nonzero().flatten().tolist():
        raise ValueError(f"logprobs: expected no NaN, found NaN at {unknown[0]}")
    cutpoints = logprobs < math.log(prob_threshold)
    lengths, starts = cu_seqlens.diff(), cu_seqlens[:-1]
    passed = F.pad(cutpoints.cumsum(0), (1, 0))  # (T+1,) cutpoints before every token
    in_sequence = passed[:-1] - passed[starts].repeat_interleave(lengths)
    boundary = cutpoints & (in_sequence % interval == 0)
    boundary[starts[lengths > 0]] = True
    cu_segments = torch.cat([boundary.nonzero().squeeze(1), cu_seqlens[-1:]])
    return cu_segments, F.pad(boundary.cumsum(0), (1, 0))[cu_seqlens]


def segment_advantages_ref(
    values: Tensor,  # (M+B,) fp32 | fp64
    cu_segments: Tensor,  # (M+1,) int64
    cu_seq_segments: Tensor,  # (B+1,) int64
    num_tokens: int,
) -> Tensor:  # (T,) dtype of values
    """`segment_advantages` in PyTorch."""
    num_segments = cu_segments.numel() - 1
    check_offsets("cu_segments", cu_segments, num_tokens)
    check_offsets("cu_seq_segments", cu_seq_segments, num_segments)
    # Sequence b has one value more than segments, so b values more than segments lie before it.
    sequences = torch.arange(cu_seq_segments.numel() - 1, device=values.device)
    starts = torch.arange(num_segments, device=values.device)
    starts = starts + sequences.repeat_interleave(cu_seq_segments.diff())
    return (values[starts + 1] - values[starts]).repeat_interleave(cu_segments.diff())


@define(
    "cutpoint_segments(Tensor logprobs, Tensor cu_seqlens, float prob_threshold, int interval, "
    "str backend) -> (Tensor cu_segments, Tensor cu_seq_segments)"
)
def _cutpoint_segments(
    logprobs: Tensor, cu_seqlens: Tensor, prob_threshold: float, interval: int, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return cutpoint_segments_ref(logprobs, cu_seqlens, prob_threshold, interval)
    if logprobs.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "cutpoint_segments: the number of segments depends on the data, so it cannot be "
            "captured in a CUDA graph; call it before the capture"
        )
    logprobs, cu_seqlens = logprobs.contiguous(), cu_seqlens.contiguous()
    num_tokens = logprobs.numel()
    # Large enough for a boundary before every token; pages that are not written cost no memory.
    cu_segments = cu_seqlens.new_empty(num_tokens + 1)
    cu_seq_segments = torch.empty_like(cu_seqlens)
    num_segments = launch(
        "segments",
        backend,
        "SegmentsArgs",
        tokens=num_tokens,
        seqs=cu_seqlens.numel() - 1,
        logprobs=logprobs,
        cu_seqlens=cu_seqlens,
        log_threshold=math.log(prob_threshold),
        interval=interval,
        cu_segments=cu_segments,
        cu_seq_segments=cu_seq_segments,
    )
    if num_segments < 0:  # malformed: the reference raises the error
        return cutpoint_segments_ref(logprobs, cu_seqlens, prob_threshold, interval)
    return cu_segments[: num_segments + 1].clone(), cu_seq_segments


@_cutpoint_segments.register_fake
def _(logprobs, cu_seqlens, prob_threshold, interval, backend):
    num_offsets = torch.library.get_ctx().new_dynamic_size(min=1)
    return cu_seqlens.new_empty(num_offsets), torch.empty_like(cu_seqlens)


@define(
    "segment_advantages(Tensor values, Tensor cu_segments, Tensor cu_seq_segments, "
    "SymInt num_tokens, str backend) -> Tensor"
)
def _segment_advantages(
    values: Tensor, cu_segments: Tensor, cu_seq_segments: Tensor, num_tokens: int, backend: str
) -> Tensor:
    # Here and not in the public function: under torch.compile M is known when the op runs.
    boundaries = cu_segments.numel() + cu_seq_segments.numel() - 2
    if values.numel() != boundaries:
        raise ValueError(f"values: expected M + B = {boundaries} entries, found {values.numel()}")
    if backend == "reference":
        return segment_advantages_ref(values, cu_segments, cu_seq_segments, num_tokens)
    values = values.contiguous()
    cu_segments, cu_seq_segments = cu_segments.contiguous(), cu_seq_segments.contiguous()
    advantages = values.new_empty(num_tokens)
    ok = launch(
        "segment_advantages",
        backend,
        "SegmentAdvantagesArgs",
        tokens=num_tokens,
        segments=cu_segments.numel() - 1,
        seqs=cu_seq_segments.numel() - 1,
        values=values,
        cu_segments=cu_segments,
        cu_seq_segments=cu_seq_segments,
        advantages=advantages,
    )
    if not ok:  # malformed: the reference raises the error
        return segment_advantages_ref(values, cu_segments, cu_seq_segments, num_tokens)
    return advantages


@_segment_advantages.register_fake
def _(values, cu_segments, cu_seq_segments, num_tokens, backend):
    return values.new_empty(num_tokens)


def cutpoint_segments(
    logprobs: Tensor,  # (T,) fp32 | fp64, of the sampled tokens under the sampling policy
    cu_seqlens: Tensor,  # (B+1,) int32 | int64, token offsets of the sequences
    prob_threshold: float = 0.9,
    interval: int = 5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # cu_segments (M+1,) int64, cu_seq_segments (B+1,) int64
    """Cut every sequence into segments of `interval` cutpoints each.

    Token t is a cutpoint if logprobs[t] < log(prob_threshold), compared at the dtype of `logprobs`.
    A boundary stands before the cutpoints number 1, 1 + interval, 1 + 2 * interval, ... of a
    sequence, and at its start. So the tokens before the first cutpoint are a segment of their own,
    the only one without a cutpoint; if the first token is a cutpoint there is no such segment. The
    last segment may hold fewer cutpoints. An empty sequence has no segments.

    Segment m holds the tokens cu_segments[m]:cu_segments[m+1], counted over the whole pack, and
    sequence b the segments cu_seq_segments[b]:cu_seq_segments[b+1].

    Raises TypeError for wrong dtypes; ValueError if a logprob is NaN, if `cu_seqlens` decreases or
    does not run from 0 to T, if prob_threshold is not in (0, 1], or if interval is not positive;
    RuntimeError while a CUDA graph is captured, as M depends on the data.
    """
    check_vector("logprobs", logprobs, FLOATS)
    check_vector("cu_seqlens", cu_seqlens, INTEGERS, like=logprobs, at_least=1)
    if not 0 < prob_threshold <= 1:
        raise ValueError(f"prob_threshold: expected (0, 1], found {prob_threshold}")
    if interval < 1:
        raise ValueError(f"interval: expected a positive number of cutpoints, found {interval}")
    backend = choose("segments", logprobs, backend)
    logprobs, cu_seqlens = logprobs.detach(), cu_seqlens.long()
    return torch.ops.spo_kernels.cutpoint_segments(
        logprobs, cu_seqlens, prob_threshold, interval, backend
    )


def segment_advantages(
    values: Tensor,  # (M+B,) fp32 | fp64, of every segment start and every end of a sequence
    cu_segments: Tensor,  # (M+1,) int32 | int64, token offsets of the segments
    cu_seq_segments: Tensor,  # (B+1,) int32 | int64, segment offsets of the sequences
    num_tokens: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:  # (T,) dtype of values
    """Advantage of every token: V(end) - V(start) of its segment.

    A sequence of m segments has m + 1 consecutive entries of `values`; an empty sequence has 1.
    `num_tokens` is T. Without it T is read from `cu_segments`, which waits for the device and
    cannot be captured by torch.compile. Raises TypeError for wrong dtypes, ValueError if sizes or
    offsets do not agree; in a CUDA graph the kernel gives NaN for such offsets.
    """
    check_vector("values", values, FLOATS)
    check_vector("cu_segments", cu_segments, INTEGERS, like=values, at_least=1)
    check_vector("cu_seq_segments", cu_seq_segments, INTEGERS, like=values, at_least=1)
    backend = choose("segments", values, backend)
    if num_tokens is None:
        num_tokens = int(cu_segments[-1])
    if num_tokens < 0:
        raise ValueError(f"num_tokens: expected 0 or more, found {num_tokens}")
    return torch.ops.spo_kernels.segment_advantages(
        values.detach(), cu_segments.long(), cu_seq_segments.long(), num_tokens, backend
    )
