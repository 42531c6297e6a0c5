"""Responses that hung a grader, so that the same form is not tried again and again."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass

STRIKES = 2  # hangs of answers that differ in their digits only, after which such are not tried
PATIENCE, AMPLE = 4, 10  # from so many hangs on, so many times the slowest grading is the limit
REMEMBERED = 4096  # forms
_PART = 400  # characters at the end of a response that stand for it

_MARKS = ("\\boxed", "<answer>", "####", "</think>")


@dataclass(frozen=True)
class Form:
    """What of an item decides how long its grading takes."""

    exact: tuple[str, str, str]  # the task, the part of the response with its answer, the answer
    shape: tuple[str, str]  # the task, the part with all its numbers alike


def form_of(task: str, text: str, answer: str) -> Form:
    """The form of a response: what follows the last mark of an answer, or its end."""
    start = max(text.rfind(mark) for mark in _MARKS)
    part = text[start if start >= 0 else max(len(text) - _PART, 0) :][: 10 * _PART]
    part = "".join(part.split())
    return Form((task, part, answer), (task, re.sub("[0-9]+", "9", part)))


class Hangs:
    """Forms that hung. Those that differ in digits only count together, unless more are fine.

    `limit_s` is what an item may spend: `timeout_s`, and once several have hung, less, but many
    times what the slowest other item has spent.
    """

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.limit_s = self._timeout_s = timeout_s  # for the next item
        self._count, self._slowest = 0, 0.0
        self._exact: OrderedDict[tuple[str, str, str], None] = OrderedDict()
        self._shapes: OrderedDict[tuple[str, str], list[int]] = OrderedDict()

    def hung(self, form: Form) -> None:
        self._count += 1
        if self._count >= PATIENCE:  # more of them would cost a run its time
            usual = max(AMPLE * self._slowest, self._timeout_s / AMPLE)
            self.limit_s = min(self._timeout_s, usual)
        self._exact[form.exact] = None
        self._shapes.setdefault(form.shape, [0, 0])[0] += 1
        for known in (self._exact, self._shapes):
            while len(known) > REMEMBERED:
                known.popitem(last=False)

    def graded(self, form: Form, spent_s: float = 0.0) -> None:
        self._slowest = max(self._slowest, spent_s)
        if (counts := self._shapes.get(form.shape)) is not None:
            counts[1] += 1

    def is_known(self, form: Form) -> bool:
        """Whether to grade this form would only hang again."""
        if form.exact in self._exact:
            return True
        hung, fine = self._shapes.get(form.shape, (0, 0))
        return hung >= STRIKES and hung > fine
