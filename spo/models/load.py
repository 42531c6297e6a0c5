"""Loading a causal model of transformers, and what it does besides mixing tokens."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from spo.models.files import from_pretrained, require_weights

POLICIES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
ALIGNMENT = 64  # bytes, as PyTorch allocates on the CPU
WINDOW = "window|chunk"  # in the names of settings that bound attention
HARMLESS = {  # options of transformers' attention interface that change nothing here
    "cache_position",
    "deterministic",
    "input_ids",
    "is_causal",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "past_key_values",
    "position_embeddings",
    "position_ids",
    "return_dict",
    "use_cache",
}
RECOMPUTED = ("dynamic", "longrope")  # rope types whose frequencies follow the longest position


def load_causal(
    name: str,  # folder or hub id
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    auto: type[_BaseAutoModelClass] | None = None,
    trust_remote_code: bool = False,
    limit: int | None = None,  # longest sequence of the run, in tokens; the model's own by default
    **options: Any,  # of the configuration
) -> PreTrainedModel:
    """A model with its own attention, in eval mode: without dropout or noise in its routers.

    A multimodal model is loaded whole; `body` is its text model. Frequencies of a rotary embedding
    that follow the longest position of a batch are fixed to those of `limit`, so that a sample
    does not depend on its neighbours.

    Args:
        auto: one of transformers' auto classes; by default the one for causal models.

    Raises ValueError with one sentence if there is no such model or it lacks weights.
    """
    trusted: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    auto = auto or policy_class(name, **trusted)[0]
    require_weights(name)
    options |= {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # they are named below
    loaded, info = from_pretrained(auto, name, **trusted, **options)
    model: PreTrainedModel = loaded
    for key, stored, expected in sorted(info["mismatched_keys"], key=str):
        raise ValueError(
            f"policy.path: expected {key} of {name} to have the shape {tuple(expected)}, as its "
            f"config.json says, found {tuple(stored)}"
        )
    missing = sorted(set(info["missing_keys"]) - set(_heads(auto, model)))
    if missing:
        raise ValueError(
            f"policy.path: expected all weights of {type(model).__name__} in {name}, "
            f"{len(missing)} are missing, such as {missing[0]}"
        )
    if auto in POLICIES and info["unexpected_keys"]:
        unused = sorted(info["unexpected_keys"])
        warnings.warn(
            f"policy.path: {len(unused)} weights of {name}, such as {unused[0]}, are none of "
            f"{type(model).__name__}'s: they are not used, and checkpoints will not hold them",
            stacklevel=1,  # said once, whoever else loads the model
        )
    bad = [key for key, x in model.named_parameters() if not _finite(x)]
    if bad:
        raise ValueError(
            f"policy.path: expected finite weights, {len(bad)} of {name} hold NaN or infinity, "
            f"such as {bad[0]}"
        )
    model.to(device)  # pyright: ignore[reportArgumentType]  # its wrapper hides the self
    model.eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % ALIGNMENT:  # a mapped file: products round otherwise there
            tensor.data = tensor.data.clone()
    vars(model)["own_attention"] = attention(model)
    own = longest(model)
    if limit is None or own is None:
        limit = limit or own
    else:
        limit = min(limit, own)
    if limit is not None:
        fix_rope(model, limit)
    return model


def body(model: PreTrainedModel) -> PreTrainedModel:
    """The part that turns tokens into hidden states; of a multimodal model its text model."""
    for found in (model.get_decoder(), model.base_model, *model.children()):
        if isinstance(found, PreTrainedModel) and found is not model:
            return body(found) if found.get_output_embeddings() is not None else found
    raise ValueError(
        f"policy.path: expected a causal model, {type(model).__name__} has no body beside its head"
    )


def saved_weights(
    model: PreTrainedModel, named: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """The model's tensors as a checkpoint's files name and shape them: expert by expert."""
    yield from revert_weight_conversion(model, dict(named)).items()


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of `body`."""
    return model.config.get_text_config(decoder=True)


