"""Gradient checkpointing: a layer's activations are computed again when its gradient needs them.

Only the input of each layer is kept from the forward to the backward.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from spo.learn.attention import attending_again
from spo.models.load import body


def checkpoint_layers(model: PreTrainedModel) -> None:
    """Let every layer of the model's body recompute its activations in the backward, in place.

    transformers' own switch does so only in train mode, which would turn dropout on. Random numbers
    are those of the forward, and so is the pack that the layer attends over. A forward without
    gradients is as before.

    Raises ValueError with one sentence if transformers cannot checkpoint layers of this model.
    """
    layers = [x for x in body(model).modules() if isinstance(x, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            "policy.gradient_checkpointing: expected a model whose layers transformers can "
            f"checkpoint, {type(model).__name__} has none"
        )
    for layer in layers:
        layer.forward = wraps(layer.forward)(partial(_recomputed, layer.forward))


def _recomputed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    again = attending_again()
    return checkpoint(
        forward,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), again),
        **kwargs,
    )
