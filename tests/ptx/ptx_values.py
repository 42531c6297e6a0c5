"""What PTX computes: the arithmetic of each opcode, over numpy arrays of one number per thread.

Rounding is exact where PTX asks for it. The approximations of the hardware (ex2, rcp) are computed
in fp64 and rounded to fp32: within the error that PTX allows, not the same digits.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx_program import PtxError

Array = Any  # a numpy array of one number per thread, or a scalar

TYPES: dict[str, np.dtype] = {"pred": np.dtype(bool), "f16": np.dtype(np.float16)}
for _bits in (8, 16, 32, 64):
    TYPES |= {f"{kind}{_bits}": np.dtype(f"u{_bits // 8}") for kind in "ub"}
    TYPES[f"s{_bits}"] = np.dtype(f"i{_bits // 8}")
TYPES |= {"f32": np.dtype(np.float32), "f64": np.dtype(np.float64), "bf16": np.dtype(np.uint16)}
TYPES |= {"f16x2": np.dtype(np.uint32), "bf16x2": np.dtype(np.uint32)}

_fma = ctypes.CDLL(None).fma
_fma.restype, _fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3


def double(x: Array) -> Array:
    return x.astype(np.float64)


def single(x: Array) -> Array:
    return x.astype(np.float32)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a b + c in fp64, rounded once: by the C library, since numpy has none."""
    a, b, c = np.broadcast_arrays(a, b, c)
    results = [_fma(*row) for row in zip(a.flat, b.flat, c.flat, strict=True)]
    return np.array(results).reshape(a.shape)


def _fma_to_odd(a: Array, b: Array, c: Array) -> Array:
    """a b + c of fp32 numbers in fp64, rounded to odd: a second rounding is then that of the sum.

    The product is exact: 48 of 53 bits. Where the sum is not, its last bit becomes 1.
    """
    product, c = double(a) * double(b), double(c)
    total = np.atleast_1d(product + c)
    part = total - product
    error = (product - (total - part)) + (c - part)
    even = (error != 0) & (total.view(np.uint64) & np.uint64(1) == 0) & np.isfinite(total)
    if even.any():
        towards = np.where(error > 0, np.inf, -np.inf)
        total = np.where(even, np.nextafter(total, towards), total)
    return total


def fma32(a: Array, b: Array, c: Array) -> Array:
    return single(_fma_to_odd(a, b, c))


def fma32_down(a: Array, b: Array, c: Array) -> Array:
    """The same, rounded towards minus infinity."""
    exact = _fma_to_odd(a, b, c)
    nearest = single(exact)
    return np.where(nearest > exact, np.nextafter(nearest, np.float32(-np.inf)), nearest)


SMALLEST = np.float32(2.0**-126)  # of the normal fp32 numbers


def flush(x: Array) -> Array:
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def rcp64_gross(x: Array) -> Array:
    """rcp.approx.ftz.f64: from and to the upper half of the bits."""
    upper = np.uint64(0xFFFFFFFF00000000)
    cut = (np.atleast_1d(x.astype(np.float64)).view(np.uint64) & upper).view(np.float64)
    return ((1 / cut).view(np.uint64) & upper).view(np.float64)


def divide(a: Array, b: Array) -> Array:
    """Integers are cut towards zero, as in C."""
    if a.dtype.kind == "f":
        return a / b
    if np.any(b == 0):
        raise PtxError("a division by zero")
    quotient = np.abs(a) // np.abs(b)
    return np.where((a < 0) != (b < 0), -quotient, quotient).astype(a.dtype)


def multiply_wide(a: Array, b: Array) -> Array:
    kind = f"{a.dtype.kind}{2 * a.dtype.itemsize}"
    return a.astype(kind) * b.astype(kind)


