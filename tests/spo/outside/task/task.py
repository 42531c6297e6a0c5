"""Sorting numbers: a task from outside of the package, as anyone may write one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

from spo.tasks import Problem
from spo.tasks.problem import answer_span, stream


@dataclass(frozen=True)
class Sorting:
    """Numbers to be put in order, in words that the embedded policy knows."""

    size: Annotated[int, Ge(2), Le(9)] = 4
    order: Literal["up", "down"] = "up"
    between: tuple[int, int] = (0, 100)

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Distinct problems; the same numbers in another order are one problem."""
        return stream(
            "sorting", split, seed, self._draw, lambda p: " ".join(sorted(p.text.split()))
        )

    def _draw(self, rng: random.Random) -> Problem:
        numbers = [rng.randint(*self.between) for _ in range(self.size)]
        answer = sorted(numbers, reverse=self.order == "down")
        return Problem(f"make {' '.join(map(str, numbers))}\n", answer)

    def grade(self, text: str, answer: object) -> bool:
        """True iff the last answer span is the sorted numbers."""
        span = answer_span(text)
        return span is not None and span.split() == list(map(str, answer))
