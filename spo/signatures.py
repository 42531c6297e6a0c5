"""Reward functions in the signatures of this package, of TRL and of verl."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LARGEST = (2 - 2**-23) * 2.0**127  # float32, which forests hold, has no finite number above it


@dataclass(frozen=True)
class Response:
    """What a reward may know of one response."""

    prompt: str  # as the model read it
    response: str
    answer: Any  # the problem's, a JSON value
    columns: Mapping[str, Any] = field(default_factory=dict)  # the other columns of its row
    response_ids: Sequence[int] = ()
    truncated: bool = False  # cut by the limit of tokens
    has_answer: bool = True  # False: the data have none, and functions are given none


class Function:
    """A reward function of any signature, called with a list of responses.

    Signatures, told apart by the names of their parameters:

    - `(prompt, response, answer, **columns) -> float`: any of these, of `response_ids`,
      `num_tokens`, `truncated` and of the data's columns, by name;
    - TRL's `(prompts, completions, **columns) -> list of float`: lists over responses, chat
      messages where the data's prompts are messages;
    - verl's `compute_score(data_source, solution_str, ground_truth, extra_info) -> float or dict
      with "score"`, and with plural names the same over lists.

    Each may be a coroutine function. None as a result means that the function does not apply.
    """

    def __init__(self, name: str, function: Callable[..., Any], options: Mapping[str, Any]):
        self.name, self.function, self._options = name, function, dict(options)
        calls = (function, type(function).__call__)
        self.is_async = any(inspect.iscoroutinefunction(call) for call in calls)
        try:
            parameters = inspect.signature(function).parameters
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward: {name} has no signature to read ({error})") from error
        named = [p for p in parameters.values() if p.kind is not p.VAR_POSITIONAL]
        self._any = any(p.kind is p.VAR_KEYWORD for p in named)
        self._known = {p.name for p in named if p.kind is not p.VAR_KEYWORD}
        positional = [p.name for p in named if p.kind is p.POSITIONAL_ONLY]
        if parameters and not named:
            positional = [f"*{name}" for name in parameters]
        if positional:
            raise ValueError(
                f"reward: expected parameters of {name} that can be given by name, "
                f"{', '.join(positional)} cannot"
            )
        if unknown := sorted(self._options.keys() - self._known if not self._any else ()):
            raise ValueError(f"reward: {name} has no parameter {', '.join(unknown)}")
        self._needed = {p.name for p in named if p.default is p.empty and p.name in self._known}
        self._needed -= self._options.keys()
        kinds = {"completions": _trl, "solution_strs": _verl_lists, "solution_str": _verl}
        found = [name for name in kinds if name in self._known]
        self.takes_lists = bool(found) and found[0] != "solution_str"
        self._arguments = kinds[found[0]] if found else _own

    def asks(self, parameter: str) -> bool:
        """Whether the function names this parameter."""
        return parameter in self._known

    def check(self, columns: Mapping[str, Any], has_answer: bool) -> None:
        """Raise ValueError if it needs a column, or the answer, and the data have none."""
        given = self._arguments([Response("", "", None, columns, has_answer=has_answer)])
        if missing := sorted(self._needed - given.keys()):
            own = ", ".join(name for name in given if name not in columns)
            names = ", ".join(columns) or "none"
            hint = "" if has_answer else "; data.columns.answer names the column of the answer"
            raise ValueError(
                f"reward: {self.name} needs {', '.join(missing)}; besides {own} the data have the "
                f"columns: {names}{hint}"
            )

    def call(self, responses: Sequence[Response]) -> Any:
        """What the function returns for these responses: one, unless it takes lists."""
        given = self._arguments(responses)
        if not self._any:
            given = {key: value for key, value in given.items() if key in self._known}
        return self.function(**given | self._options)

    def results(self, returned: Any, count: int) -> list[float | None]:
        """What was returned as one number per response. Raises ValueError if it is none."""
        if not self.takes_lists:
            return [self._number(returned)]
        if isinstance(returned, str | Mapping) or not hasattr(returned, "__len__"):
            raise ValueError(f"expected {self.name} to return a list, found {returned!r:.80}")
        if len(returned) != count:
            raise ValueError(f"expected {count} rewards of {self.name}, found {len(returned)}")
        return [self._number(value) for value in returned]

    def _number(self, value: Any) -> float | None:
        if isinstance(value, Mapping):
            if "score" not in value:
                found = ", ".join(map(str, value)) or "nothing"
                raise ValueError(
                    f"expected 'score' in the dict that {self.name} returns, found {found:.80}"
                )
            value = value["score"]
        if value is None:
            return None
        try:
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not abs(number) <= LARGEST:
            raise ValueError(
                f"expected a number of {self.name} that is finite in float32, found {value!r:.80}"
            )
        return number


def _own(responses: Sequence[Response]) -> dict[str, Any]:
    (one,) = responses
    own = {"prompt": one.prompt, "response": one.response, "truncated": one.truncated}
    own |= {"response_ids": list(one.response_ids), "num_tokens": len(one.response_ids)}
    return {**one.columns, **own} | ({"answer": one.answer} if one.has_answer else {})


def _trl(responses: Sequence[Response]) -> dict[str, Any]:
    prompts = [one.columns.get("prompt", one.prompt) for one in responses]
    completions = [
        one.response
        if isinstance(prompt, str)
        else [{"role": "assistant", "content": one.response}]
        for one, prompt in zip(responses, prompts, strict=True)
    ]
    names = dict.fromkeys(name for one in responses for name in one.columns if name != "prompt")
    columns = {name: [one.columns.get(name) for one in responses] for name in names}
    if any(one.has_answer for one in responses):
        columns.setdefault("answer", [one.answer for one in responses])
    ids = [list(one.response_ids) for one in responses]
    return {**columns, "prompts": prompts, "completions": completions, "completion_ids": ids}


def _verl(responses: Sequence[Response]) -> dict[str, Any]:
    (one,) = responses
    given = {
        "data_source": one.columns.get("data_source"),
        "solution_str": one.response,
        "extra_info": one.columns.get("extra_info") or {},  # as verl gives it
    }
    return given | ({"ground_truth": one.answer} if one.has_answer else {})


def _verl_lists(responses: Sequence[Response]) -> dict[str, Any]:
    each = [_verl([one]) for one in responses]
    names = dict.fromkeys(name for row in each for name in row)
    return {f"{name}s": [row.get(name) for row in each] for name in names}