def shift_left(a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(b >= bits, 0, a << np.minimum(b, bits - 1).astype(a.dtype)).astype(a.dtype)


def shift_right(a: Array, b: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    kept = a >> np.minimum(b, bits - 1).astype(a.dtype)
    return kept if a.dtype.kind == "i" else np.where(b >= bits, 0, kept).astype(a.dtype)


def insert_bits(a: Array, b: Array, start: Array, count: Array) -> Array:
    """bfi: the low `count` bits of a over those of b from `start` on."""
    ones = shift_left(np.ones_like(b), count.astype(np.uint32)) - np.ones_like(b)
    mask = shift_left(ones, start.astype(np.uint32))
    return (shift_left(a, start.astype(np.uint32)) & mask) | (b & ~mask)


def extract_bits(a: Array, start: Array, count: Array) -> Array:
    """bfe of unsigned numbers."""
    return shift_right(a, start) & (shift_left(np.ones_like(a), count) - np.ones_like(a))


def permute_bytes(a: Array, b: Array, selectors: Array) -> Array:
    """prmt: each byte of the result is one of the eight of b and a, or its sign."""
    both = b.astype(np.uint64) << np.uint64(32) | a
    result = np.zeros_like(both)
    for i in range(4):
        nibble = (selectors >> np.uint32(4 * i)).astype(np.uint64) & np.uint64(15)
        byte = both >> (np.uint64(8) * (nibble & np.uint64(7))) & np.uint64(255)
        sign = np.where(byte > 127, np.uint64(255), np.uint64(0))
        result |= np.where(nibble > 7, sign, byte) << np.uint64(8 * i)
    return result.astype(np.uint32)


def halves(word: Array, to_float: Callable[[Array], Array]) -> list[Array]:
    return [to_float((word >> np.uint32(s)).astype(np.uint16)) for s in (0, 16)]


def from_bf16(bits: Array) -> Array:
    return np.atleast_1d(bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """Rounded to nearest even."""
    bits = np.atleast_1d(x).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def from_f16(bits: Array) -> Array:
    return np.atleast_1d(bits).view(np.float16).astype(np.float32)


def to_f16(x: Array) -> Array:
    bits = np.atleast_1d(x).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), 0x7FFF, bits).astype(np.uint16)


def pack(to_half: Callable[[Array], Array]) -> Callable[[Array, Array], Array]:
    """cvt of two floats to two halves; the first operand goes to the upper one."""
    return lambda a, b: to_half(a).astype(np.uint32) << np.uint32(16) | to_half(b)


def largest_halves(
    to_float: Callable[[Array], Array], to_half: Callable[[Array], Array]
) -> Callable[[Array, Array], Array]:
    def largest(a: Array, b: Array) -> Array:
        low, high = map(np.fmax, halves(a, to_float), halves(b, to_float))
        return pack(to_half)(high, low)

    return largest


def by_bits(function: Callable[[int, int], int]) -> Callable[[Array], Array]:
    """A function of a number and its width, one number at a time."""

    def count(a: Array) -> Array:
        numbers = np.atleast_1d(a).tolist()
        return np.array([function(x, 8 * a.dtype.itemsize) for x in numbers], np.uint32)

    return count


# By opcode without its type, which is that of all operands.
ARITHMETIC: dict[str, Callable[..., Array]] = {
    **{"mov": lambda a: a, "cvta.to.global": lambda a: a},
    **{"abs": np.abs, "neg": operator.neg, "not": operator.invert},
    **{"add": operator.add, "sub": operator.sub, "mul": operator.mul, "mul.rn": operator.mul},
    **{"mul.lo": operator.mul, "mad.lo": lambda a, b, c: a * b + c},
    **{"div": divide, "div.rn": divide, "rem": lambda a, b: a - divide(a, b) * b},
    "rcp.rn": lambda a: 1 / a,
    **{"sqrt.rn": np.sqrt, "max": np.fmax, "min": np.fmin},
    **{"and": operator.and_, "or": operator.or_, "xor": operator.xor},
    "copysign": lambda a, b: np.copysign(b, a),
}
# By opcode with its type.
EXACT: dict[str, Callable[..., Array]] = {
    **{"fma.rn.f32": fma32, "fma.rm.f32": fma32_down, "fma.rn.f64": fma64},
    "ex2.approx.f32": lambda x: single(np.exp2(double(x))),
    "ex2.approx.ftz.f32": lambda x: flush(single(np.exp2(double(flush(x))))),
    "rcp.approx.ftz.f32": lambda x: flush(single(1 / double(flush(x)))),
    "rcp.approx.ftz.f64": rcp64_gross,
    "fma.rn.ftz.f32": lambda a, b, c: flush(fma32(flush(a), flush(b), flush(c))),
    "div.full.f32": lambda a, b: single(double(a) / b),
    "max.f16x2": largest_halves(from_f16, to_f16),
    "max.bf16x2": largest_halves(from_bf16, to_bf16),
}
FLOATING = ("mul", "mul.rn", "div.rn", "rcp.rn", "sqrt.rn", "copysign")  # refused for integers
INTEGERS = ("mul.lo", "mad.lo", "div", "rem", "and", "or", "xor", "not")  # refused for floats


def arithmetic(opcode: str) -> tuple[Callable[..., Array], str] | None:
    """The function of an opcode whose operands and result share one type, and that type."""
    stem, _, kind = opcode.rpartition(".")
    if opcode in EXACT:
        return EXACT[opcode], kind
    if stem not in ARITHMETIC or kind not in TYPES or kind in ("f16", "bf16", "f16x2", "bf16x2"):
        return None
    if (stem in FLOATING and kind[0] != "f") or (stem in INTEGERS and kind[0] == "f"):
        return None
    return ARITHMETIC[stem], kind


_ORDERED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le}
_ORDERED |= {"gt": operator.gt, "ge": operator.ge}


