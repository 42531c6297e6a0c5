"""AIME 2024: 30 competition problems, for testing only; the answer is an integer in a box."""

from __future__ import annotations

from collections.abc import Iterator

from spo.tasks import latex
from spo.tasks.answers import after_think, exact_number, last_boxed
from spo.tasks.datafiles import column, problem_stream, read_rows
from spo.tasks.problem import Problem

NAME = "aime24"
SOURCE = {"test": "HuggingFaceH4/aime_2024"}
MAX_LENGTH = 100  # characters of an answer


def problems(split: str, seed: int, *, source: str | None = None) -> Iterator[Problem]:
    """The rows `problem`, `answer` (or a boxed `solution`) of a file, folder or hub data set.

    All files of the source are read: publishers file these problems under either split.
    """
    if split == "train" and source is None:
        raise ValueError("aime24 has no training problems: name a file in data.train to use one")
    rows = read_rows(source or SOURCE.get(split, ""), split, every_file=True)
    return problem_stream(NAME, split, seed, [_problem(row, where) for row, where in rows])


def _problem(row: dict, where: str) -> Problem:
    answer = row.get("answer")
    if answer is None:
        answer = last_boxed(str(column(row, where, "solution")))
    value = exact_number(str(answer))
    if value is None or value.denominator != 1:
        raise ValueError(f"{where}: expected an integer answer, found {answer!r}")
    return Problem(str(column(row, where, "problem", "question")), int(value))


def grade(text: str, answer: object) -> bool:
    """True iff the last box after the thinking holds the integer `answer`; 073 is 73.

    A name may stand before it, `m + n = 73`; every other side of an equation must be 73 as well.
    """
    box, right = last_boxed(after_think(text)), exact_number(str(answer))
    if not isinstance(answer, str | int) or right is None or box is None or len(box) > MAX_LENGTH:
        return False
    sides = latex.sides(latex.clean(box))
    return all("/" not in side and exact_number(side) == right for side in sides)
