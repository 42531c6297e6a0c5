"""What a task is, for those who bring their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field
from typing import Any, ClassVar, Protocol

from spo.tasks.problem import Problem


class Task(Protocol):
    """Problems and the grader of their answers: a frozen dataclass whose fields are its settings.

    A recipe names it, `task: ./my_task.py:MyTask`, and sets its fields under `data.options`; they
    are checked by their annotations, ranges included: `Annotated[int, annotated_types.Ge(2)]`.
    Two attributes are optional. `sources`, a mapping from "train" and "test" to hub ids, says what
    is read where the recipe names no data. `prepare(self) -> None` loads what `grade` needs, before
    the clock of the grading worker runs: libraries and tables that take their time belong there or
    at the top of the module.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # of every dataclass

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """The problems of "train", endless and drawn from `seed`, or of "test", always the same.

        A task that reads data sets takes `source: str | None = None` as well: what the recipe's
        `data.train` or `data.test` names. Raises ValueError with one sentence for another split
        and for data that cannot be read.
        """
        ...

    def grade(self, text: str, answer: object) -> bool:
        """Whether `text`, a response, is right; `answer` is the problem's, a JSON value.

        It runs in a worker process that can be killed: writing no file, with a deadline and a
        limit on memory. An exception is a grading without a verdict, never a zero.
        """
        ...
