"""What a response earns: functions in the signatures of this package, of TRL and of verl."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo import named
from spo.fingerprint import fingerprint

if TYPE_CHECKING:
    from spo.config.reward import RewardConfig, Term

KEY = "reward.function"  # where a recipe names a function
TRACE_LINES = 12  # of a function's traceback that are shown
OWN = ("prompt", "response", "answer", "response_ids", "num_tokens", "truncated")
"""What a function of this package's signature may ask for by name; the rest are columns."""


class FailedReward(UserWarning):
    """A response has no reward: one sentence, and below it, indented, where that comes from."""


@dataclass(frozen=True)
class Response:
    """What a reward may know of one response."""

    prompt: str  # as the model read it
    response: str
    answer: Any  # the problem's, a JSON value
    columns: Mapping[str, Any] = field(default_factory=dict)  # the other columns of its row
    response_ids: Sequence[int] = ()
    truncated: bool = False  # cut by the limit of tokens


@dataclass(frozen=True)
class Result:
    """What the terms of a reward say of one response."""

    reward: float | None  # their weighted sum; None: no reward, which is never a zero
    parts: tuple[float | None, ...] = ()  # of each term, without its weight; None: does not apply
    reason: str | None = None  # why there is none
    trace: str = ""  # where the function failed


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
        if positional := [p.name for p in named if p.kind is p.POSITIONAL_ONLY]:
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

    def check(self, columns: Mapping[str, Any]) -> None:
        """Raise ValueError if it needs a column that the data do not have."""
        given = self._arguments([Response("", "", None, columns)])
        if missing := sorted(self._needed - given.keys()):
            names = ", ".join(columns) or "none"
            raise ValueError(
                f"reward: {self.name} needs {', '.join(missing)}; besides {', '.join(OWN)} the "
                f"data have the columns: {names}"
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
            value = value.get("score")
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"expected a finite reward of {self.name}, found {value!r:.80}")
        return number


class Reward:
    """The weighted sum of functions."""

    def __init__(self, terms: Sequence[tuple[Function, float]]):
        self.terms = tuple(terms)

    @property
    def functions(self) -> tuple[Callable[..., Any], ...]:
        """What the terms call; a `prepare` of theirs loads what they need."""
        return tuple(function.function for function, _ in self.terms)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(function.name for function, _ in self.terms)

    def asks(self, parameter: str) -> bool:
        """Whether one of the functions names this parameter."""
        return any(function.asks(parameter) for function, _ in self.terms)

    def check(self, columns: Mapping[str, Any]) -> None:
        """Raise ValueError if a function needs a column that the data do not have."""
        for function, _ in self.terms:
            function.check(columns)

    def __call__(self, response: Response) -> Result:
        """The reward of one response, here and now."""
        try:
            parts = []
            for function, _ in self.terms:
                returned = function.call([response])
                if function.is_async:
                    returned = asyncio.run(_awaited(returned))
                parts += function.results(returned, 1)
        except Exception as error:  # of the user's code
            return failed(error)
        return self.total(parts)

    def total(self, parts: Sequence[float | None]) -> Result:
        """The sum of the terms that apply."""
        weighted = [
            weight * part
            for (_, weight), part in zip(self.terms, parts, strict=True)
            if part is not None
        ]
        if not weighted:
            return Result(None, tuple(parts), "no reward function applies to it")
        return Result(sum(weighted), tuple(parts))


def reward_of(config: RewardConfig, folder: Path | None = None) -> Reward:
    """The reward that a recipe names. Raises ValueError with one sentence if it cannot be made.

    Args:
        folder: in which relative files are searched first.
    """
    return Reward([(_function(term, folder), term.weight) for term in config.terms])


def check_reward(config: RewardConfig | None, truncated: str, task: str) -> None:
    """Raise ValueError if nobody says what a response of `task`, or one that was cut, is worth.

    Args:
        truncated: the recipe's `sampling.truncated`.
    """
    if config is None:
        if not getattr(named.find("task", task), "tested", True):
            raise ValueError(
                f"task={task}: expected a reward in the recipe, as the task tests nothing, such as "
                "reward={rule: exact}"
            )
        if truncated == "reward":
            raise ValueError(
                "sampling.truncated=reward: expected a reward in the recipe, found none"
            )
        return
    if not all(named.is_here(term.function) for term in config.terms):
        return  # a Python caller's; the run says so when it asks for it
    reward = reward_of(config)
    if reward.asks("truncated") and truncated != "reward":
        raise ValueError(
            f"reward: {', '.join(reward.names)} asks whether a response was truncated: expected "
            f"sampling.truncated=reward, found {truncated}"
        )


def reward_given(reward: Any, place: int = 0) -> Any:
    """A reward as recipes write it, of one that a Python caller gives: functions get a name.

    Args:
        place: of the reward in a list.
    """
    if isinstance(reward, list | tuple):
        return [reward_given(one, index) for index, one in enumerate(reward)]
    if isinstance(reward, Mapping):
        keys = reward.keys() & {"function", "terms"}
        return {**reward, **{key: reward_given(reward[key], place) for key in keys}}
    if callable(reward):
        return named.keep(reward, fingerprint(reward, place))
    return reward


def with_full_names(config: RewardConfig, folder: Path | None = None) -> RewardConfig:
    """The same with names that are valid from any folder."""
    terms = [
        term
        if term.function is None or not named.is_here(term.function)
        else dataclasses.replace(term, function=named.function(KEY, term.function, folder)[1])
        for term in config.terms
    ]
    return dataclasses.replace(config, terms=tuple(terms))


def _function(term: Term, folder: Path | None) -> Function:
    if term.rule is not None:
        kind = named.find("reward.rule", term.rule)
        where = f"reward.options of rule {term.rule}"
        return Function(term.name, named.build(kind, term.options, where), {})
    assert term.function is not None
    return Function(term.name, named.function(KEY, term.function, folder)[0], term.options)


def failed(error: BaseException) -> Result:
    """The result of a function that raised."""
    lines = traceback.format_exception(type(error), error, error.__traceback__)
    trace = "".join(lines).rstrip().splitlines()
    return Result(
        None,
        reason=" ".join(f"{type(error).__name__}: {error}".split())[:1000],
        trace="\n".join(trace[-TRACE_LINES:]),
    )


async def _awaited(coroutine: Any) -> Any:
    return await coroutine


def _own(responses: Sequence[Response]) -> dict[str, Any]:
    (one,) = responses
    own = {"prompt": one.prompt, "response": one.response, "answer": one.answer}
    own |= {"response_ids": list(one.response_ids), "num_tokens": len(one.response_ids)}
    return {**one.columns, **own, "truncated": one.truncated}


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
    columns.setdefault("answer", [one.answer for one in responses])
    ids = [list(one.response_ids) for one in responses]
    return {**columns, "prompts": prompts, "completions": completions, "completion_ids": ids}


def _verl(responses: Sequence[Response]) -> dict[str, Any]:
    (one,) = responses
    return {
        "data_source": one.columns.get("data_source"),
        "solution_str": one.response,
        "ground_truth": one.answer,
        "extra_info": one.columns.get("extra_info") or {},  # as verl gives it
    }


def _verl_lists(responses: Sequence[Response]) -> dict[str, Any]:
    each = [_verl([one]) for one in responses]
    plural = {
        "data_source": "data_sources",
        "solution_str": "solution_strs",
        "ground_truth": "ground_truths",
        "extra_info": "extra_infos",
    }
    return {many: [row[one] for row in each] for one, many in plural.items()}
