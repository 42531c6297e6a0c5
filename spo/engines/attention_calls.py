"""What a model hands to its attention, learned from one short forward.

Head counts, widths and masks are read off the calls themselves: configurations name them in many
ways, and layers may differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from spo.engines.slot_attention import IMPLEMENTATION
from spo.models.check import counts_tokens, probe_ids
from spo.models.load import HARMLESS, body, text_config

RECORDING = "spo_recording"  # name of the recording attention in transformers' interface
TOKENS = 6  # of the recorded forward

Shape = tuple[int, int, torch.dtype]  # key-value heads, width of a head, type
MaskFunction = Callable[[Tensor, Tensor], Tensor]
"""(positions of queries, positions of keys) -> bool, what is read."""
Pattern = MaskFunction | None
"""None: a query reads itself and everything before."""


@dataclass(frozen=True)
class AttentionCall:
    """Keys and values of one call of the attention in a forward."""

    key: Shape
    value: Shape
    pattern: Pattern = None


@dataclass
class _Recorder:
    limit: int  # maximum length of a sequence
    calls: list[AttentionCall] = field(default_factory=list)
    patterns: dict[int, tuple[Tensor, Pattern]] = field(default_factory=dict)  # by id of the mask


_RECORDER: ContextVar[_Recorder] = ContextVar("what records the present forward")


@torch.inference_mode()
def attention_calls(model: PreTrainedModel, limit: int) -> list[AttentionCall]:
    """The calls of the model's attention in a forward, in order.

    Leaves the model with the attention of slots. Raises ValueError that says what the model does if
    slots cannot run it.
    """
    config, inner = text_config(model), body(model)
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        raise ValueError("it takes no position_ids")
    if counts_tokens(model):
        raise ValueError("its layers count the tokens of their input in place of their positions")
    model.set_attn_implementation(RECORDING)
    positions = torch.arange(TOKENS, device=model.device)[None]
    ids = torch.tensor([probe_ids(model)[:TOKENS]], device=model.device)
    recorder = _Recorder(limit)
    token = _RECORDER.set(recorder)
    try:
        inner(input_ids=ids, position_ids=positions[:, : ids.shape[1]], use_cache=False)
    finally:
        _RECORDER.reset(token)
        model.set_attn_implementation(IMPLEMENTATION)
    layers, found = getattr(config, "num_hidden_layers", 1), len(recorder.calls)
    if found < layers:
        kinds = ", ".join(sorted(set(getattr(config, "layer_types", None) or ())))
        raise ValueError(
            f"it calls transformers' attention interface in {found} of its {layers} layers"
            + (f" ({kinds})" if kinds else "")
        )
    return recorder.calls


def _record(module, query, key, value, attention_mask, scaling=None, **options):
    """Attention that records how it is called; registered with transformers' interface."""
    recorder = _RECORDER.get()
    heads, tokens = query.shape[1:3]
    if not (tokens == key.shape[2] == value.shape[2] and heads % key.shape[1] == 0):
        raise ValueError(
            f"it attends with queries of shape {tuple(query.shape)} to keys of {tuple(key.shape)}"
        )
    if options.pop("is_causal", None) is False:
        raise ValueError("it attends in both directions")
    sinks = options.pop("s_aux", None)
    if sinks is not None and sinks.numel() != heads:
        raise ValueError(f"it has {sinks.numel()} attention sinks for {heads} heads")
    # Nothing drops out after training, and the mask holds the window.
    for name in ("softcap", "dropout", "sliding_window"):
        options.pop(name, None)
    for name, value_ in options.items():
        if name not in HARMLESS and value_ is not None and value_ is not False:
            raise ValueError(f"it hands {name} to its attention")
    keys, values = ((x.shape[1], x.shape[3], x.dtype) for x in (key, value))
    recorder.calls.append(AttentionCall(keys, values, _pattern_of(attention_mask, recorder)))
    causal = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return causal.transpose(1, 2), None


def _record_mask(*, mask_function, **options) -> Tensor:
    """A mask as `sdpa` gets it, of which the recorder knows by which function it was made."""
    recorder = _RECORDER.get()
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(mask_function=mask_function, **options)
    assert mask is not None  # nothing is skipped
    zero = torch.zeros((), dtype=torch.int64, device=mask.device)

    def pattern(queries: Tensor, keys: Tensor) -> Tensor:
        return mask_function(zero, zero, queries, keys)

    every = torch.arange(recorder.limit, device=mask.device)
    if pattern(every, every + 1).any():
        raise ValueError("it attends in both directions")
    plain = bool(pattern(every, torch.zeros_like(every)).all())  # the first token is always read
    recorder.patterns[id(mask)] = (mask, None if plain else pattern)
    return mask


def _pattern_of(mask: Tensor | None, recorder: _Recorder) -> Pattern:
    if mask is None:  # the attention of transformers is causal then
        return None
    if id(mask) in recorder.patterns:
        return recorder.patterns[id(mask)][1]
    seen = mask if mask.dtype == torch.bool else mask == 0
    if not torch.equal(seen, torch.ones_like(seen).tril()):
        raise ValueError("it makes an attention mask of its own")
    return None


AttentionInterface.register(RECORDING, _record)
AttentionMaskInterface.register(RECORDING, _record_mask)
