"""`credit`: what each token is worth. A rule is a dataclass in spo/credit/, or from outside the
package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Protocol

from spo.config.critic import CriticConfig
from spo.config.shape import ShapeConfig

if TYPE_CHECKING:
    from torch import Tensor

    from spo.records import Credit, Forest


class Models(Protocol):
    """The models of a run, as a credit rule may use them."""

    def score(
        self,
        names: Sequence[str],  # among policy, reference (logprobs) and critic (values)
        forest: Forest,
        tokens: Tensor,  # (T,) fp32, non-zero where a score is wanted
        trees: Sequence[int] | None = None,  # all by default
    ) -> list[Tensor]:  # (T,) fp32 for each name, 0 elsewhere
        """Each model's present scores: logprobs of tokens, or values of the states before them.

        Under torchrun every rank calls this, and receives the scores of all ranks.
        """
        ...


class Rule:
    """A credit rule: a frozen dataclass that inherits this; its fields are its settings.

    Only `assign` must be written.
    """

    loss: ClassVar[str] = "policy"
    """The loss that reads the credit: policy (masked PPO), or likelihood (-credit * logprob)."""
    critic: CriticConfig | None = None
    """Settings of the critic that the rule uses and trains; a field of rules that have one."""
    reference: ClassVar[bool] = False
    """Whether the rule uses the reference: the start policy, or the one that
    `train.reference_every` puts in its place."""
    replayable: ClassVar[bool] = False
    """Whether a node's credit stays true in later iterations."""

    compares: ClassVar[bool] = False
    """Whether one response to a prompt alone has no credit, as it is compared with others."""

    def check(self, shape: ShapeConfig) -> None:
        """Raise ValueError if the rule cannot credit what the shape grows."""

    def assign(self, forest: Forest, models: Models) -> Credit:
        """Credit of every token of a rollout."""
        raise NotImplementedError

    def before_step(
        self, forest: Forest, credit: Credit, trees: Sequence[int], models: Models
    ) -> Credit:
        """The credit to train `trees` with; called before each optimiser step on them.

        Its figures are reported with the step.
        """
        return credit
