"""The two sweeps over a logits row that the policy-loss and logprob kernels share.

Exponents are to base 2, since that is the instruction: d_j = (x_j - max) * scale with
scale = log2(e) / temperature, one rounding of the scale and one of the product.

A soft cap c of logits times s: with tanh_scale k = s / c, all of this works on y = tanh(k x) in
place of x, at the temperature divided by c. Gradients by x are those by y times k (1 - y^2). A
tanh_scale of None is no cap.
"""

# pyright: reportGeneralTypeIssues=false, reportAttributeAccessIssue=false, reportIndexIssue=false
from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # not -inf: a row may start with -inf
FLOOR = tl.constexpr(-160.0)  # 2 to it is 0, so that 0 * -inf never happens
IMPOSSIBLE = tl.constexpr(float("-inf"))  # pads the last block
# Of the tanh, as in csrc/tanh.h.
TANH_NEAR = tl.constexpr(0.65)
TWO_LOG2E = tl.constexpr(2.8853900817779268)
TANH_P0 = tl.constexpr(-3.333325918e-1)
TANH_P1 = tl.constexpr(1.333081248e-1)
TANH_P2 = tl.constexpr(-5.368657090e-2)
TANH_P3 = tl.constexpr(2.046483715e-2)
TANH_P4 = tl.constexpr(-5.510236871e-3)


@triton.jit
def row_start(row, block_rows, block_stride, row_stride):
    """First element of row `row`, an int64, in the `RowLayout` of csrc/ops.h."""
    return row // block_rows * block_stride + row % block_rows * row_stride


