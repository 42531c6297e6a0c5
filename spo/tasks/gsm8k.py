"""GSM8K: grade-school word problems; the answer is the number after the last `####`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from spo.tasks.algebra.quantity import number_of
from spo.tasks.answers import after_think, exact_number, last_boxed
from spo.tasks.problem import Problem, column, problem_stream
from spo.tasks.reading import read_problems
from spo.tasks.sources import Source

NAME = "gsm8k"
MARK = "####"
MAX_LENGTH = 200  # characters of the line

_BOX_ALONE = re.compile(r"[$\s]*\\boxed\b.*")


@dataclass(frozen=True)
class Gsm8k:
    """The data set's 7473 training and 1319 test problems, or others in its format."""

    sources: ClassVar[Mapping[str, str]] = {
        "train": "openai/gsm8k/main",
        "test": "openai/gsm8k/main",
    }

    def problems(
        self, split: str, seed: int, source: Source | str | None = None
    ) -> Iterator[Problem]:
        """The rows `question`, `answer` of a source; see `read_problems`."""
        read = read_problems(NAME, split, source or self.sources.get(split), _problem)
        return problem_stream(NAME, split, seed, read)

    def grade(self, text: str, answer: object) -> bool:
        """True iff the line after the last `####` is the number `answer`, exactly.

        A unit may follow, and the number may stand in a box: `#### 5 dollars`, `#### \\boxed{5}`.
        """
        given = _given(text)
        if given is None or not isinstance(answer, str | int):
            return False
        return given == exact_number(str(answer))

    def answer(self, text: str) -> str | None:
        """The number in the line after the last `####`."""
        given = _given(text)
        return None if given is None else str(given)


def _given(text: str) -> Fraction | None:
    _, mark, rest = after_think(text).rpartition(MARK)
    line = rest.strip().partition("\n")[0].strip()
    if not mark or len(line) > MAX_LENGTH or re.search(r"[0-9]\s*/", line):
        return None
    if (value := exact_number(line)) is not None:
        return value
    if (box := last_boxed(line)) is not None and _BOX_ALONE.fullmatch(line):
        line = box
    return number_of(line)


def _problem(row: dict, where: str) -> Problem:
    answer = str(column(row, where, "answer")).rpartition(MARK)[2].strip()
    if exact_number(answer) is None:
        raise ValueError(
            f"{where}: expected a number after {MARK} in answer, found {answer[:60]!r}"
        )
    return Problem(str(column(row, where, "problem", "question")), answer)
