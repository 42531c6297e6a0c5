"""`shape`: what grows under each prompt. A kind is a dataclass in spo/grow/, or from outside the
package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar


@dataclass(frozen=True)
class Growing:
    """What a shape needs from its run."""

    max_new_tokens: int  # maximum length of a response
    tokenizer: Any  # the policy's
    rescore: Callable[[list[int], list[int]], list[float]] | None = None
    """(prefix ids, token ids) -> the trainer's logprobs of the tokens, where it has a trainer."""
    align: int = 1  # tokens per cache block; segments end at the edges of blocks


@dataclass(frozen=True)
class Cost:
    """Upper bounds on what grows under one prompt, if no response ends early."""

    sampled: int  # tokens to train on
    graded: int  # responses
    probed: int = 0  # tokens of probes, which only estimate values


class ShapeConfig:
    """A kind of shape: a frozen dataclass that inherits this; its fields are its settings.

    Only `make` and `cost` must be written.
    """

    siblings: ClassVar[bool] = True
    """Whether a node's trained children are samples of one prefix, and count towards its value."""
    whole_responses: ClassVar[bool] = False
    """Whether every trained node is a whole response."""

    @property
    def rescores(self) -> bool:
        """Whether the shape needs the trainer's logprobs while it grows."""
        return False

    def make(self, growing: Growing) -> Any:
        """The `spo.grow.shapes.Shape`. Raises ValueError if the settings do not fit the run."""
        raise NotImplementedError

    def cost(self, max_new_tokens: int) -> Cost:
        """Cost with responses of at most `max_new_tokens`. Raises ValueError if it is too small."""
        raise NotImplementedError

    def require_whole_responses(self, who: str) -> None:
        """Raise ValueError, naming `who`, unless every trained node is a whole response."""
        if not self.whole_responses:
            raise ValueError(f"{who}: expected shape.kind=star, as it credits whole responses only")