@triton.jit
def row_parts(start, vocab, VECTOR: tl.constexpr):
    """(first element, number of vectors) of a row's body.

    The body is what whole vectors of 16 bytes cover; before and behind it are less than VECTOR
    elements each. Its start is computed as a multiple of VECTOR, by which the compiler sees that
    its addresses are aligned, for any vocabulary.
    """
    body = (start + VECTOR - 1) // VECTOR * VECTOR
    vectors = (tl.maximum(start + vocab - body, 0) // VECTOR).to(tl.int32)
    return body, vectors


@triton.jit
def edges(start, vocab, body, vectors, VECTOR: tl.constexpr):
    """(columns, whether they are used) of the elements before and behind the body, (2 VECTOR,)."""
    lane = tl.arange(0, 2 * VECTOR)
    head = (body - start).to(tl.int32)
    column = tl.where(lane < VECTOR, lane, head + vectors * VECTOR + lane - VECTOR)
    return column, (column < vocab) & ((lane >= VECTOR) | (lane < head))


@triton.jit
def capped(x, tanh_scale):
    """(y, its derivative by x) in fp32; NaN stays NaN. Without a cap x and 1."""
    y = x.to(tl.float32)
    by_x = 1.0
    if tanh_scale is not None:
        u = y * tanh_scale
        square = u * u
        p = ((TANH_P4 * square + TANH_P3) * square + TANH_P2) * square
        near = u * square * ((p + TANH_P1) * square + TANH_P0) + u
        e = tl.exp2(-tl.abs(u) * TWO_LOG2E)
        inverse = 1.0 / (1.0 + e)
        rest = 2 * e * inverse
        y = tl.where(square < TANH_NEAR * TANH_NEAR, near, tl.where(u < 0, rest - 1, 1 - rest))
        by_x = rest * (2 * inverse) * tanh_scale
    return y, by_x


@triton.jit
def swept(x, used, tanh_scale):
    """y of the logits x, of which those not `used` add nothing to a sum. They are -inf in x."""
    y, _ = capped(x, tanh_scale)
    if tanh_scale is not None:  # the tanh of -inf would add something
        y = tl.where(used, y, IMPOSSIBLE)
    return y


@triton.jit
def row_sums(
    x,
    start,  # of the row in x
    vocab,
    scale,
    WEIGHTED: tl.constexpr,
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    tanh_scale=None,
):
    """(max y, sum 2^d, sum 2^d d); the last is 0 unless WEIGHTED. Without a cap y is x.

    Every vector of a block has its own maximum and sums, which are merged once, after the loop.
    They are rescaled when a vector's maximum rises: one exponential more per vector. The maximum
    ignores NaN; the sums do not.
    """
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    body, vectors = row_parts(start, vocab, VECTOR)
    ROWS: tl.constexpr = BLOCK_V // VECTOR
    column, used = edges(start, vocab, body, vectors, VECTOR)
    edge = tl.load(x + start + column, mask=used, other=IMPOSSIBLE)
    edge = swept(edge, used, tanh_scale)
    row = tl.arange(0, ROWS)[:, None]
    lanes = row * VECTOR + tl.arange(0, VECTOR)[None, :]
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    weighted = tl.zeros((ROWS,), tl.float32)
    blocks = vectors // ROWS
    for block in tl.range(0, blocks, num_stages=STAGES):
        # Measured on an H100, V 151936: these hints make the two sweeps a tenth faster.
        value = tl.load(x + body + block * BLOCK_V + lanes, eviction_policy="evict_last")
        value, _ = capped(value, tanh_scale)
        top, total, weighted = add_block(value, scale, top, total, weighted, WEIGHTED)
    inside = (blocks * ROWS + row < vectors) & (lanes >= 0)
    value = tl.load(x + body + blocks * BLOCK_V + lanes, mask=inside, other=IMPOSSIBLE)
    value = swept(value, inside, tanh_scale)
    top, total, weighted = add_block(value, scale, top, total, weighted, WEIGHTED)
    row_max = tl.maximum(tl.max(top, 0), tl.max(edge, 0))
    d = (top - row_max) * scale
    e = tl.exp2(d)
    edge_d = (edge - row_max) * scale
    edge_e = tl.exp2(edge_d)
    row_weighted = 0.0
    if WEIGHTED:
        row_weighted = tl.sum(e * (weighted + tl.maximum(d, FLOOR) * total), 0)
        row_weighted += tl.sum(edge_e * tl.maximum(edge_d, FLOOR), 0)
    return row_max, tl.sum(e * total, 0) + tl.sum(edge_e, 0), row_weighted


@triton.jit
def add_block(value, scale, top, total, weighted, WEIGHTED: tl.constexpr):
    """The maxima and sums (ROWS,) with a block (ROWS, VECTOR) of y added."""
    risen = tl.maximum(top, tl.max(value, 1))
    d = (value - risen[:, None]) * scale
    e = tl.exp2(d)
    fall = (top - risen) * scale
    shrink = tl.exp2(fall)
    if WEIGHTED:
        weighted = shrink * (weighted + tl.maximum(fall, FLOOR) * total)
        weighted += tl.sum(e * tl.maximum(d, FLOOR), 1)
    return risen, total * shrink + tl.sum(e, 1), weighted


@triton.jit
def write_row(
    x,
    start,  # of the row in x
    out,  # may be x: every element is read and written by one thread, after which none reads it
    out_start,
    vocab,
    shift,
    scale,
    factor,
    slope,
    token,  # column of the chosen token, -1 for none
    own,  # the value written at that column; under a cap its derivative by y
    SLOPED: tl.constexpr,
    ALIKE: tl.constexpr,  # the rows of x and of out start at the same place within VECTOR elements
    BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr,
    tanh_scale=None,
):
    """out_j = 2^d (factor + slope d), d = (y_j - shift) * scale; the slope only if SLOPED.

    Under a cap that is the derivative by y; what is written is the one by x.

    It goes from the end of the row to its start: the end is what the L2 cache still has of the
    sweep before, where it cannot hold the rows of all programs.
    """
    VECTOR: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    body, vectors = row_parts(start, vocab, VECTOR)
    ROWS: tl.constexpr = BLOCK_V // VECTOR
    head = (body - start).to(tl.int32)
    out_body = out_start + head
    if ALIKE:  # the same number, as one that the compiler sees is a multiple of VECTOR
        out_body = (out_start + VECTOR - 1) // VECTOR * VECTOR
    column, used = edges(start, vocab, body, vectors, VECTOR)
    value = tl.load(x + start + column, mask=used, other=IMPOSSIBLE)
    value = gradient(value, column, shift, scale, factor, slope, token, own, SLOPED, tanh_scale)
    tl.store(out + out_start + column, value.to(out.dtype.element_ty), mask=used)
    row = tl.arange(0, ROWS)[:, None]
    lanes = row * VECTOR + tl.arange(0, VECTOR)[None, :]
    blocks = vectors // ROWS
    token -= head
    inside = (blocks * ROWS + row < vectors) & (lanes >= 0)
    at = blocks * BLOCK_V
    value = tl.load(x + body + at + lanes, mask=inside, other=IMPOSSIBLE)
    value = gradient(value, lanes, shift, scale, factor, slope, token - at, own, SLOPED, tanh_scale)
    tl.store(out + out_body + at + lanes, value.to(out.dtype.element_ty), mask=inside)
    for block in tl.range(0, blocks, num_stages=STAGES):
        at = (blocks - 1 - block) * BLOCK_V
        value = tl.load(x + body + at + lanes, eviction_policy="evict_first")
        value = gradient(
            value, lanes, shift, scale, factor, slope, token - at, own, SLOPED, tanh_scale
        )
        narrow = value.to(out.dtype.element_ty)
        tl.store(out + out_body + at + lanes, narrow, eviction_policy="evict_first")


@triton.jit
def gradient(
    value, column, shift, scale, factor, slope, token, own, SLOPED: tl.constexpr, tanh_scale
):
    y, by_x = capped(value, tanh_scale)
    d = (y - shift) * scale
    e = tl.exp2(d)
    if SLOPED:
        value = e * (tl.maximum(d, FLOOR) * slope + factor)
    else:
        value = e * factor
    value = tl.where(column == token, own, value)
    if tanh_scale is not None:
        value *= by_x
    return value


@triton.jit
def zero_row(out, start, vocab, BLOCK_V: tl.constexpr):
    VECTOR: tl.constexpr = 128 // out.dtype.element_ty.primitive_bitwidth
    body, vectors = row_parts(start, vocab, VECTOR)
    column, used = edges(start, vocab, body, vectors, VECTOR)
    zero = tl.zeros((2 * VECTOR,), out.dtype.element_ty)
    tl.store(out + start + column, zero, mask=used)
    row = tl.arange(0, BLOCK_V // VECTOR)[:, None]
    lanes = row * VECTOR + tl.arange(0, VECTOR)[None, :]
    zeros = tl.zeros((BLOCK_V // VECTOR, VECTOR), out.dtype.element_ty)
    for first in range(0, vectors, BLOCK_V // VECTOR):
        inside = (first + row < vectors) & (lanes >= 0)
        tl.store(out + body + first * VECTOR + lanes, zeros, mask=inside)


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
