"""MATH and MATH500: competition problems; the answer is the expression in the last box.

Two expressions are compared as text and as numbers first, and by math-verify (sympy) if that does
not decide. The library has a budget of processor time; an answer that it cannot decide in that time
is wrong, so that a tower of powers costs a second and not a worker.
"""

from __future__ import annotations

import importlib.util
import logging
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from spo.tasks import latex
from spo.tasks.answers import after_think, exact_number, last_boxed
from spo.tasks.problem import Problem, column, is_empty, problem_stream
from spo.tasks.reading import read_problems
from spo.tasks.sources import Source

NAME = "math"
MAX_LENGTH = 600  # characters of an answer; the longest of MATH has about 200
MAX_DEPTH = 16  # of brackets
BUDGET_S = 1.0  # processor time of one comparison; a usual one takes 5 to 50 ms

_MISSING = "task math needs math-verify: pip install 'spo-kernels[math]'"


class _OverBudget(BaseException):
    """Not an Exception: sympy and math-verify catch those."""


@dataclass(frozen=True)
class Math:
    """MATH's 12000 training problems and the usual 500 test problems, or others in this format."""

    sources: ClassVar[Mapping[str, str]] = {
        "train": "hiyouga/math12k",
        "test": "HuggingFaceH4/MATH-500",
    }

    def problems(
        self, split: str, seed: int, source: Source | str | None = None
    ) -> Iterator[Problem]:
        """The rows `problem` and `answer` (or a boxed `solution`); see `read_problems`."""
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(_MISSING)
        read = read_problems(NAME, split, source or self.sources.get(split), _problem)
        return problem_stream(NAME, split, seed, read)

    def prepare(self) -> None:
        """Load what `grade` needs; the worker calls it before its deadline starts to count."""
        if importlib.util.find_spec("math_verify") is None:
            raise ImportError(_MISSING)
        for name in ("math_verify", "latex2sympy2_extended"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # it reports every odd answer
        _compare("\\frac{1}{2}", "x+1")  # builds the parser's tables

    def grade(self, text: str, answer: object) -> bool:
        """True iff the last box after the thinking is mathematically equal to `answer`."""
        box = last_boxed(after_think(text))
        return box is not None and isinstance(answer, str | int) and equal(box, str(answer))

    def answer(self, text: str) -> str | None:
        """The last box after the thinking as plain text: of numbers, the value."""
        box = last_boxed(after_think(text))
        if box is None or not box.strip() or len(box) > MAX_LENGTH:
            return None
        box, value = latex.plain(latex.clean(box)), exact_number(box)
        return box if value is None else f"{value}{'%' if '%' in box else ''}"


def _problem(row: dict, where: str) -> Problem:
    answer = row.get("answer")
    if is_empty(answer) or "\\boxed" in str(answer):
        solution = str(column(row, where, "answer", "solution"))
        answer = last_boxed(solution)
        if not answer:
            raise ValueError(f"{where}: expected a boxed answer, found {solution[-60:]!r}")
    return Problem(str(column(row, where, "problem", "question")), str(answer))


@lru_cache(maxsize=8192)  # the branches of a tree repeat their answers
def equal(given: str, answer: str) -> bool:
    """Whether `given` is the right answer; both in LaTeX, neither in a box.

    Order counts in tuples and intervals, but not in sets and lists. Units may be left out. An
    equation `x = 5` may replace its right side; every other given side must be right too.
    """
    if len(given) > MAX_LENGTH or _depth(given) > MAX_DEPTH:
        return False
    spelled = latex.is_text(answer)
    given, answer = latex.clean(given), latex.clean(answer)
    if not given or not answer:
        return False
    if latex.plain(given) == latex.plain(answer):
        return True
    if spelled or latex.is_words(answer):
        return latex.words(given) == latex.words(answer)
    if (based := latex.with_base(answer)) is not None:
        return latex.with_base(given, based[1]) == based
    given = latex.without_unit(latex.in_base_ten(given))
    sides = [given] if latex.has_relation(answer) else latex.sides(given)
    counts = [latex.multiplicities(side) for side in (*sides, answer)]
    if None not in counts and any(count != counts[-1] for count in counts):
        return False
    try:
        with _budget(BUDGET_S):
            return all(_same(latex.bracketed(side, answer), answer) for side in sides)
    except (_OverBudget, MemoryError, RecursionError):
        return False


def _same(given: str, answer: str) -> bool:
    values = exact_number(given), exact_number(answer)
    if None not in values and values[0] == values[1]:
        return True
    if None not in values and ("%" in given) == ("%" in answer):
        return False
    if not latex.same_brackets(given, answer) or latex.has_loose_digits(given):
        return False
    return _compare(latex.exact_decimals(given), latex.exact_decimals(answer))


def _compare(given: str, answer: str) -> bool:
    import math_verify
    from math_verify import LatexExtractionConfig

    # LaTeX only: the library's reader of plain expressions hands text to sympy's parser, which
    # evaluates it as Python.
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    gold, target = (
        [_plain(e) for e in math_verify.parse(f"${t}$", config, parsing_timeout=0)]  # 0: no limit
        for t in (answer, given)
    )
    return math_verify.verify(gold, target, allow_set_relation_comp=True, timeout_seconds=None)


def _plain(expression: Any) -> Any:
    """With symbols that differ only by name: the parser guesses from the context if `i` is real."""
    from sympy import Basic, Symbol

    if not isinstance(expression, Basic):
        return expression
    symbols = expression.free_symbols
    return expression.xreplace({s: Symbol(s.name) for s in symbols if type(s) is Symbol})


@contextmanager
def _budget(seconds: float):
    """Raise _OverBudget in the main thread after this much processor time."""

    def over(*_):
        raise _OverBudget

    before = signal.signal(signal.SIGPROF, over)
    # It repeats: the first may be raised where the library catches everything.
    signal.setitimer(signal.ITIMER_PROF, seconds, 0.1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def _depth(text: str) -> int:
    """Depth of nested brackets, closed or not."""
    depth = deepest = 0
    for bracket in re.findall(r"[(\[{)\]}]", text):
        depth = depth + 1 if bracket in "([{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest
