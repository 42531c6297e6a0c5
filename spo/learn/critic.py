"""A critic: the policy's architecture with a scalar head, on the same packs as the policy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification, PreTrainedModel

from spo.config.policy import PolicyConfig
from spo.learn.model import hidden_states, inside
from spo.learn.policy import load_model
from spo.records import Batch, LossOutput


def load_critic(
    config: PolicyConfig, path: str | None = None, *, limit: int | None = None
) -> PreTrainedModel:
    """A critic that starts from the policy's weights; all its values are 0 at first.

    Args:
        path: a checkpoint's critic folder; by default the recipe's start policy, with a new head.
        limit: longest sequence of the run, in tokens, as of the policy; by default the model's own.

    Raises ValueError with one sentence if it cannot be loaded or packed.
    """
    critic = load_model(
        config, path, auto=AutoModelForTokenClassification, num_labels=1, limit=limit
    )
    if path is None:
        head: Any = critic.score
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
    return critic


def row_values(critic: PreTrainedModel, batch: Batch) -> Tensor:
    """(N,) fp32, the value of the state before every row's token."""
    return inside(critic, _row_values, batch)


def _row_values(critic: PreTrainedModel, batch: Batch) -> Tensor:
    head: Any = critic.score
    values = head(hidden_states(critic, batch))[:, 0].float()
    # Not values[index]: on the CPU its gradient adds the shares of siblings in a varying order.
    return values.index_select(0, batch.hidden_index)


def value_loss(
    critic: PreTrainedModel,
    batch: Batch,
    old_values: Tensor,  # (N,) fp32, when the rows were sampled
    returns: Tensor,  # (N,) fp32
    value_clip: float,
) -> LossOutput:
    """The clipped value loss of PPO; the losses of a step's batches add up.

    1/2 mean of max((v - R)^2, (clip(v, v_old - value_clip, v_old + value_clip) - R)^2). A value
    that has left the clip range towards its target has no gradient.
    """
    errors = clipped_errors(row_values(critic, batch), old_values, returns, value_clip)
    loss = errors.sum() / max(batch.policy_norm, 1.0)
    return LossOutput(loss, {"loss": float(loss.detach())})


def clipped_errors(
    values: Tensor, old_values: Tensor, returns: Tensor, value_clip: float
) -> Tensor:
    """The terms of `value_loss`; all tensors are (N,)."""
    clipped = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 is perfect, 0 is no better than a constant.

    NaN if all returns are equal.
    """
    spread = float(returns.var(correction=0))
    return 1 - float((returns - values).var(correction=0)) / spread if spread else math.nan
