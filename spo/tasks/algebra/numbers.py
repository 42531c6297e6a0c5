"""Whether two formulas have the same value: exactly where they are rational, else to many digits.

Formulas with variables are compared at fixed points (points.py). Numbers are never rounded to fewer
digits than the largest and the smallest number on the way to them have, so that no tower of powers
is taken for its neighbour; functions of tiny numbers take more. What would need more than `MOST`
digits has no value here.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from spo.tasks.algebra.exact import rational
from spo.tasks.algebra.node import Node, Unreadable, symbols
from spo.tasks.algebra.points import Point, chosen_points, of_logarithms

DIGITS, MOST = 80, 2000  # of an inexact number: the fewest, the most
COST = 2 * 10**7  # of one evaluation: squares of digits, for each function and power
MOST_OF_GAMMA = 400
SPARE = 20  # digits that roundings may cost
_CONSTANTS = ("pi", "e", "i")


def same_value(a: Node, b: Node) -> bool:
    """Whether two formulas are equal, as real functions of their variables.

    Raises Unreadable if one has no value that can be computed.
    """
    if a == b:
        return True
    exact = rational(a), rational(b)
    if None not in exact:
        return exact[0] == exact[1]
    names = sorted((symbols(a) | symbols(b)) - set(_CONSTANTS))
    if any(n.op == "inf" for node in (a, b) for n in node.walk()):
        return _infinite(a) == _infinite(b) != 0
    is_complex = "i" in symbols(a) | symbols(b)
    if not names:
        return _close(a, b, ())[0]
    real, other, skipped = 0, 0, 0
    logarithms = not is_complex and of_logarithms(a, b)  # ln(ab) is ln a + ln b where both are real
    for point, must in chosen_points(a, b, names):
        try:
            equal, is_real = _close(a, b, point)
        except Unreadable as error:
            if must and not isinstance(error, _Undefined):
                raise
            continue
        if not equal:
            if is_real or not logarithms:
                return False
            skipped += 1
            continue
        real += is_real
        other += 1
    if other >= 2 and (is_complex or real >= 2 or not (real or skipped)):
        return True
    raise Unreadable("the formulas have too few values")


def _infinite(node: Node) -> int:
    """1 or -1 of plus or minus infinity, else 0."""
    if node.op == "neg":
        return -_infinite(node.args[0])
    return int(node.op == "inf")


@lru_cache(maxsize=4096)
def decimal(node: Node) -> float:
    """The value of a real formula without variables, inf of infinity. Raises Unreadable."""
    if sign := _infinite(node):
        return sign * math.inf
    if (exact := rational(node)) is not None:
        try:
            return float(exact)
        except OverflowError:
            raise Unreadable("a number out of range") from None
    if symbols(node) - set(_CONSTANTS):
        raise Unreadable("a formula with variables, where a number is expected")
    value, _ = _valued(node, ())
    if not _is_real(value):
        raise Unreadable("a number that is not real")
    return float(value.real)


class _Undefined(Unreadable):
    """At this point."""


def _close(a: Node, b: Node, point: Point) -> tuple[bool, bool]:
    """Whether the values at a point are equal, and real. Raises _Undefined if both have none."""
    values = []
    for node in (a, b):
        try:
            values.append(_valued(node, point))
        except _Undefined:
            values.append(None)
    if None in values:
        if values[0] is values[1]:
            raise _Undefined("both have no value")
        return False, False
    (x, top), (y, other) = values
    if _is_real(x) != _is_real(y):
        return False, False
    if abs(x - y) > max(abs(x), abs(y)) * 10.0 ** -(DIGITS // 2):
        return False, _is_real(x)
    import mpmath

    digits = _digits(top := max(top, other))
    again = [_evaluated(node, point, digits)[0] for node in (a, b)] if point or top > 1 else [x, y]
    with mpmath.workdps(digits):
        difference = abs(again[0] - again[1])
        return bool(difference <= mpmath.mpf(10) ** (SPARE - DIGITS - top)), _is_real(x)


def _is_real(value: Any) -> bool:
    return not value.imag or abs(value.imag) < abs(value.real) * 10 ** -(DIGITS // 2)


def _digits(top: int) -> int:
    if (digits := DIGITS + 2 * top) > MOST:
        raise Unreadable("a number out of range")
    return digits


def _valued(node: Node, point: Point) -> tuple[Any, int]:
    """The value, and how many digits the largest or smallest number on the way has."""
    digits = DIGITS
    for _ in range(4):
        value, top = _evaluated(node, point, digits)
        if _digits(top) <= digits:
            return value, top
        digits = _digits(top)
    raise Unreadable("a number out of range")


def _evaluated(node: Node, point: Point, digits: int) -> tuple[Any, int]:
    found = _outcome(node, point, digits)
    if isinstance(found, Unreadable):
        raise found
    return found


@lru_cache(maxsize=4096)  # items of lists are compared with each other
def _outcome(node: Node, point: Point, digits: int) -> tuple[Any, int] | Unreadable:
    """The value, or why there is none."""
    import mpmath

    with mpmath.workdps(digits):
        evaluation = _Evaluation(point)
        try:
            value = evaluation.of(node)
            evaluation.check()
        except Unreadable as error:
            return error.with_traceback(None)
        except (ZeroDivisionError, OverflowError, TypeError, ValueError) as error:
            return _Undefined(str(error))
    return value, evaluation.top + evaluation.more


class _Evaluation:
    def __init__(self, point: Point):
        import mpmath

        self.mp: Any = mpmath.mp
        self.point, self.top, self.cost = dict(point), 1, 0
        self.fine, self.more = 0, 0  # digits behind the point; those that functions add
        self.tiny = self.mp.mpf(10) ** (SPARE - self.mp.dps)

    def of(self, node: Node) -> Any:
        if (exact := None if self.point and symbols(node) else rational(node)) is not None:
            value = self.mp.mpf(exact.numerator) / exact.denominator
            above, below = (n.bit_length() * 3 // 10 for n in exact.as_integer_ratio())
            self.top, self.fine = max(self.top, above + below), max(self.fine, below)
        else:
            value = self.computed(node)
        if value and not self.mp.isfinite(value):
            raise _Undefined("no finite value")
        if value:
            size = max(abs(self.mp.re(value)), abs(self.mp.im(value)))
            magnitude = int(self.mp.mag(size)) * 3 // 10
            self.top = max(self.top, abs(magnitude) + 1)
            self.fine = max(self.fine, -magnitude - 1)
        self.check()
        return value

    def check(self) -> None:
        if self.top + self.more > MOST:
            raise Unreadable("a number out of range")

    def computed(self, node: Node) -> Any:
        mp, op = self.mp, node.op
        if op == "sym":
            if node.value in _CONSTANTS:
                return {"pi": +mp.pi, "e": +mp.e, "i": mp.mpc(0, 1)}[node.value]
            value = self.point[node.value]
            return mp.mpf(value.numerator) / value.denominator
        if op not in _OPERATIONS and op not in ("func", "call"):
            raise Unreadable(f"a {op} within a formula")
        before, self.fine = self.fine, 0
        args = [self.of(arg) for arg in node.args]
        if op in ("func", "pow", "root", "fact"):
            self.add_digits(node, args)
        self.fine = max(before, self.fine)
        self.cost += mp.dps**2 if op in ("func", "pow", "root", "fact") else 0
        if self.cost > COST:
            raise Unreadable("a long computation")
        if op == "func":
            return self.function(node.value, args)
        if op == "call":
            seed = " ".join([node.value, *(mp.nstr(arg, 25) for arg in args)])
            return mp.mpf(random.Random(seed).uniform(1, 3))
        return _OPERATIONS[op](self, args)

    def add_digits(self, node: Node, args: list[Any]) -> None:
        """For what is close to a sum of powers of something small, `cos(1/n)` to `1 - 1/2n^2`."""
        if node.op == "pow" and self.mp.isint(args[1]):
            return
        large = 0
        if node.value in ("ln", "log", "lg", "arctan") and args[0]:
            large = abs(int(self.mp.mag(args[0]))) * 3 // 10
        if node.value == "tanh":  # 1 is reached but for e^-2x
            self.top = max(self.top, int(min(abs(args[0]), MOST) * 9 / 10) + 1)
        self.more = max(self.more, 3 * max(self.fine, large))

    def add(self, args: list[Any]) -> Any:
        total = args[0] + args[1]
        return self.cleaned(total, max(abs(args[0]), abs(args[1])))

    def cleaned(self, value: Any, scale: Any = 1) -> Any:
        """Zero where only roundings are left."""
        mp, limit = self.mp, self.tiny * scale
        real, imag = mp.re(value), mp.im(value)
        real, imag = (0 if abs(part) < limit else part for part in (real, imag))
        return mp.mpc(real, imag) if imag else mp.mpf(real)

    def power(self, args: list[Any]) -> Any:
        base, exponent = args
        if not base:
            if self.mp.re(exponent) <= 0:
                raise _Undefined("zero to the power of no positive number")
            return self.mp.mpf(0)
        if abs(exponent) * (0.7 * abs(self.mp.mag(base)) + 1) > 3 * MOST:
            raise Unreadable("a number out of range")
        if self.mp.im(base) == 0 and self.mp.re(base) < 0 and self.mp.im(exponent) == 0:
            ratio = Fraction(str(self.mp.nstr(exponent, 30))).limit_denominator(50)
            near = self.mp.mpf(ratio.numerator) / ratio.denominator
            if ratio.denominator % 2 and abs(near - exponent) < self.tiny:  # a real root
                sign = -1 if ratio.numerator % 2 else 1
                return sign * (-base) ** exponent
        value = base**exponent
        return self.cleaned(value, abs(value))

    def root(self, args: list[Any]) -> Any:
        if not args[1]:
            raise _Undefined("a root of index zero")
        return self.power([args[0], 1 / args[1]]) if args[0] else self.mp.mpf(0)

    def factorial(self, args: list[Any]) -> Any:
        self.check_gamma(args)
        return self.mp.gamma(args[0] + 1)

    def check_gamma(self, args: list[Any]) -> None:
        """To many digits the gamma function takes seconds."""
        if max(map(abs, args)) > MOST or self.mp.dps > MOST_OF_GAMMA:
            raise Unreadable("a number out of range")

    def function(self, name: str, args: list[Any]) -> Any:
        mp, value = self.mp, args[0]
        if name in ("log", "lg"):
            base = args[1] if len(args) > 1 else mp.mpf(10)
            return self.cleaned(mp.log(value) / mp.log(base))
        if name in ("gcd", "lcm"):
            raise Unreadable(f"{name} of no integers")
        if name in ("max", "min"):
            return max(args) if name == "max" else min(args)
        if name == "binom":
            self.check_gamma(args)
            return mp.binomial(*args)
        if abs(value) > 10**5 and name in ("exp", "sinh", "cosh", "tanh"):
            raise Unreadable("a number out of range")
        plain: dict[str, Callable[[Any], Any]] = {
            "abs": abs,
            "floor": mp.floor,
            "ceil": mp.ceil,
            "ln": mp.log,
            "arcsin": mp.asin,
            "arccos": mp.acos,
            "arctan": mp.atan,
            "Re": mp.re,
            "Im": mp.im,
            "arg": mp.arg,
            "cis": lambda v: mp.cos(v) + mp.mpc(0, 1) * mp.sin(v),
        }
        function = plain.get(name) or getattr(mp, name, None)
        if function is None or name == "det":
            raise Unreadable(f"the function {name}")
        return self.cleaned(function(value))


_OPERATIONS: dict[str, Callable[[_Evaluation, list[Any]], Any]] = {
    "add": _Evaluation.add,
    "mul": lambda _, args: args[0] * args[1],
    "div": lambda _, args: args[0] / args[1],
    "neg": lambda _, args: -args[0],
    "pct": lambda _, args: args[0] / 100,
    "deg": lambda self, args: args[0] * self.mp.pi / 180,
    "pow": _Evaluation.power,
    "root": _Evaluation.root,
    "fact": _Evaluation.factorial,
}


def proportion(a: Node, b: Node) -> int:
    """The sign of the constant c with a = c * b at all points, 0 if there is none.

    a = 0 and b = 0 then are the same equation. Raises Unreadable as `same_value` does.
    """
    import mpmath

    names = sorted((symbols(a) | symbols(b)) - set(_CONSTANTS))
    if not names or set(names) != symbols(a) - set(_CONSTANTS):
        return 0
    constant, found = None, 0
    for point, must in chosen_points(a, b, names):
        try:
            (x, top), (y, other) = _valued(a, point), _valued(b, point)
        except Unreadable as error:
            if must and not isinstance(error, _Undefined):
                raise
            continue
        digits = _digits(max(top, other))
        x, y = _evaluated(a, point, digits)[0], _evaluated(b, point, digits)[0]
        with mpmath.workdps(digits):
            if not x or not y or not _is_real(x) or not _is_real(y):
                return 0
            constant = x / y if constant is None else constant
            if abs(constant * y - x) > abs(x) * mpmath.mpf(10) ** (SPARE - DIGITS):
                return 0
        found += 1
    if constant is None or found < 2:
        return 0
    return 1 if constant.real > 0 else -1
