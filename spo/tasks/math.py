"""MATH and MATH500: competition problems; the answer is the expression in the last box.

`spo.tasks.algebra` reads both expressions and compares them: as texts, exactly, and then to many
digits. docs/graders.md lists what counts as equal.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from spo.tasks.algebra.exact import rational
from spo.tasks.algebra.node import Unreadable
from spo.tasks.algebra.parser import parse
from spo.tasks.algebra.quantity import without_unit
from spo.tasks.algebra.same import MAX_LENGTH
from spo.tasks.algebra.same import equal as same_answer
from spo.tasks.algebra.spelling import spelled
from spo.tasks.answers import after_think, boxed_answers, last_boxed
from spo.tasks.problem import Problem, column, is_empty, problem_stream
from spo.tasks.reading import read_problems
from spo.tasks.sources import Source

NAME = "math"
_WAYS = 20  # most boxes of a response that may each be the answer
_MISSING = "task math needs mpmath: pip install 'spo-kernels[math]'"


@dataclass(frozen=True)
class Math:
    """MATH's 12000 training problems and the usual 500 test problems, or others in this format."""

    sources: ClassVar[Mapping[str, str]] = {
        "train": "hiyouga/math12k",
        "test": "HuggingFaceH4/MATH-500",
    }

    simplified: bool = False
    """Whether an answer must also be worked out: no more operations than the data's answer has."""

    def problems(
        self, split: str, seed: int, source: Source | str | None = None
    ) -> Iterator[Problem]:
        """The rows `problem` and `answer` (or a boxed `solution`); see `read_problems`."""
        if importlib.util.find_spec("mpmath") is None:
            raise ValueError(_MISSING)
        read = read_problems(NAME, split, source or self.sources.get(split), _problem)
        return problem_stream(NAME, split, seed, read)

    def prepare(self) -> None:
        """Load what `grade` needs; the worker calls it before its deadline starts to count."""
        if importlib.util.find_spec("mpmath") is None:
            raise ImportError(_MISSING)
        equal("\\sqrt{2}", "x+1")

    def grade(self, text: str, answer: object) -> bool:
        """True iff the last box after the thinking is mathematically equal to `answer`.

        Boxes with only signs and words of a list between them are one: `or`, `/`, `or maybe`;
        it is also right if each of them is.
        """
        boxes = boxed_answers(after_think(text))
        if not boxes or not isinstance(answer, str | int):
            return False
        if equal(", ".join(boxes), str(answer), self.simplified):
            return True
        each = boxes if 1 < len(boxes) <= _WAYS else []  # ways to write the same
        return bool(each) and all(equal(box, str(answer), self.simplified) for box in each)

    def answer(self, text: str) -> str | None:
        """The last box after the thinking as plain text: of numbers, the value."""
        box = ", ".join(boxed_answers(after_think(text)))
        if not box.strip() or len(box) > MAX_LENGTH:
            return None
        with suppress(Unreadable, RecursionError):
            node, _ = without_unit(parse(spelled(box)))
            percent = node.op == "pct"
            value = rational(node.args[0] if percent else node)
            if value is not None and value.denominator < 10**100 and abs(value) < 10**100:
                return f"{value}{'%' if percent else ''}"
        return "".join(spelled(box).split()) or None


@lru_cache(maxsize=8192)  # the branches of a tree repeat their answers
def equal(given: str, answer: str, simplified: bool = False) -> bool:
    """Whether `given` is the right answer; see `spo.tasks.algebra.same.equal`."""
    return same_answer(given, answer, simplified)


def _problem(row: dict, where: str) -> Problem:
    answer = row.get("answer")
    if is_empty(answer) or "\\boxed" in str(answer):
        solution = str(column(row, where, "answer", "solution"))
        answer = last_boxed(solution)
        if not answer:
            raise ValueError(f"{where}: expected a boxed answer, found {solution[-60:]!r}")
    return Problem(str(column(row, where, "problem", "question")), str(answer))
