"""`credit`: what each token is worth. A rule is a dataclass in spo/credit/, or from outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from spo.config.critic import CriticConfig
from spo.config.shape import ShapeConfig

if TYPE_CHECKING:
    from torch import Tensor

    from spo.records import Credit, Forest


class Models(Protocol):
    """The models of a run, as a rule may ask them."""

    def score(
        self,
        names: Sequence[str],  # of policy, reference (logprobs) and critic (values)
        forest: Forest,
        tokens: Tensor,  # (T,) fp32, non-zero where a figure is wanted
        trees: Sequence[int] | None = None,  # all by default
    ) -> list[Tensor]:  # (T,) fp32 for each name, 0 elsewhere
        """Each model's figures as it is now: logprobs of tokens, values of the states before them.

        Under torchrun every rank calls this, and gets the figures of all.
        """
        ...


class Rule:
    """A credit rule: a frozen dataclass that inherits this; its fields are its settings.

    Only `assign` must be written.
    """

    loss: ClassVar[str] = "policy"
    """What reads the credit: policy (masked PPO), or likelihood (-credit * logprob)."""
    critic: CriticConfig | None = None
    """Settings of the critic that the rule asks and trains, if any: a field of such rules."""
    reference: ClassVar[bool] = False
    """Whether the rule asks the start policy."""
    replayable: ClassVar[bool] = False
    """Whether a node's credit stays true in later iterations."""

    def check(self, shape: ShapeConfig) -> None:
        """Raise ValueError where the rule cannot credit what the shape grows."""

    def assign(self, forest: Forest, models: Models) -> Credit:
        """What every token of a rollout is worth."""
        raise NotImplementedError

    def before_step(
        self, forest: Forest, credit: Credit, trees: Sequence[int], models: Models
    ) -> Credit:
        """Called before each optimiser step on `trees`: the credit to train them with. Its figures
        are reported with the step.
        """
        return credit
