"""What a response earns: the weighted sum of the functions that a recipe or a caller names."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo import named
from spo.fingerprint import fingerprint, unread
from spo.signatures import LARGEST, Function, Response

if TYPE_CHECKING:
    from spo.config.reward import RewardConfig, Term

KEY = "reward.function"  # where a recipe names a function
TRACE_LINES = 12  # of a function's traceback that are shown
ROUNDING = 1e-6  # by which a weighted sum may miss what it is compared with, as weights round


class FailedReward(UserWarning):
    """A response has no reward: one sentence, and below it, indented, where that comes from."""


@dataclass(frozen=True)
class Result:
    """What the terms of a reward say of one response."""

    reward: float | None  # their weighted sum; None: no reward, which is never a zero
    parts: tuple[float | None, ...] = ()  # of each term, without its weight; None: does not apply
    reason: str | None = None  # why there is none
    trace: str = ""  # where the function failed


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

    def check(self, columns: Mapping[str, Any], has_answer: bool) -> None:
        """Raise ValueError if a function needs a column, or the answer, and the data have none."""
        for function, _ in self.terms:
            function.check(columns, has_answer)

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
            names = ", ".join(dict.fromkeys(self.names))
            reason = f"no reward function applies to it: {names} returned None"
            return Result(None, tuple(parts), reason)
        total = math.fsum(weighted)
        if not abs(total) <= LARGEST:
            reason = f"expected a weighted sum that is finite in float32, found {total:g}"
            return Result(None, tuple(parts), reason)
        return Result(total, tuple(parts))


def reward_of(config: RewardConfig, folder: Path | None = None) -> Reward:
    """The reward that a recipe names. Raises ValueError with one sentence if it cannot be made.

    Args:
        folder: in which relative files are searched first.
    """
    return Reward([(_function(term, folder), term.weight) for term in config.terms])


def is_right(reward: float, success: float) -> bool:
    """Whether a reward counts as right, `reward.success`; sums of weights may miss it a little."""
    return reward >= success - ROUNDING * max(1.0, abs(success))


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
        return named.keep(reward, fingerprint(reward, place), unread(reward))
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


def printable(text: str) -> str:
    """The same lines, with what would steer a terminal spelled out."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


async def _awaited(coroutine: Any) -> Any:
    return await coroutine
