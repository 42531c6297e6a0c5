"""Responses that hung a grader, so that the same form is not tried again and again."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass

STRIKES = 2  # hangs of answers that differ in their digits only, after which such are not tried
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
    """Forms that hung. Those that differ in digits only count together, unless more are fine."""

    def __init__(self) -> None:
        self._exact: OrderedDict[tuple[str, str, str], None] = OrderedDict()
        self._shapes: OrderedDict[tuple[str, str], list[int]] = OrderedDict()

    def hung(self, form: Form) -> None:
        self._exact[form.exact] = None
        self._shapes.setdefault(form.shape, [0, 0])[0] += 1
        for known in (self._exact, self._shapes):
            while len(known) > REMEMBERED:
                known.popitem(last=False)

    def graded(self, form: Form) -> None:
        if (counts := self._shapes.get(form.shape)) is not None:
            counts[1] += 1

    def is_known(self, form: Form) -> bool:
        """Whether to grade this form would only hang again."""
        if form.exact in self._exact:
            return True
        hung, fine = self._shapes.get(form.shape, (0, 0))
        return hung >= STRIKES and hung > fine
