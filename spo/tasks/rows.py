"""Any table as a task: its rows are the problems, and the recipe's `reward` judges the responses.

The columns are those of `data.columns`, or have a usual name. TRL's layout (`prompt` as text or as
messages) and verl's (`prompt` as messages, the answer in `reward_model.ground_truth`) are read as
they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from spo.tasks.problem import Missing, Problem, column, is_empty, problem_stream
from spo.tasks.reading import ANSWERS, PROBLEMS, VERL, is_chat, problem_column, read_problems
from spo.tasks.sources import Source

NAME = "rows"


@dataclass(frozen=True)
class Rows:
    """The problems of `data.train` and `data.test`; they need no answers if the reward has none."""

    sources: ClassVar[Mapping[str, str]] = {}
    tested: ClassVar[bool] = False  # it has no test of its own: evaluations ask the reward

    def problems(
        self, split: str, seed: int, source: Source | str | None = None
    ) -> Iterator[Problem]:
        """The rows of a source; see `problem_of` and `read_problems`."""
        return problem_stream(NAME, split, seed, read_problems(NAME, split, source, problem_of))

    def grade(self, text: str, answer: object) -> bool:
        """Raises ValueError: the rows do not say what a right response is."""
        raise ValueError("task rows compares nothing: expected reward in the recipe, found none")


def problem_of(row: dict, where: str) -> Problem:
    """The problem of a row with lower-case column names; `where` names the row in errors.

    Raises Missing if the cell of the problem or of the answer is empty, ValueError if no column
    looks like a problem, or if messages are not as chats have them.
    """
    given, answer = _problem(row, where), _answer(row, where)
    if not is_chat(given):
        if not isinstance(given, str | int | float):
            raise ValueError(f"{where}: expected a text or messages, found {given!r:.80}")
        return Problem(str(given), answer)
    messages = tuple(_message(turn, where) for turn in given)
    if messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}: expected the last message to be the user's, found assistant's")
    said = [turn["content"] for turn in messages if turn["role"] == "user"]
    return Problem((said or [messages[-1]["content"]])[-1], answer, messages)


def _problem(row: dict, where: str) -> Any:
    name = problem_column(row)
    if name is not None:
        return row[name]
    if there := [name for name in PROBLEMS if name in row]:
        raise Missing(where, there)
    raise ValueError(
        f"{where}: expected a column {' or '.join(PROBLEMS)}, found {', '.join(row)}; name the "
        "problem's column in data.columns.problem"
    )


def _answer(row: dict, where: str) -> Any:
    """The answer of a row; None if the table has no column for it."""
    verl, names = row.get(VERL), [name for name in ANSWERS if name in row]
    if isinstance(verl, Mapping) and "ground_truth" in verl:
        if is_empty(verl["ground_truth"]):
            raise Missing(where, [f"{VERL}.ground_truth"])
        return verl["ground_truth"]
    if VERL in row and verl is None and not names:
        raise Missing(where, [VERL])
    return column(row, where, *names) if names else None


def _message(turn: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One turn of a chat, without the fields that the table has and the turn leaves empty."""
    if not isinstance(turn.get("role"), str) or not isinstance(turn.get("content"), str):
        raise ValueError(f"{where}: expected messages with role and content, found {turn!r:.80}")
    return {name: value for name, value in turn.items() if value is not None}
