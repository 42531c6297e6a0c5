"""Rewards that ship: each a dataclass whose fields are its settings, named by `reward.rule`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt

from spo.tasks.answers import after_think, exact_number
from spo.tasks.math import Math
from spo.tasks.problem import answer_span

_NUMBERS = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?")


@dataclass(frozen=True)
class Boxed:
    """1 if the last `\\boxed{}` equals the answer, as numbers or as expressions."""

    simplified: bool = False
    """Whether it must also take no more operations to work out than the answer."""

    def prepare(self) -> None:
        """Load what it needs, before the deadline starts to count."""
        Math().prepare()

    def __call__(self, response: str, answer: str) -> float:
        return float(Math(self.simplified).grade(response, answer))


@dataclass(frozen=True)
class Number:
    """1 if the last number of the response equals the answer, exactly."""

    def __call__(self, response: str, answer: object) -> float:
        found = _NUMBERS.findall(after_think(response))
        given = exact_number(found[-1]) if found else None
        return float(given is not None and given == exact_number(str(answer)))


@dataclass(frozen=True)
class Answer:
    """1 if the last `<answer> … </answer>` holds the answer, spaces around it aside."""

    def __call__(self, response: str, answer: object) -> float:
        return float(answer_span(response) == str(answer).strip())


@dataclass(frozen=True)
class Exact:
    """1 if what follows the thinking is the answer, spaces around it aside."""

    def __call__(self, response: str, answer: object) -> float:
        return float(after_think(response).strip() == str(answer).strip())


@dataclass(frozen=True)
class Format:
    """1 if the whole response matches a regular expression; `.` matches line breaks too."""

    pattern: str = r".*</think>\s*\S.*"

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern: not a regular expression ({error})") from error

    def __call__(self, response: str) -> float:
        return float(re.fullmatch(self.pattern, response, re.DOTALL) is not None)


@dataclass(frozen=True)
class Overlong:
    """DAPO's penalty of long responses (arXiv 2503.14476, equation 13), from 0 down to -1.

    0 up to max_tokens - buffer_tokens, then falling in a line, -1 from max_tokens on.
    """

    max_tokens: Annotated[int, Gt(0)]
    buffer_tokens: Annotated[int, Ge(1)]

    def __post_init__(self) -> None:
        if self.buffer_tokens > self.max_tokens:
            raise ValueError(
                f"buffer_tokens: expected at most max_tokens={self.max_tokens}, found "
                f"{self.buffer_tokens}"
            )

    def __call__(self, num_tokens: int, truncated: bool) -> float:
        over = num_tokens - (self.max_tokens - self.buffer_tokens)
        return -1.0 if truncated else -min(max(over / self.buffer_tokens, 0.0), 1.0)
