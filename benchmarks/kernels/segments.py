"""Cutpoint segments and their tokens' advantages, against PyTorch.

    python -m benchmarks.kernels.segments [--device cuda] [--quick] [--json FILE] [--csv FILE]

Byte model: 4 bytes a token are read to cut, 4 are written as advantages; offsets and values of
segments are few. The floor is a copy of as many bytes. Rivals: whole-tensor PyTorch, and the loop
over sequences that a trainer writes first.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Call, Row, Shape, against_copy, check_close
from benchmarks.kernels.packed import Case, cases, pack_of, random
from spo_kernels import cutpoint_segments, segment_advantages

RHO, INTERVAL = 0.9, 5
BYTES = 8
OURS = "spo_kernels"
Cut = tuple[Tensor, Tensor]  # cu_segments (M+1,), cu_seq_segments (B+1,)


def whole_tensors(logprobs: Tensor, cu_seqlens: Tensor) -> Cut:
    """Cumulative counts of cutpoints, then a boundary before every INTERVAL-th."""
    cutpoints = logprobs < math.log(RHO)
    passed = torch.nn.functional.pad(cutpoints.cumsum(0), (1, 0))
    before = passed[:-1] - passed[cu_seqlens[:-1]].repeat_interleave(cu_seqlens.diff())
    boundary = cutpoints & (before % INTERVAL == 0)
    boundary[cu_seqlens[:-1]] = True
    starts = boundary.nonzero()[:, 0]
    ends = torch.cat([starts, cu_seqlens[-1:]])
    return ends, torch.searchsorted(starts, cu_seqlens)


def sequence_loop(logprobs: Tensor, offsets: list[int]) -> Cut:
    """One sequence after the other."""
    starts, counts = [], [0]
    for begin, end in zip(offsets[:-1], offsets[1:], strict=True):
        cutpoints = (logprobs[begin:end] < math.log(RHO)).nonzero()[:, 0][::INTERVAL]
        if not len(cutpoints) or cutpoints[0] != 0:
            cutpoints = torch.nn.functional.pad(cutpoints, (1, 0))
        starts.append(cutpoints + begin)
        counts.append(counts[-1] + len(cutpoints))
    cu_segments = torch.cat([*starts, starts[0].new_tensor(offsets[-1:])])
    return cu_segments, cu_segments.new_tensor(counts)


def spread(values: Tensor, cut: Cut) -> Tensor:
    """V(end) - V(start) of every segment on each of its tokens; `values` (M + B,)."""
    cu_segments, counts = cut
    sequence = torch.arange(len(counts) - 1, device=values.device).repeat_interleave(counts.diff())
    starts = torch.arange(len(sequence), device=values.device) + sequence
    return (values[starts + 1] - values[starts]).repeat_interleave(cu_segments.diff())


def implementations(case: Case, device: str) -> dict[str, Call]:
    """Checked ways from logprobs to boundaries and advantages."""
    cu_seqlens = pack_of(case, device).cu_seqlens
    offsets = cu_seqlens.tolist()
    logprobs = -random(case, device, 1)[0].abs().pow(4)  # a good half above log(RHO)
    num_segments = len(whole_tensors(logprobs, cu_seqlens)[0]) - 1
    values = torch.rand(num_segments + len(offsets) - 1, device=device)

    def ours() -> tuple[Tensor, ...]:
        cut = cutpoint_segments(logprobs, cu_seqlens, RHO, INTERVAL)
        return *cut, segment_advantages(values, *cut, case.tokens)

    def rival(cut: Cut) -> tuple[Tensor, ...]:
        return *cut, spread(values, cut)

    calls = {
        "PyTorch, whole tensors": Call(lambda: rival(whole_tensors(logprobs, cu_seqlens)), "base"),
        "PyTorch, loop over sequences": Call(
            lambda: rival(sequence_loop(logprobs, offsets)), "rival"
        ),
        OURS: Call(ours, "ours", "spo-kernels"),
    }
    exact = cutpoint_segments(logprobs, cu_seqlens, RHO, INTERVAL, backend="reference")
    check_close(calls, (*exact, segment_advantages(values.double(), *exact, backend="reference")))
    return calls


def run(case: Case, args: argparse.Namespace) -> tuple[Shape, list[Row]]:
    calls = implementations(case, args.device)
    return against_copy("segments", case, BYTES * case.tokens, calls, args)


def main(argv: Sequence[str] | None = None) -> None:
    common.main(__doc__, cases, run, argv)


if __name__ == "__main__":
    main()
