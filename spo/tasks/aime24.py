"""AIME 2024: 30 competition problems, for testing only; the answer is an integer in a box."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from spo.tasks.algebra.quantity import number_of
from spo.tasks.answers import after_think, boxed_answers, exact_number, last_boxed
from spo.tasks.problem import Problem, column, is_empty, problem_stream
from spo.tasks.reading import read_problems
from spo.tasks.sources import Source

NAME = "aime24"
MAX_LENGTH = 100  # characters of an answer


@dataclass(frozen=True)
class Aime24:
    """The 30 problems of 2024; they have no training split."""

    sources: ClassVar[Mapping[str, str]] = {"test": "HuggingFaceH4/aime_2024"}

    def problems(
        self, split: str, seed: int, source: Source | str | None = None
    ) -> Iterator[Problem]:
        """The rows `problem`, `answer` (or a boxed `solution`) of a source; see `read_problems`.

        All files of the source are read: publishers put these problems into either split.
        """
        source = source or self.sources.get(split)
        read = read_problems(NAME, split, source, _problem, every_file=True)
        return problem_stream(NAME, split, seed, read)

    def grade(self, text: str, answer: object) -> bool:
        """True iff the last box after the thinking holds the integer `answer`; 073 is 73.

        So must each of the boxes that `or` and the like join to it.

        A name may precede it, `m + n = 73`; every other side of an equation must be 73 too.
        """
        boxes, right = boxed_answers(after_think(text)), exact_number(str(answer))
        if not isinstance(answer, str | int) or right is None:
            return False
        return bool(boxes) and all(
            len(box) <= MAX_LENGTH and number_of(box, percent=False) == right for box in boxes
        )

    def answer(self, text: str) -> str | None:
        """The number in the last box after the thinking, or at the end of an equation in it."""
        box = ", ".join(boxed_answers(after_think(text)))
        if not box or len(box) > MAX_LENGTH:
            return None
        value = number_of(box, percent=False)
        return None if value is None else str(value)


def _problem(row: dict, where: str) -> Problem:
    answer = row.get("answer")
    if is_empty(answer):
        answer = last_boxed(str(column(row, where, "answer", "solution")))
    value = exact_number(str(answer))
    if value is None or value.denominator != 1:
        raise ValueError(f"{where}: expected an integer answer, found {answer!r}")
    return Problem(str(column(row, where, "problem", "question")), int(value))
