"""bf16 matrices on the CPU: whether PyTorch multiplies them fast, and products with fp32 results.

PyTorch has no product of bf16 matrices with an fp32 result on the CPU. There are two ways to it:
the kernel of csrc/cpu/matmul.cpp, for AVX512_BF16, and oneDNN's fp32 product of widened operands
while it is told to round them to bf16, which loses nothing. The second is faster on tiles (AMX).
But its switch is global, so it stays off while other Python threads run: they might multiply too.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from spo_kernels import dispatch, memory

TILE_DEPTH = 32  # bf16 elements of a row of a tile


def is_fast(*instructions: str) -> bool:
    """Whether oneDNN, which multiplies for PyTorch, has one of the instructions for bf16 here.

    Without them it multiplies bf16 more slowly than fp32: with AVX-512 alone 1.4 to 2 times, with
    AVX2 alone 3 to 100 times.
    """
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.10
    names = instructions or ("amx_bf16", "avx512_bf16")
    if not any(capabilities.get(name) for name in names):
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether both are bf16 and the CPU multiplies bf16 matrices fast."""
    return x.dtype == weight.dtype == torch.bfloat16 and is_fast()


def multiply(
    x: Tensor,  # (n, D) bf16
    weight: Tensor,  # (V, D) bf16
    out: Tensor,  # (n, V) fp32, contiguous rows
    fixed: bool = False,
) -> bool:
    """Write x times weight transposed to `out` with the native kernel, if it is the best way here.

    Otherwise returns False, and `out` is untouched. `fixed`: if the processor can, though it may
    have a better way while no other Python thread runs; the kernel sums in the same order always.
    """
    x, weight = x.resolve_neg(), weight.resolve_neg()  # the kernel takes addresses
    if dispatch.unavailable("policy_loss", "cpu") or not dispatch.native().has_bf16_products():
        return False
    if weight.stride(1) != 1 or not fixed and _may_switch() and is_fast("amx_bf16"):
        return False
    x = x.contiguous()
    packed = memory.empty((x.shape[0], x.shape[1] + x.shape[1] % 2), x.dtype, x.device)
    dispatch.launch(
        "matmul_bf16",
        "cpu",
        "MatmulArgs",
        rows=x.shape[0],
        columns=weight.shape[0],
        depth=x.shape[1],
        a=x,
        a_stride=x.stride(0),
        b=weight,
        b_stride=weight.stride(0),
        c=out,
        c_stride=out.stride(0),
        packed=packed,
    )
    return True


def clear_behind(matrix: Tensor) -> None:
    """Zero what lies behind each row of a bf16 matrix, up to the depth of a tile (AMX).

    oneDNN loads a left operand that far and multiplies the excess by zeros, so that NaN there
    becomes NaN in the result. A gradient that lies over fp32 logits has halves of them there.
    """
    vocab, stride = matrix.shape[1], matrix.stride(0)
    excess = min(-vocab % TILE_DEPTH, stride - vocab)
    if excess > 0 and matrix.shape[0] > 1:
        shape = (matrix.shape[0] - 1, excess)  # behind the last row it loads nothing
        matrix.as_strided(shape, matrix.stride(), matrix.storage_offset() + vocab).zero_()


def _may_switch() -> bool:
    return threading.active_count() == 1


@contextlib.contextmanager
def rounded() -> Iterator[None]:
    """Inside, fp32 products round their operands to bf16, if no other Python thread runs."""
    if not _may_switch():
        yield
        return
    mkldnn: Any = torch.backends.mkldnn  # its stubs lack `matmul`
    setting = mkldnn.matmul
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        yield
    finally:
        setting.fp32_precision = before
