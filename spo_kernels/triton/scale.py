"""The backward of ops that formed their gradient in the forward: csrc/cuda/scale.cu in Triton."""

# The parameters that kernels declare as tl.constexpr are given plain Python values.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, PROGRAMS = 4096, 1024


@triton.jit
def scale_kernel(grad, size, factor, unscale, BLOCK: tl.constexpr):
    """Programs take blocks in turn; none is read where the product of the factors is 1."""
    product = tl.load(factor)
    if unscale is not None:
        product *= tl.load(unscale)
    if product != 1:
        lanes = tl.arange(0, BLOCK).to(tl.int64)
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        begin = tl.program_id(0).to(tl.int64) * BLOCK
        while begin < size:
            at = begin + lanes
            value = tl.load(grad + at, mask=at < size).to(tl.float32) * product
            tl.store(grad + at, value.to(grad.dtype.element_ty), mask=at < size)
            begin += step


def scale(
    *,
    grad: Tensor,  # contiguous, written in place
    factor: Tensor,  # () fp32
    unscale: Tensor | None,  # () fp32
) -> None:
    """grad *= factor * unscale, in fp32, rounded once."""
    programs = min(triton.cdiv(grad.numel(), BLOCK), PROGRAMS)
    with torch.cuda.device_of(grad):
        scale_kernel[(programs,)](grad, grad.numel(), factor, unscale, BLOCK=BLOCK)
