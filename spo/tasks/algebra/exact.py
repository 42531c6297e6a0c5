"""Values that are rational, exactly."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import Any

from spo.tasks.algebra.node import Node, Unreadable

BITS = 1 << 16  # of an exact number


@lru_cache(maxsize=4096)
def rational(node: Node) -> Fraction | None:
    """The exact value; None if it is not rational or too large. Raises Unreadable for 1 / 0."""
    op, args = node.op, [rational(arg) for arg in node.args]
    if op == "num":
        return node.value
    if op == "based":
        return based(*node.value)
    if not args or None in args:
        return None
    return _bounded(_exact(op, args, node.value))


def _exact(op: str, args: list[Any], name: object) -> Fraction | None:
    first = args[0]
    if op in ("add", "mul", "neg", "pct"):
        if op == "neg":
            return -first
        if op == "pct":
            return first / 100
        return first + args[1] if op == "add" else first * args[1]
    if op in ("div", "ratio") and len(args) == 2:
        if args[1] == 0:
            raise Unreadable("a division by zero")
        return first / args[1]
    if op == "pow":
        return _power(first, args[1])
    if op == "root":
        return _root(first, args[1])
    if op == "fact" and first.denominator == 1 and 0 <= first <= 2000:
        return Fraction(math.factorial(int(first)))
    if op == "func":
        return _applied(str(name), args)
    return None


def _bounded(value: Fraction | None) -> Fraction | None:
    if value is None:
        return None
    size = value.numerator.bit_length() + value.denominator.bit_length()
    return value if size <= BITS else None


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if base == 0 and exponent <= 0:
        raise Unreadable("zero to the power of no positive number")
    if exponent.denominator > 1:
        if exponent.denominator > 64:
            return None
        root = _root(base, Fraction(exponent.denominator))
        return None if root is None else _power(root, Fraction(exponent.numerator))
    size = max(abs(base.numerator).bit_length(), base.denominator.bit_length())
    if base in (0, 1, -1):
        return base ** (int(exponent) % 2 + 2)
    return base ** int(exponent) if abs(exponent) * (size - 1) <= BITS else None


def _root(value: Fraction, index: Fraction) -> Fraction | None:
    if index.denominator > 1 or not 1 <= index <= 64:
        return None
    n, sign = int(index), 1
    if value < 0:
        if n % 2 == 0:
            return None
        value, sign = -value, -1
    above, below = _integer_root(value.numerator, n), _integer_root(value.denominator, n)
    return None if above is None or below is None else sign * Fraction(above, below)


def _integer_root(value: int, n: int) -> int | None:
    if value < 2:
        return value
    if n == 2:
        guess = math.isqrt(value)
    else:
        guess = 1 << -(-value.bit_length() // n)
        while (better := ((n - 1) * guess + value // guess ** (n - 1)) // n) < guess:
            guess = better
    return guess if guess**n == value else None


def _applied(name: str, args: list[Fraction]) -> Fraction | None:
    whole = all(arg.denominator == 1 for arg in args)
    ints = [int(arg) for arg in args]
    if name == "abs":
        return abs(args[0])
    if name in ("floor", "ceil"):
        return Fraction(math.floor(args[0]) if name == "floor" else math.ceil(args[0]))
    if name in ("max", "min"):
        return max(args) if name == "max" else min(args)
    if name in ("gcd", "lcm") and whole:
        return Fraction(math.gcd(*ints) if name == "gcd" else math.lcm(*ints))
    if name == "binom" and whole and 0 <= ints[1] <= 2000 and 0 <= ints[0] <= 10**6:
        return Fraction(math.comb(*ints))
    return None


def based(digits: str, base: int) -> Fraction | None:
    """The value of a numeral. Raises Unreadable for a base or digits that there are not."""
    if not digits.isalnum() or not 2 <= base <= 36 or any(int(d, 36) >= base for d in digits):
        raise Unreadable("digits that the base does not have")
    return Fraction(int(digits, base))
