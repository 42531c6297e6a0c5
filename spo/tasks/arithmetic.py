"""Arithmetic chain: `15 - 9 + 6 * 7` read strictly left to right, every result modulo 20.

The worked solutions are correct but impatient: at every line, with probability `MERGE` and at most
once, they merge two operations. A policy that imitates them learns this habit, and often fails
where it merges. Reinforcement learning must teach it to go step by step.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from spo.tasks.problem import Problem, answer_span, stream, tag

NAME = "arithmetic"
MODULUS = 20
OPERATIONS = (4, 6)  # minimum and maximum number of operations of a chain
MERGE = 0.6
VOCABULARY = (NAME, "+", "-", "*", "=", *map(str, range(MODULUS)))

_INTEGER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Arithmetic:
    """Chains of `operations` operations, by default 4 to 6.

    The embedded policy was trained on 4 to 6; longer chains test how it generalises.
    """

    operations: Annotated[int, Ge(1)] | None = None

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Distinct chains; see `stream` for the splits."""
        counts = OPERATIONS if self.operations is None else (self.operations, self.operations)
        return stream(NAME, split, seed, lambda rng: _draw(rng, counts), lambda p: p.text)

    def grade(self, text: str, answer: object) -> bool:
        """True iff the last answer span is the integer `answer`, in ASCII digits."""
        span = answer_span(text)
        return span is not None and _INTEGER.fullmatch(span) is not None and int(span) == answer

    def answer(self, text: str) -> str | None:
        """The integer in the last answer span."""
        span = answer_span(text)
        return str(int(span)) if span is not None and _INTEGER.fullmatch(span) else None


def _draw(rng: random.Random, counts: tuple[int, int]) -> Problem:
    value = rng.randrange(MODULUS)
    words = [NAME, str(value)]
    for _ in range(rng.randint(*counts)):
        operator, operand = rng.choice("+-*"), rng.randint(2, 9)
        words += [operator, str(operand)]
        value = _apply(value, operator, operand)
    return Problem(" ".join(words) + "\n", value)


def _apply(left: int, operator: str, right: int) -> int:
    if operator == "+":
        return (left + right) % MODULUS
    return (left - right if operator == "-" else left * right) % MODULUS


def solution(problem: Problem, rng: random.Random, merge: float = MERGE, most: int = 1) -> str:
    """A correct worked solution; a line merges with probability `merge`, at most `most` do."""
    _, first, *rest = problem.text.split()
    steps = list(zip(rest[::2], map(int, rest[1::2]), strict=True))
    value, lines = int(first), []
    while steps:
        take = 2 if len(steps) > 1 and rng.random() < merge and most > 0 else 1
        most -= take - 1
        line = str(value)
        for operator, operand in steps[:take]:
            line += f" {operator} {operand}"
            value = _apply(value, operator, operand)
        lines.append(f"{line} = {value}")
        del steps[:take]
    return "\n".join([*lines, tag(str(value))])
