"""How a layer runs when it trains: its activations computed again for the backward, or compiled."""

from __future__ import annotations

import os
import shutil
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
    for layer in _layers(model, "policy.gradient_checkpointing"):
        layer.forward = wraps(layer.forward)(partial(_recomputed, layer.forward))


def compile_layers(model: PreTrainedModel) -> None:
    """Let PyTorch fuse what every layer does between its products and attention, in place.

    The first backward compiles, for about half a minute, for packs of every size. A forward without
    gradients runs as before. Call it before `checkpoint_layers`, so that what is recomputed is
    compiled too.

    Raises ValueError with one sentence if transformers names no layers of this model, or if a CPU's
    code cannot be compiled.
    """
    layers = _layers(model, "policy.compile")
    compiler = os.environ.get("CXX", "g++")  # as PyTorch finds it
    if model.device.type == "cpu" and shutil.which(compiler) is None:
        raise ValueError(
            f"policy.compile: expected a C++ compiler, found none named {compiler} (CXX)"
        )
    for layer in layers:
        fused = torch.compile(layer.forward, dynamic=True)
        layer.forward = wraps(layer.forward)(partial(_compiled, layer.forward, fused))


def _layers(model: PreTrainedModel, key: str) -> list[GradientCheckpointingLayer]:
    layers = [x for x in body(model).modules() if isinstance(x, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"{key}: expected a model whose layers transformers can checkpoint, "
            f"{type(model).__name__} has none"
        )
    return layers


def _compiled(forward: Any, fused: Any, *args: Any, **kwargs: Any) -> Any:
    return (fused if torch.is_grad_enabled() else forward)(*args, **kwargs)


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
