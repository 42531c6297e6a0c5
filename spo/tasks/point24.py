"""The 24 game: make 24 of four numbers from 1 to 13 with + - * /, each used exactly once.

Unlike countdown's, its problems may need fractions as intermediate results: 5 * (5 - 1 / 5).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from spo.tasks import countdown
from spo.tasks.problem import Problem, stream

NAME = "point24"
TARGET, NUMBERS, LARGEST = 24, 4, 13


@dataclass(frozen=True)
class Point24:
    """The four numbers, in descending order."""

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Distinct solvable problems; see `stream` for the splits."""
        return stream(NAME, split, seed, _draw, lambda problem: problem.text)

    def grade(self, text: str, answer: object) -> bool:
        """True iff the last box after the thinking, else the last answer span, makes the target.

        It must be an expression that uses each number exactly once. It may be in LaTeX, and `24 =`
        may precede it or `= 24` follow it.
        """
        return countdown.solves(countdown.expression_of(text, boxes_first=True), answer)

    def answer(self, text: str) -> str | None:
        """The expression that `grade` reads, without spaces and without what it is equal to."""
        return countdown.plain(countdown.expression_of(text, boxes_first=True))


def _draw(rng: random.Random) -> Problem:
    while True:
        numbers = sorted((rng.randint(1, LARGEST) for _ in range(NUMBERS)), reverse=True)
        if solvable(tuple(map(Fraction, numbers))):
            text = " ".join(map(str, numbers))
            return Problem(text, {"numbers": numbers, "target": TARGET})


@lru_cache(maxsize=65536)
def solvable(values: tuple[Fraction, ...]) -> bool:
    """Whether the values, combined two at a time, can make 24."""
    if len(values) == 1:
        return values[0] == TARGET
    for i, a in enumerate(values):
        for j, b in enumerate(values):
            if i == j:
                continue
            rest = [v for k, v in enumerate(values) if k not in (i, j)]
            results = {a + b, a * b, a - b} | ({a / b} if b else set())
            if any(solvable(tuple(sorted([*rest, r]))) for r in results):
                return True
    return False