def _unordered(a: Array, b: Array) -> Array:
    return np.isnan(a) | np.isnan(b)


def comparison(name: str, is_float: bool) -> Callable[[Array, Array], Array] | None:
    """That of setp. Of floats, a plain one is false for NaN, and one that ends in u true."""
    if name in ("nan", "num") and is_float:
        return _unordered if name == "nan" else lambda a, b: ~_unordered(a, b)
    if is_float and name[-1] == "u" and name[:-1] in _ORDERED:
        ordered = _ORDERED[name[:-1]]
        return lambda a, b: ordered(a, b) | _unordered(a, b)
    if name not in _ORDERED:
        return None
    if is_float and name == "ne":
        return lambda a, b: (a != b) & ~_unordered(a, b)
    return _ORDERED[name]


def conversion(opcode: str) -> tuple[Callable[..., Array], str, str] | None:
    """The function of a cvt, the type of its result and that of its operands."""
    *how, to, of = opcode.split(".")[1:]
    special = {
        "f32.f16": single,
        "rn.bf16x2.f32": pack(to_bf16),
        "rn.f16x2.f32": pack(to_f16),
        "f32.bf16": from_bf16,
        "rn.bf16.f32": to_bf16,
        "rn.f16.f32": to_f16,
        "rni.f32.f32": np.rint,
        "rmi.ftz.f32.f32": lambda x: np.floor(flush(x)),
        "sat.f32.f32": lambda x: np.where(np.isnan(x), np.float32(0), np.clip(x, 0, 1)),
        "f64.f32": double,
    }
    if (known := special.get(".".join([*how, to, of]))) is not None:
        return known, to, of
    if to not in TYPES or of not in TYPES:
        return None
    narrows = to[0] == "f" and (of[0] != "f" or (to, of) == ("f32", "f64"))
    if to[0] in "usf" and of[0] in "usf" and how == (["rn"] if narrows else []):
        if narrows or (to[0] != "f" and of[0] != "f"):
            return lambda x: x.astype(TYPES[to]), to, of
    return None


# Opcodes whose operands have several types, by the first letter of the last: that of the result,
# then those of the operands. t: the last; w: twice as wide; u: u32; p: pred.
MIXED: dict[str, tuple[Callable[..., Array], str]] = {
    **{f"selp.{k}": (lambda a, b, which: np.where(which, a, b), "tttp") for k in "bsuf"},
    **{f"shr.{k}": (shift_right, "ttu") for k in "bsu"},
    **{f"mul.wide.{k}": (multiply_wide, "wtt") for k in "su"},
    **{f"mad.wide.{k}": (lambda a, b, c: multiply_wide(a, b) + c, "wttw") for k in "su"},
    **{"shl.b": (shift_left, "ttu"), "prmt.b": (permute_bytes, "tttt")},
    **{"bfi.b": (insert_bits, "tttuu"), "bfe.u": (extract_bits, "ttuu")},
    "clz.b": (by_bits(lambda x, bits: bits - x.bit_length()), "ut"),
    "popc.b": (by_bits(lambda x, bits: x.bit_count()), "ut"),
}


def mixed(opcode: str) -> tuple[Callable[..., Array], list[str]] | None:
    """The function of one of MIXED, and its types."""
    stem, _, kind = opcode.rpartition(".")
    if f"{stem}.{kind[:1]}" not in MIXED or kind not in TYPES:
        return None
    function, letters = MIXED[f"{stem}.{kind[0]}"]
    types = {"t": kind, "u": "u32", "p": "pred"}
    types["w"] = f"{kind[0]}{2 * int(kind[1:])}" if "w" in letters else ""
    return function, [types[letter] for letter in letters]
