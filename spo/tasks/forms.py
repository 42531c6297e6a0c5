"""Responses that hung a grader, so that the same form is not tried again and again."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

STRIKES = 2  # hangs of a form, after which it is not tried; one is enough for the same text
RETRY = 64  # items of a form that are not tried before one is, for each of its hangs
PATIENCE, AMPLE = 4, 10  # from so many hangs on, so many times the slowest grading is the limit
REMEMBERED = 16384  # forms
_PART = 400  # characters at the end of a response that stand for it

_MARKS = ("\\boxed", "<answer>", "####", "</think>")


@dataclass(frozen=True)
class Form:
    """What of an item decides how long its grading takes."""

    whole: int  # hash of the task, the whole response and the answer
    exact: tuple[str, str, str]  # the task, the part of the response with its answer, the answer
    shape: tuple[str, str]  # the task, the part with all its numbers alike


def form_of(task: str, text: str, answer: str) -> Form:
    """The form of a response: what follows the last mark of an answer, or its end."""
    start = max(text.rfind(mark) for mark in _MARKS)
    part = text[start if start >= 0 else max(len(text) - _PART, 0) :][: 10 * _PART]
    part = "".join(part.split())
    shape = re.sub("[0-9]+", "9", part)
    return Form(hash((task, text, answer)), (task, part, answer), (task, shape))


@dataclass
class _Count:
    """Gradings of one form."""

    hung: int = 0
    fine: int = 0
    skipped: int = 0  # since one was tried
    again: bool = False  # one is tried again


class Hangs:
    """Forms that hung: the same text, the same answer, answers that differ in digits only.

    A form is not tried while it hung more often than it was fine. Once in a while one is, so that
    what only stood still for a time does not cost a form its rewards for the whole run.

    `limit_s` is what an item may spend: `timeout_s`, and once several have hung, less, but many
    times what the slowest other item has spent.
    """

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.limit_s = self._timeout_s = timeout_s  # for the next item
        self._count, self._slowest = 0, 0.0
        self._known: OrderedDict[Hashable, _Count] = OrderedDict()

    def hung(self, form: Form) -> None:
        self._count += 1
        if self._count >= PATIENCE:  # more of them would cost a run its time
            usual = max(AMPLE * self._slowest, self._timeout_s / AMPLE)
            self.limit_s = min(self._timeout_s, usual)
        for count in self._counts(form):
            count.hung += 1
            count.again = False

    def graded(self, form: Form, spent_s: float = 0.0) -> None:
        self._slowest = max(self._slowest, spent_s)
        for count in self._counts(form):
            if count.again:  # what held it up is over
                count.hung, count.again = 0, False
            count.fine += 1

    def is_known(self, form: Form) -> bool:
        """Whether to grade this form would only hang again; of `RETRY` times, once not."""
        bad = []
        for key, strikes in ((form.whole, 1), (form.exact, STRIKES), (form.shape, STRIKES)):
            count = self._known.get(key)
            if count is not None and count.hung >= max(strikes, count.fine + 1):
                bad.append(count)
        for count in bad:
            count.skipped += 1
        if any(count.skipped <= RETRY * count.hung for count in bad):
            return True
        for count in bad:
            count.skipped, count.again = 0, True
        return False

    def _counts(self, form: Form) -> list[_Count]:
        """Those of a form, which become the newest that are remembered."""
        found = []
        for key in (form.whole, form.exact, form.shape):
            found.append(self._known.setdefault(key, _Count()))
            self._known.move_to_end(key)
        while len(self._known) > REMEMBERED:
            self._known.popitem(last=False)
        return found
