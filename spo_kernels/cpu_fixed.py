"""Products on the CPU in which a row has the same bits whatever stands beside it.

BLAS libraries choose the order of a sum by the shape of the product and the number of threads. The
kernels of csrc/cpu/matmul_fixed.cpp and csrc/cpu/matmul.cpp choose it by the depth alone. They also
widen bf16 and fp16 while they read them, so that no wide copy of the weight is made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spo_kernels import cpu_bf16, dispatch, memory, rows

BLOCK_ELEMENTS = 1 << 20  # of the fp32 logits made at a time for bf16 ones: 4 MiB


def logits(
    x: Tensor,  # (n, D)
    weight: Tensor,  # (V, D)
    out: Tensor,  # (n, V) fp32 or bf16, contiguous rows
) -> None:
    """Write x times weight transposed to `out`: summed in fp32, rounded once."""
    x, weight = _readable(x), _readable(weight)
    if out.dtype == torch.float32:
        return _logits(x, weight, out)
    vocab = weight.shape[0]
    size = max(1, BLOCK_ELEMENTS // max(x.shape[0], 1))
    buffer = memory.empty((x.shape[0], min(size, vocab)), torch.float32, x.device)
    for begin in range(0, vocab, size):
        part = buffer[:, : min(size, vocab - begin)]
        _logits(x, weight[begin : begin + size], part)
        out[:, begin : begin + size].copy_(part)


def states_gradient(dlogits: Tensor, weight: Tensor) -> Tensor:
    """dlogits (n, V) times weight (V, D): (n, D) fp32."""
    out = memory.empty((dlogits.shape[0], weight.shape[1]), torch.float32, dlogits.device)
    _multiply(_readable(dlogits), _readable(weight), out, transposed=False)
    return out


def _readable(x: Tensor) -> Tensor:
    """A matrix as the kernels read it: a dtype of theirs, its rows contiguous."""
    x = x.resolve_neg()  # they take addresses
    x = x if x.dtype in rows.DTYPES else x.float()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _logits(x: Tensor, weight: Tensor, out: Tensor) -> None:
    halves = x.dtype == weight.dtype == torch.bfloat16
    if not (halves and cpu_bf16.multiply(x, weight, out, fixed=True)):
        _multiply(x, weight, out, transposed=True)


def _multiply(a: Tensor, b: Tensor, out: Tensor, transposed: bool) -> None:
    dispatch.launch(
        "matmul_fixed",
        "cpu",
        "FixedMatmulArgs",
        rows=a.shape[0],
        columns=out.shape[1],
        depth=a.shape[1],
        a=a,
        a_dtype=rows.DTYPES.index(a.dtype),
        a_stride=a.stride(0),
        b=b,
        b_dtype=rows.DTYPES.index(b.dtype),
        b_stride=b.stride(0),
        b_transposed=transposed,
        c=out,
        c_stride=out.stride(0),
    )
