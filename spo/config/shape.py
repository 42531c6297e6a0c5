"""`shape`: what grows under each prompt. A kind is a dataclass in spo/grow/, or from outside."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Growing:
    """What a run gives the shape that grows in it."""

    max_new_tokens: int  # longest response
    tokenizer: Any  # the policy's
    rescore: Callable[[list[int], list[int]], list[float]] | None = None
    """(prefix ids, token ids) -> the trainer's logprobs of the tokens, where it has a trainer."""
    align: int = 1  # tokens of a cache block that segments shall end at the edge of


@dataclass(frozen=True)
class Cost:
    """Upper bounds on what grows under one prompt, where no response ends early."""

    sampled: int  # tokens to be trained on
    graded: int  # responses
    probed: int = 0  # tokens that estimate values only


class ShapeConfig:
    """A kind of shape: a frozen dataclass that inherits this; its fields are its settings.

    Only `make` and `cost` must be written.
    """

    siblings: ClassVar[bool] = True
    """Whether a node's trained children are samples of one prefix that its value counts."""
    whole_responses: ClassVar[bool] = False
    """Whether every trained node is a whole response."""

    @property
    def rescores(self) -> bool:
        """Whether the shape asks for the trainer's logprobs while it grows."""
        return False

    def make(self, growing: Growing) -> Any:
        """The `spo.grow.shapes.Shape`. Raises ValueError where the settings do not fit the run."""
        raise NotImplementedError

    def cost(self, max_new_tokens: int) -> Cost:
        """With responses of at most so many tokens. Raises ValueError where they are too few."""
        raise NotImplementedError

    def require_whole_responses(self, who: str) -> None:
        """Raise ValueError for `who` that credits nothing but whole responses."""
        if not self.whole_responses:
            raise ValueError(f"{who} credits whole responses: it needs shape.kind=star")
