"""The two sweeps over a logits row that the policy-loss and logprob kernels share.

Exponents are to base 2, since that is the instruction: d_j = (x_j - max) * scale with
scale = log2(e) / temperature, one rounding of the scale and one of the product.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # not -inf: a row may start with -inf
FLOOR = tl.constexpr(-160.0)  # 2 to it is 0, so that 0 * -inf never happens
IMPOSSIBLE = tl.constexpr(float("-inf"))  # pads the last block


@triton.jit
def row_start(base, row, block_rows, block_stride, row_stride):
    """Address of row `row`, an int64, in the `RowLayout` of csrc/ops.h."""
    return base + row // block_rows * block_stride + row % block_rows * row_stride


@triton.jit
def row_sums(x, vocab, scale, WEIGHTED: tl.constexpr, BLOCK_V: tl.constexpr):
    """(max x, sum 2^d, sum 2^d d); the last is 0 unless WEIGHTED.

    Every lane keeps its own maximum and sums, which are merged once, after the loop. There is one
    exponential per element: the smaller of the element and the lane's maximum is scaled to the
    larger. The maximum ignores NaN; the sums do not.
    """
    lanes = tl.arange(0, BLOCK_V)
    top = tl.full((BLOCK_V,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_V,), tl.float32)
    weighted = tl.zeros((BLOCK_V,), tl.float32)
    for begin in range(0, vocab, BLOCK_V):
        column = begin + lanes
        value = tl.load(x + column, mask=column < vocab, other=IMPOSSIBLE).to(tl.float32)
        step = (value - top) * scale
        rises = step > 0
        d = -tl.abs(step)
        e = tl.exp2(d)
        if WEIGHTED:
            d = tl.maximum(d, FLOOR)
            weighted = tl.where(rises, e * (weighted + d * total), weighted + e * d)
        total = tl.where(rises, total * e + 1, total + e)
        top = tl.where(rises, value, top)
    row_max = tl.max(top, 0)
    d = (top - row_max) * scale
    e = tl.exp2(d)
    row_weighted = tl.sum(e * (weighted + tl.maximum(d, FLOOR) * total), 0) if WEIGHTED else 0.0
    return row_max, tl.sum(e * total, 0), row_weighted


@triton.jit
def write_row(
    x,
    out,  # may be x: every element is read and written by one thread
    vocab,
    shift,
    scale,
    factor,
    slope,
    token,  # column of the chosen token, -1 for none
    own,  # the value written at that column
    SLOPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out_j = 2^d (factor + slope d), d = (x_j - shift) * scale; the slope only if SLOPED."""
    lanes = tl.arange(0, BLOCK_V)
    for begin in range(0, vocab, BLOCK_V):
        column = begin + lanes
        inside = column < vocab
        value = tl.load(x + column, mask=inside, other=IMPOSSIBLE).to(tl.float32)
        d = (value - shift) * scale
        e = tl.exp2(d)
        if SLOPED:
            value = e * (tl.maximum(d, FLOOR) * slope + factor)
        else:
            value = e * factor
        value = tl.where(column == token, own, value)
        tl.store(out + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def zero_row(out, vocab, BLOCK_V: tl.constexpr):
    lanes = tl.arange(0, BLOCK_V)
    zero = tl.zeros((BLOCK_V,), out.dtype.element_ty)
    for begin in range(0, vocab, BLOCK_V):
        tl.store(out + begin + lanes, zero, mask=begin + lanes < vocab)


@triton.jit
def expm1(x):
    """exp(x) - 1 of a scalar, without the cancellation near 0 and without a device library.

    The library's is missing in the interpreter. Taylor's series to x^9 is exact to 2^-30 on its
    half of the unit interval.
    """
    series = 1.0 / 362880
    series = series * x + 1.0 / 40320
    series = series * x + 1.0 / 5040
    series = series * x + 1.0 / 720
    series = series * x + 1.0 / 120
    series = series * x + 1.0 / 24
    series = series * x + 1.0 / 6
    series = series * x + 0.5
    series = series * x + 1
    return tl.where(tl.abs(x) < 0.5, series * x, tl.exp(x) - 1)
