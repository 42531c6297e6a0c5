"""Pinned launch constants: the first call of a training run must not stop to search for them."""

from __future__ import annotations

import torch

MAX_BLOCK_V = 16384  # 1024 threads: one program fills an SM, so few rows are in flight
ELEMENTS_PER_THREAD = 16  # bf16: two loads of 16 bytes in flight; fp32: four
STAGES = 1  # more of them prefetch blocks to shared memory
FUSED = {"enable_fp_fusion": True}  # Triton 3.10 changes the default
PER_ITEM = {"BLOCK": 512, "num_warps": 4, **FUSED}  # one lane per node or token
PER_SEQUENCE = {"BLOCK": 1024, "num_warps": 4, **FUSED}  # one program per sequence


def _warp_size() -> int:
    return 64 if torch.version.hip else 32


def child_sums(warp_size: int | None = None) -> dict[str, int | bool]:
    """Constants of a kernel whose lanes sum the children of a node each.

    A program is one warp, as its lanes wait for the one with the most children or the longest
    climb. Eight children at a time hide the latency of their loads; the trees of rollouts have few
    more.
    """
    return {"BLOCK": warp_size or _warp_size(), "WIDTH": 8, "num_warps": 1, **FUSED}


def row_sweep(
    vocab: int, warp_size: int | None = None, capped: bool = False
) -> dict[str, int | bool]:
    """Constants of a kernel that runs one program per row of `vocab` logits.

    A soft cap takes registers, so a thread has half as many elements at a time; else ptxas spills.

    A row is read twice, and the second read should hit the L2 cache. The cache holds all rows in
    flight only if each SM works on one: 132 rows of 151936 bf16 logits are 40 of an H100's 50 MB.
    """
    warp_size = warp_size or _warp_size()
    most = MAX_BLOCK_V // 2 if capped else MAX_BLOCK_V
    elements = ELEMENTS_PER_THREAD // 2 if capped else ELEMENTS_PER_THREAD
    block = max(256, min(most, 1 << (vocab - 1).bit_length()))
    constants = {
        "BLOCK_V": block,
        "STAGES": STAGES,
        "num_warps": max(1, block // (elements * warp_size)),
        **FUSED,
    }
    if warp_size == 32:  # else ptxas spills a value to get by with 32 registers, for sm_100
        constants["maxnreg"] = 64
    return constants


def aligned_alike(a: tuple[int, int, int], b: tuple[int, int, int]) -> bool:
    """Whether each row of layout `a` starts, modulo 8 elements, where that of layout `b` does."""
    return a == b or all(stride % 8 == 0 for stride in (*a[1:], *b[1:]))
