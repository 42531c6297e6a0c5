"""The weight that a model's head multiplies with, adapters included.

Of peft's layers it needs their attributes only, so peft is not imported.
"""

from __future__ import annotations

import gc
import itertools
import sys
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

MOST_SEARCHES = 16  # of a process: a loop that makes a new parameter each time must not pay for it
_checked: dict[int, weakref.ref[Tensor]] = {}  # weights by id; a tensor has no usable ==
_searches = itertools.count()


def head_weight(
    model: nn.Module,  # a model with `get_output_embeddings` or `lm_head`, or the head itself
) -> Tensor:  # (V, D), differentiable
    """The weight for `linear_masked_ppo_loss` and `linear_token_logprobs`, adapters merged in.

    Without an adapter it is `lm_head.weight`. For LoRA it is W + scaling * B @ A, summed over the
    active adapters, in the widest of their dtypes: a new (V, D) tensor for each call. For
    `modules_to_save` and `trainable_token_indices` it is what the active adapter trains. Merged and
    disabled adapters count as in the layer's own forward.

    Raises ValueError for a head that has no such weight: quantised, with dropout between hidden
    states and adapter while it trains, with a bias in the adapter, or with an adapter of another
    kind. Warns if `model` is a DistributedDataParallel whose forward is not running.
    """
    if isinstance(model, DistributedDataParallel) and _active_ddp() is None:
        warnings.warn(
            "head_weight: gradients of what is computed outside the forward of "
            "DistributedDataParallel are not synchronised; wrap FusedPolicyLoss(model) in it",
            RuntimeWarning,
            stacklevel=2,
        )
    weight = _weight(output_layer(model))
    if not (isinstance(weight, Tensor) and weight.is_floating_point()):
        raise ValueError(
            "head_weight: expected a floating-point weight, found "
            f"{getattr(weight, 'dtype', type(weight).__name__)}; dequantise the head"
        )
    return weight


def output_layer(model: nn.Module) -> Any:
    """The layer that makes the logits; ValueError if there is none."""
    model = unwrapped(model)
    find = getattr(model, "get_output_embeddings", None)
    layer = find() if find is not None else getattr(model, "lm_head", model)
    if layer is None or not (hasattr(layer, "weight") or hasattr(layer, "original_module")):
        raise ValueError(
            "head_weight: expected a model with get_output_embeddings() or lm_head, or a layer "
            f"with a weight, found {type(model).__name__}"
        )
    return layer


def unwrapped(model: Any) -> Any:
    """The model inside DDP, FSDP, torch.compile and peft, as far as they wrap it."""
    for name in ("module", "_fsdp_wrapped_module", "_orig_mod"):
        inner = getattr(model, name, None)
        if isinstance(inner, nn.Module):
            return unwrapped(inner)
    find = getattr(model, "get_base_model", None)  # of a PeftModel
    return model if find is None else find()


def head_bias(layer: Any) -> Tensor | None:
    """The bias (V,) of the head, that of `modules_to_save` if they are trained."""
    bias = getattr(layer, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _weight(layer: Any) -> Any:
    if hasattr(layer, "modules_to_save") or hasattr(layer, "token_adapter"):
        names = [] if layer.disable_adapters else list(layer.active_adapters)
        if hasattr(layer, "token_adapter"):
            merged = layer.token_adapter.merged
            base = layer.token_adapter.base_layer.weight
            return layer.token_adapter.get_merged_weights(names) if names and not merged else base
        return _weight(layer.modules_to_save[names[0]] if names else layer.original_module)
    if not hasattr(layer, "get_base_layer"):
        return layer.weight
    if not hasattr(layer, "lora_A"):
        raise ValueError(
            f"head_weight: expected a LoRA adapter, found {type(layer).__name__}; merge it or "
            "leave the head out of target_modules"
        )
    return _with_lora(layer)


def _with_lora(layer: Any) -> Tensor:
    if layer.disable_adapters and layer.merged:
        layer.unmerge()  # as its forward does
    weight, flip = _weight(layer.base_layer), getattr(layer, "fan_in_fan_out", False)
    if not (layer.disable_adapters or layer.merged):
        for name in layer.active_adapters:
            if name in layer.lora_A:
                _check_lora(layer, name)
                with torch.autocast(weight.device.type, enabled=False):
                    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
                    delta = (b @ a) * layer.scaling[name]
                    weight = weight + (delta.T if flip else delta)
    return weight.T if flip else weight


def _check_lora(layer: Any, name: str) -> None:
    """Raise ValueError for what no weight can express."""
    dropout = layer.lora_dropout[name]
    if getattr(dropout, "p", 0) > 0 and dropout.training:
        raise ValueError(
            f"head_weight: expected lora_dropout=0 for the head's adapter {name!r}, found "
            f"{dropout.p}: a weight cannot drop hidden states; put torch.nn.Identity() in its "
            "lora_dropout"
        )
    if getattr(layer.lora_B[name], "bias", None) is not None:
        raise ValueError(
            f"head_weight: expected lora_bias=False for the head's adapter {name!r}, found a bias"
        )
    variant = getattr(layer, "lora_variant", {}).get(name)
    if variant is not None or getattr(layer, "use_dora", {}).get(name):
        raise ValueError(
            f"head_weight: expected plain LoRA for the head's adapter {name!r}, found "
            f"{'DoRA' if variant is None else type(variant).__name__}"
        )


def warn_about(weight: Any) -> None:
    """Warn once about a weight (V, D) of a LoRA layer, or of a DDP module whose forward never ran:
    gradients would silently be missing.

    A weight does not know its module. So, once for each weight, and only where peft was imported
    or there are several processes, this looks at the objects that Python's garbage collector knows.
    """
    adapted = "peft" in sys.modules
    parallel = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not (adapted or parallel) or not (torch.is_grad_enabled() and isinstance(weight, Tensor)):
        return
    key = id(weight)
    seen = _checked.get(key)
    if type(weight) is not nn.Parameter or (seen is not None and seen() is weight):
        return
    _checked[key] = weakref.ref(weight, lambda _: _checked.pop(key, None))
    if next(_searches) >= MOST_SEARCHES:
        return
    for message in _problems(weight, parallel and _active_ddp() is None):
        warnings.warn(message, RuntimeWarning, stacklevel=3)  # past `entry.call`


def _problems(weight: Tensor, outside: bool) -> Iterator[str]:
    for x in gc.get_objects():
        if not issubclass(type(x), nn.Module):  # isinstance would ask proxies for their class
            continue
        if outside and isinstance(x, DistributedDataParallel):
            never_ran = not getattr(x, "_lazy_init_ran", True)
            if never_ran and any(p is weight for p in x.module.parameters()):
                yield (
                    "weight: it belongs to a DistributedDataParallel module whose forward never "
                    "ran, so gradients are not synchronised; wrap FusedPolicyLoss(model) in it"
                )
        elif "lora_A" in x._modules and "base_layer" in x._modules:
            base: Any = x
            if base.base_layer._parameters.get("weight") is not weight:
                continue
            if not (base.disable_adapters or base.merged):
                yield (
                    "weight: it belongs to a LoRA layer, whose adapter is ignored and gets no "
                    "gradient; use spo_kernels.head_weight(model)"
                )


def _active_ddp() -> Any:
    """The DDP module whose forward is running."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)
