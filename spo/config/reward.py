"""`reward`: what a response earns in training, where that is not the task's own verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from spo import named
from spo.config.ranges import Count, Positive

Finite = Annotated[float, Field(allow_inf_nan=False)]
SHORT = "a function (module:name), a rule ({rule: boxed}), a list of these, or {terms: …}"
WEIGHTS = "expected {function: …, weight: 0.5} for a function with a weight"


@dataclass(frozen=True)
class Term:
    """One of the functions whose weighted results are added up."""

    function: str | None = None
    """`module:name` or `./file.py:name` of a function; docs/own-reward.md has the signatures."""
    rule: str | None = None
    """One that ships: boxed, number, answer, exact, format, overlong."""
    weight: Finite = 1.0
    """What its result is multiplied by."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the rule, or further keyword arguments of the function."""

    def __post_init__(self) -> None:
        if (self.function is None) == (self.rule is None):
            raise ValueError(
                f"expected either function or rule, found {'both' if self.function else 'neither'}"
            )
        if self.function in named.OWN["reward.rule"]:
            raise ValueError(f"{self.function} is a rule: write {{rule: {self.function}}}")

    @property
    def name(self) -> str:
        """What metrics and errors call it."""
        return self.rule or str(self.function).rpartition(":")[2].partition("#")[0]


@dataclass(frozen=True)
class RewardConfig:
    """The sum of the terms, and where and how long they run."""

    terms: tuple[Term, ...]
    process: Literal["worker", "trainer"] = "worker"
    """worker: in the grading process, which is killed at the deadline and has a memory limit.
    trainer: in threads of the trainer's process, for functions that hold a model or a connection.
    There a late call goes on unseen; its response has no reward."""
    timeout_s: Positive = 5.0
    """Deadline of one call."""
    batch: Count = 1
    """trainer: most responses in one call of a function that takes lists."""
    parallel: Count = 16
    """trainer: calls at the same time."""
    success: Finite = 1.0
    """What counts as right in evaluations of a task without a test of its own (`rows`): rewards of
    at least this."""

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("reward.terms: expected at least one term, found none")
        if self.process == "worker" and self.batch > 1:
            raise ValueError(
                "reward.batch: expected 1 in the worker, where a response that fails takes none "
                f"with it, found {self.batch}; reward.process=trainer allows more"
            )


def reward_settings(value: Any) -> dict[str, Any]:
    """The settings of `RewardConfig` that a recipe's `reward` means, however short it is written.

    Raises ValueError with one sentence if it means none.
    """
    if isinstance(value, str):
        return {"terms": [{"function": value}]}
    if isinstance(value, list | tuple):
        if any(isinstance(term, int | float) for term in value):  # a pair (function, weight)
            raise ValueError(f"reward: {WEIGHTS}, found {value!r:.200}")
        return {"terms": [_term(term) for term in value]}
    if not isinstance(value, Mapping):
        raise ValueError(f"reward: expected {SHORT}, found {value!r}")
    _check_keys(value)
    if "terms" in value:
        return dict(value) | {"terms": reward_settings(value["terms"])["terms"]}
    own = {key: value[key] for key in ("function", "rule", "weight", "options") if key in value}
    rest = {key: setting for key, setting in value.items() if key not in own}
    return rest | {"terms": [own]}


def with_simplified(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """A recipe's settings with `reward: {simplified: …}` as the option of its task that it means.

    Raises ValueError if other rewards stand beside it, which are not the task's test.
    """
    reward = tree.get("reward")
    if not isinstance(reward, Mapping) or "simplified" not in reward:
        return tree
    if len(reward) > 1:
        raise ValueError(
            "reward.simplified: expected no other reward beside it, as it belongs to the task's "
            "own test; the rule boxed has options: {simplified: true}"
        )
    if not isinstance(reward["simplified"], bool):
        raise ValueError(
            f"reward.simplified: expected true or false, found {reward['simplified']!r}"
        )
    data = dict(tree.get("data") or {})
    options = dict(data.get("options") or {})
    if reward["simplified"] or "simplified" in options:
        options["simplified"] = reward["simplified"]
    return {**tree, "data": data | {"options": options}, "reward": None}


def _term(term: Any) -> dict[str, Any]:
    if isinstance(term, str):
        return {"function": term}
    if isinstance(term, list | tuple):
        raise ValueError(f"reward.terms: {WEIGHTS}, found {term!r:.200}")
    if not isinstance(term, Mapping):
        raise ValueError(f"reward.terms: expected module:name or a group, found {term!r}")
    _check_keys(term)
    return dict(term)


def _check_keys(value: Mapping[Any, Any]) -> None:
    if any(not isinstance(key, str) or ":" in key for key in value):  # {function: weight}
        raise ValueError(f"reward: {WEIGHTS}, found {value!r:.200}")
