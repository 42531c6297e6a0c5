"""`data`: where a task's problems come from."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from spo.config.ranges import PositiveInt

PROBLEM = "{problem}"  # stands for the problem; other braces are kept
SAME = "same"  # as `data.test`: the training problems
NAMES = ("problem", "answer")  # what `data.columns` may name


@dataclass(frozen=True)
class Part:
    """One data set of a mixture."""

    path: str
    weight: float = 1.0
    columns: dict[str, str] = field(default_factory=dict)


def parts_of(train: Any) -> tuple[Part, ...]:
    """The data sets that `data.train` names. Raises ValueError with one sentence if it is wrong."""
    if train is None or isinstance(train, str):
        return (Part(train),) if train else ()
    if isinstance(train, dict):
        parts = [Part(path, weight) for path, weight in train.items()]
    elif isinstance(train, list | tuple) and all(isinstance(part, dict) for part in train):
        for key in (key for part in train for key in part):
            if key not in ("path", "weight", "columns"):
                raise ValueError(f"data.train: expected path, weight or columns, found {key!s:.80}")
        parts = [Part(**({"path": None} | part)) for part in train]
    else:
        parts = []
    if not parts:
        raise ValueError(
            "data.train: expected a data set, {path: weight} or a list of {path, weight}, found "
            f"{train!r:.80}"
        )
    for part in parts:
        if not isinstance(part.path, str) or not part.path:
            raise ValueError(
                f"data.train: expected a data set in each part, found {part.path!r:.80}"
            )
        number = isinstance(part.weight, int | float) and not isinstance(part.weight, bool)
        if not number or not 0 < part.weight < math.inf:
            raise ValueError(
                f"data.train: expected a positive weight for {part.path:.80}, "
                f"found {part.weight!r:.80}"
            )
        _check_columns(part.columns)
    paths = [part.path for part in parts]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"data.train: expected each data set once, found {path} twice")
    return tuple(parts)


def _check_columns(columns: Any) -> Any:
    if not isinstance(columns, dict):
        raise ValueError(f"data.columns: expected {{problem: column}}, found {columns!r:.80}")
    for name, column in columns.items():
        if name not in NAMES:
            raise ValueError(f"data.columns: expected {' or '.join(NAMES)}, found {name!s:.80}")
        if not isinstance(column, str) or not column:
            raise ValueError(f"data.columns.{name}: expected a column's name, found {column!r:.80}")
    return columns


def _check_train(train: Any) -> Any:
    parts_of(train)
    return train


def _check_test(test: Any) -> Any:
    if test is not None and not isinstance(test, str):
        raise ValueError(
            f"expected one data set (file, folder or owner/name) or {SAME}, found "
            f"{type(test).__name__}; rows in memory go in the argument `data` of spo.train"
        )
    return test


Train = Annotated[
    str | dict[str, float] | list[dict[str, Any]] | None, BeforeValidator(_check_train)
]
Test = Annotated[str | None, BeforeValidator(_check_test)]
Columns = Annotated[dict[str, str], BeforeValidator(_check_columns)]
WRITES = ("template", "system", "messages", "thinking", "chat_options", "date")  # the prompt


@dataclass(frozen=True)
class DataConfig:
    """Where a task's problems come from, and how they become prompts."""

    train: Train = None
    """File, folder or hub data set (owner/name, owner/name@revision) of the training problems, with
    `:configuration` and `#split` where it has several; by default the task's own. A mixture is
    {path: weight}, or a list of {path, weight, columns}."""
    test: Test = None
    """One data set of the test problems, or `same`: the training problems. By default the task's
    own, or the test split of `data.train`."""
    test_share: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Hold this share of the training problems out as the test problems."""
    columns: Columns = field(default_factory=dict)
    """The columns of the data, in any case: {problem: question, answer: final}; by default those
    with a usual name. A dot leads into a column: reward_model.ground_truth."""
    template: str = PROBLEM
    """A prompt of plain text, with `{problem}` for the problem. Special tokens are those that it
    spells out, the first one (such as <bos>) included; other braces are kept."""
    system: str | None = None
    """A chat in the tokenizer's own chat template: this system text, then the problem as the user's
    turn."""
    messages: tuple[dict[str, str], ...] = ()
    """The same with turns of your own, each with `role` and `content`; one holds `{problem}`."""
    thinking: bool | None = None
    """Chat: what the template's switch `enable_thinking` says; by default the template decides."""
    chat_options: dict[str, Any] = field(default_factory=dict)
    """Chat: other variables of the template, such as `reasoning_effort: low`."""
    date: datetime.date = datetime.date(2025, 1, 1)
    """Chat: today, for templates that say so: a resumed run has the same prompts on another day."""
    max_prompt_tokens: PositiveInt | None = None
    """Training problems with longer prompts are left out."""
    # A smaller one would pass over thousands of prompts for each drawn, once all are solved.
    difficulty: Annotated[float, Field(ge=0.001, lt=1)] | None = None
    """Probability of drawing a training problem whose last tree had zero variance: all responses
    were right, or all wrong. By default every problem is drawn. Only for tasks that read data sets,
    whose problems come again."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the task: numbers of countdown, people of knights_knaves."""

    def __post_init__(self) -> None:
        if self.template.count(PROBLEM) != 1:
            raise ValueError(f"data.template: expected {{problem}} once, found {self.template!r}")
        if self.test is not None and self.test_share is not None:
            raise ValueError(f"data.test_share: expected no data.test beside it, found {self.test}")
        if self.columns and self.train is None and self.test is None:
            raise ValueError("data.columns: expected data.train or data.test beside it")
        if self.template != PROBLEM and self.chat:
            raise ValueError(
                "data.template: expected none beside data.system or data.messages, which use the "
                f"tokenizer's chat template, found {self.template!r}"
            )
        if self.messages:
            self._check_messages()

    def _check_messages(self) -> None:
        if self.system is not None:
            raise ValueError("data.system: expected none beside data.messages; write it there")
        for message in self.messages:
            if set(message) != {"role", "content"}:
                raise ValueError(f"data.messages: expected role and content, found {message}")
        if sum(message["content"].count(PROBLEM) for message in self.messages) != 1:
            raise ValueError("data.messages: expected {problem} in one of them, once")
        if self.messages[-1]["role"] == "assistant":
            raise ValueError("data.messages: expected the last one to be the user's")

    @property
    def chat(self) -> tuple[dict[str, str], ...]:
        """The messages of a prompt, with `{problem}` for the problem; () for plain text."""
        if self.system is None:
            return self.messages
        turns = {"system": self.system, "user": PROBLEM}
        return tuple({"role": role, "content": text} for role, text in turns.items())