def longest(model: PreTrainedModel) -> int | None:
    """The longest sequence that the model was made for, in tokens; None if it names none."""
    size = getattr(text_config(model), "max_position_embeddings", None)
    return size if isinstance(size, int) and size > 0 else None


def windows(model: PreTrainedModel) -> list[int]:
    """Lengths of windows and chunks of attention that the configuration names, ascending."""
    named = text_config(model).to_dict().items()
    sizes = {x for key, x in named if re.search(WINDOW, key) and type(x) is int}
    return sorted(x for x in sizes if x > 0)


@contextmanager
def own_attention(model: PreTrainedModel):
    """The model's own attention, written out in PyTorch: it leaves nothing out."""
    before = attention(model)
    set_attention(model, "eager")
    try:
        yield
    finally:
        set_attention(model, before)


def attention(model: PreTrainedModel) -> str:
    """The name of the model's attention in transformers' interface; of its text model's."""
    return body(model).config._attn_implementation or "eager"


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Choose it; a model with attention of its own keeps that. An image's attention stays."""
    body(model).set_attn_implementation(name)


@torch.no_grad()
def fix_rope(model: PreTrainedModel, limit: int) -> None:
    """Fix frequencies that follow the longest position to those of a sequence of `limit` tokens.

    vLLM does the same: its rotary embeddings are made once, for its longest sequence.
    """
    for module, kinds in _ropes(model):
        device = next(module.buffers()).device
        last = torch.tensor([[limit - 1]], device=device)
        trained = getattr(module.config, "original_max_position_embeddings", None)
        if trained and limit > trained and "longrope" in str(module.rope_type):
            warnings.warn(
                f"policy.path: a run of up to {limit} tokens uses the model's long rotary factors "
                f"for every sample; engine.max_model_len={trained} keeps the short ones",
                stacklevel=1,  # said once, whoever else loads the model
            )
        for layer_type in kinds:
            named = {} if layer_type is None else {"layer_type": layer_type}
            module(torch.zeros(1, 1, 1, device=device), last, **named)
        if isinstance(module.rope_type, dict):
            module.rope_type = dict.fromkeys(module.rope_type, "default")
        else:
            module.rope_type = "default"


def _ropes(model: PreTrainedModel) -> Iterator[tuple[Any, list[str | None]]]:
    """Rotary embeddings whose frequencies are recomputed, and the layer types that have these."""
    for module in model.modules():
        named = getattr(module, "rope_type", None)
        kinds = named if isinstance(named, dict) else {None: named}
        found = [
            layer_type
            for layer_type, kind in kinds.items()
            if isinstance(kind, str) and any(x in kind for x in RECOMPUTED)
        ]
        if found:
            yield module, found


def policy_class(name: str, **options: Any) -> tuple[type[_BaseAutoModelClass], Any]:
    """The auto class that has the class that a folder was saved from, and its configuration.

    Raises ValueError with one sentence if transformers has no causal model of its type.
    """
    config = from_pretrained(AutoConfig, name, **options)
    remote = getattr(config, "auto_map", None) or {}
    saved = (config.architectures or [""])[0]
    found = {}
    for auto in POLICIES:
        if auto.__name__ in remote:
            return auto, config
        if type(config) in auto._model_mapping:
            kind: Any = auto._model_mapping[type(config)]
            found.setdefault(kind.__name__, auto)
    if found:
        return found.get(saved, next(iter(found.values()))), config
    raise ValueError(
        f"policy.path: expected a causal language model, {name} is a {config.model_type}, for "
        "which transformers has none"
    )


def _finite(weights: Tensor) -> bool:
    """Whether no weight is NaN or infinite; packed and quantised ones are not looked at."""
    if weights.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return True
    return bool(torch.isfinite(weights.sum()) or torch.isfinite(weights).all())


def _heads(auto: Any, model: PreTrainedModel) -> list[str]:
    """Weights that a policy lacks and the loaded class adds: the head of a critic."""
    if auto in POLICIES:
        return []
    inside = {f"{model.base_model_prefix}.{key}" for key, _ in model.base_model.named_parameters()}
    return [key for key, _ in model.named_parameters() if key not in inside]
