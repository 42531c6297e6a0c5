"""Where formulas with variables are compared."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache

from spo.tasks.algebra.exact import rational
from spo.tasks.algebra.node import Node

POINTS = 8
SIZES = (Fraction(1, 1000), Fraction(20), Fraction(1000), Fraction(10**6))  # of further points
MOST_ENDS = 4
_PIECES = ("abs", "floor", "ceil", "max", "min", "Re", "Im", "arg", "gcd", "lcm")

Point = tuple[tuple[str, Fraction], ...]  # the values of the variables


def chosen_points(a: Node, b: Node, names: list[str]) -> Iterator[tuple[Point, bool]]:
    """The points to compare at, and whether a value out of range there leaves no verdict.

    Formulas of pieces, such as |x - 5|, are compared at further points.
    """
    for point in _points(tuple(names)):
        yield point, True
    nodes = [n for node in (a, b) for n in node.walk()]
    if any(map(_has_pieces, nodes)):
        ends = {abs(n.value) for n in nodes if n.op == "num"}
        for point in _far_points(tuple(names), tuple(sorted(ends)[-MOST_ENDS:])):
            yield point, False


def of_logarithms(a: Node, b: Node) -> bool:
    """Whether both have logarithms, and no pieces: ln|x| is not ln x."""
    logs = [any(n.value in ("ln", "log", "lg") for n in node.walk()) for node in (a, b)]
    return all(logs) and not any(_has_pieces(n) for node in (a, b) for n in node.walk())


def _has_pieces(node: Node) -> bool:
    """Whether it may be one formula here and another there."""
    if node.op in ("root", "pow"):
        index = rational(node.args[1])
        if index is None:
            return node.op == "root"
        return (index if node.op == "root" else index.denominator) % 2 == 0
    return node.op == "func" and node.value in _PIECES


@lru_cache(maxsize=256)
def _far_points(names: tuple[str, ...], ends: tuple[Fraction, ...]) -> tuple[Point, ...]:
    """Large, small and whole ones, and those on both sides of `ends`, where pieces may meet."""
    rng = random.Random("far points of " + " ".join(names))
    sizes = [*SIZES, *(end * rng.choice((3, 7)) for end in ends[-1:])]
    rows = []
    ways = ((1,), (-1,), (1, -1))[: 1 + min(len(names), 2)]
    for size in sizes:
        for signs in ways:
            rows.append([size * rng.choice(signs) * rng.randint(500, 2000) / 1009 for _ in names])
    for limit in (9, 40):
        for signs in ways:
            rows.append([Fraction(rng.choice(signs) * rng.randint(1, limit)) for _ in names])
    for end in ends:
        for sign, side in itertools.product((1, -1), repeat=2):
            rows.append([sign * end + side * Fraction(rng.randint(200, 450), 1009) for _ in names])
    return tuple(tuple(zip(names, row, strict=True)) for row in rows)


@lru_cache(maxsize=256)
def _points(names: tuple[str, ...]) -> tuple[Point, ...]:
    """Positive ones first, for the sake of roots and logarithms."""
    rng = random.Random("points of " + " ".join(names))
    points = []
    for k in range(POINTS):
        signs = [1 if k < POINTS // 2 else rng.choice((-1, 1)) for _ in names]
        points.append(
            {
                n: Fraction(s * rng.randint(2000, 40000), 10007)
                for n, s in zip(names, signs, strict=True)
            }
        )
    points[-1] = {name: -abs(value) for name, value in points[-1].items()}
    return tuple(tuple(point.items()) for point in points)
