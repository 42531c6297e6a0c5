"""The interface of a task, for your own tasks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field
from typing import Any, ClassVar, Protocol

from spo.tasks.problem import Problem


class Task(Protocol):
    """Problems and the grader of their answers: a frozen dataclass whose fields are its settings.

    A recipe names it, `task: ./my_task.py:MyTask`, and sets its fields under `data.options`. They
    are checked by their annotations, ranges included: `Annotated[int, annotated_types.Ge(2)]`.

    Three attributes are optional. `sources` maps "train" and "test" to the hub ids that are read if
    the recipe names no data; a task that has it, if empty, generates no problems.
    `prepare(self) -> None` loads what `grade` needs, such as slow libraries, before the worker's
    deadline starts to count; the top of the module can do so too. `answer(self, text: str) -> str |
    None` is the answer that a response gives, written so that equal answers are equal texts, or
    None; with it evaluations take majority votes. It runs where `grade` does.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]  # of every dataclass

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """The problems of "train", endless and drawn from `seed`, or of "test", always the same.

        Evaluations take the first `eval.problems` of "test", so these come in a mixed order.

        A task that reads data sets has a third parameter `source: Source | None = None`, the
        recipe's `data.train` or `data.test` as a path (of a mixture it is called once for each
        set); `spo.tasks.reading.read_problems` reads it. Evaluations draw from such problems.
        Raises ValueError with one sentence for another split and for data that cannot be read.
        """
        ...

    def grade(self, text: str, answer: object) -> bool:
        """Whether `text`, a response, is right; `answer` is the problem's, a JSON value.

        It runs in a worker process with a deadline and a memory limit, which cannot write files and
        is killed if it exceeds the limits. An exception is a failed grading, never a zero.
        """
        ...
