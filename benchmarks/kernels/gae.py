"""Generalised advantage estimation on packed sequences, against the loop over time of trainers.

    python -m benchmarks.kernels.gae [--device cuda] [--quick] [--json FILE] [--csv FILE]

Byte model: rewards and values read, advantages and returns written, 16 bytes a token; the floor is
a copy of as many bytes. The rival is a trainer's: one step a column of padded (B, L) tensors; with
padding and packing where its data are packed as ours are, without where they are padded anyway.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Call, Row, Shape, against_copy, check_close
from benchmarks.kernels.packed import Case, cases, pack_of, random
from spo_kernels import gae

GAMMA, LAM = 0.99, 0.95
BYTES = 16
OURS = "spo_kernels"


def loop(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(B, L) twice, zero behind the end -> advantages (B, L), returns (B, L); last column first."""
    last = after = torch.zeros_like(rewards[:, 0])
    advantages = torch.empty_like(rewards)
    for t in range(rewards.shape[1] - 1, -1, -1):
        last = rewards[:, t] + GAMMA * after - values[:, t] + GAMMA * LAM * last
        after = values[:, t]
        advantages[:, t] = last
    return advantages, advantages + values


def implementations(case: Case, device: str) -> dict[str, Call]:
    """Checked ways to the packed results; the padded rival's are packed for the check alone."""
    pack = pack_of(case, device)
    rewards, values = random(case, device, 2)
    padded = pack.pad(rewards), pack.pad(values)

    def packed(results: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        return tuple(x[pack.inside] for x in results)

    ours = functools.partial(gae, rewards, values, pack.cu_seqlens, gamma=GAMMA, lam=LAM)
    calls = {
        "PyTorch loop, pad and pack": Call(
            lambda: packed(loop(pack.pad(rewards), pack.pad(values))), "base"
        ),
        OURS: Call(ours, "ours", "spo-kernels"),
    }
    exact = gae(rewards.double(), values.double(), pack.cu_seqlens, gamma=GAMMA, lam=LAM)
    check_close(calls, exact)
    calls["PyTorch loop, data padded anyway"] = Call(lambda: loop(*padded), "fair")
    check_close({"PyTorch loop": Call(lambda: packed(loop(*padded)), "fair")}, exact)
    return calls


def run(case: Case, args: argparse.Namespace) -> tuple[Shape, list[Row]]:
    calls = implementations(case, args.device)
    return against_copy("gae", case, BYTES * case.tokens, calls, args)


def main(argv: Sequence[str] | None = None) -> None:
    common.main(__doc__, cases, run, argv)


if __name__ == "__main__":
    main()
