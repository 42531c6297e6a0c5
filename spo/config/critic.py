"""`credit.critic`: the model that some credit rules learn beside the policy."""

from __future__ import annotations

from dataclasses import dataclass

from spo.config.ranges import Positive


@dataclass(frozen=True)
class CriticConfig:
    """A critic; it starts from the policy's weights."""

    learning_rate: Positive = 1e-5
    """Peak learning rate of its AdamW; it rises and decays with the policy's."""
    value_clip: Positive = 0.2
    """Maximum distance that training moves a value from its value at the rollout."""
