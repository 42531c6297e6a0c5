"""The logprobs of a model's own forward, which trainer and engine are compared with at load."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from spo.models.head import Head, own_forward
from spo.models.load import WINDOW, body, longest, own_attention, text_config, windows
from spo.models.memory import free_bytes

SHORT, PAST = 9, 16  # tokens of a short sequence; of a long one beyond the longest window
LONGEST = 8192  # a window beyond this is not passed: the model's own attention would need 2 GB
NARROW = 8  # tokens, what such a window is made for a check
SHORT_TYPES = (torch.float16, torch.bfloat16)
MOST = 3 / 4  # of the logprobs that are compared with their rounding
SPARE = 1.25  # times the memory of the weights in fp32, for what a short forward needs


@torch.no_grad()
def own_logprobs(
    model: PreTrainedModel,
    ids: Sequence[int],  # one sequence
    last: int,  # tokens at its end to score
    vocab_size: int | None = None,  # leave out ids from here on
) -> Tensor:  # (last,) fp32
    """Logprobs of the last tokens of a sequence, by the model's own forward and attention.

    Of the hidden states only the last rows reach the head. Ids that stand for images are read as
    the text model reads them: a multimodal model puts something else in their place.
    """

    def keep_last(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, -last - 1 :]
        return output

    device = next(model.parameters()).device
    tokens = torch.tensor([list(ids)], device=device)
    hook = body(model).register_forward_hook(keep_last)
    try:
        with own_attention(model):
            if text_config(model) is not model.config and named_ids(model) & set(ids):
                output = own_forward(model, body(model)(input_ids=tokens, use_cache=False))
            else:
                output = model(input_ids=tokens, use_cache=False)
        logits = output.logits[0, :-1]
    finally:
        hook.remove()
    logprobs = logits.float()[:, :vocab_size].log_softmax(-1)
    return logprobs.gather(1, tokens[0, -last:, None])[:, 0]


def probe_ids(model: PreTrainedModel, vocab_size: int | None = None) -> list[int]:
    """Ids of a long sequence: past the longest window, if the model's context reaches so far.

    Ids that the configuration names are left out: an image's token stands for an image.
    """
    named = named_ids(model)
    size = vocab_size or text_config(model).vocab_size
    free = [i for i in range(size) if i not in named] or list(range(size))
    length = max([SHORT + PAST, *(w + PAST for w in windows(model) if w <= LONGEST)])
    length = min(length, longest(model) or length)
    chosen = torch.randint(len(free), (length,), generator=torch.Generator().manual_seed(0))
    return [free[i] for i in chosen.tolist()]


def named_ids(model: PreTrainedModel) -> set[int]:
    """Ids that the configuration names: ends, padding, and those that stand for images or sound."""
    named = set()
    for config in (model.config, text_config(model)):
        for key, value in config.to_dict().items():
            if "token" in key:
                values = value if isinstance(value, list) else [value]
                named |= {x for x in values if isinstance(x, int)}
    return named


@contextmanager
def in_dtype(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[bool]:
    """The model with its weights cast to `dtype`, where the device has the memory.

    A fault of 0.01 nats is lost in the rounding of bf16, and plain in fp32. Yields whether the
    model runs in `dtype` now.
    """
    tensors: list[Tensor] = [*model.parameters()]
    if dtype == torch.float32:  # what a model in a short type holds in fp32 stays
        tensors += model.buffers()
    cast = [x for x in tensors if x.dtype in (*SHORT_TYPES, torch.float32) and x.dtype != dtype]
    need = SPARE * sum(x.numel() for x in cast) * dtype.itemsize
    if cast and (hasattr(model, "run_inside") or need > free_bytes(cast[0].device)):
        yield False  # sharded, see spo.learn.distributed.shard, or too large
        return
    kept = [x.data for x in cast]
    try:
        for x in cast:
            x.data = x.data.to(dtype)
        yield True
    finally:
        for x, data in zip(cast, kept, strict=True):
            x.data = data


@contextmanager
def narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Windows and chunks of attention beyond LONGEST, made so narrow that a probe passes them."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    changed = [
        (holder, name, size)
        for holder in (*model.modules(), *configs.values())
        for name, size in vars(holder).items()
        if type(size) is int and size > LONGEST and re.search(WINDOW, name)
    ]
    try:
        for holder, name, _ in changed:
            setattr(holder, name, NARROW)
        yield
    finally:
        for holder, name, size in changed:
            setattr(holder, name, size)


def agree(found: Tensor, own: Tensor, dtype: torch.dtype, rounded: Tensor | None = None) -> bool:
    """Whether logprobs are equal up to the rounding of a model of `dtype`, 1e-4 nats in fp32.

    In a short type the largest differences do not count, since rounding may choose other experts of
    a mixture.

    Args:
        rounded: the model's own of `dtype`, where `own` are those of fp32: they show how much
            rounding there is.
    """
    gap = (found.float().cpu() - own.float().cpu()).abs()
    if dtype in (torch.float32, torch.float64):
        return bool(gap.max() <= 1e-4 * max(1.0, float(own.abs().max()) / 20))
    if rounded is None:
        return bool(gap.median() <= 0.1)
    rounding = (rounded.float().cpu() - own.float().cpu()).abs()
    most = max(1, int(MOST * gap.numel()))
    usual, expected = (x.sort().values[:most].mean() for x in (gap, rounding))
    return bool(usual <= 0.01 + 4 * expected)


class _Asked(DynamicCache):
    """A cache that stores nothing and notices whether a layer asks how long it is."""

    by_layers = False

    def get_seq_length(self, layer_idx: int = 0, *args: Any) -> int:
        caller = sys._getframe(1).f_locals.get("self")
        if isinstance(caller, torch.nn.Module) and not isinstance(caller, PreTrainedModel):
            self.by_layers = True
        return 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any):
        return key_states, value_states


@torch.no_grad()
def counts_tokens(model: PreTrainedModel) -> bool:
    """Whether layers of the model count the tokens of their input and of a cache.

    Then a token's logprob depends on where it stands in a pack or in a slot, not on its position
    alone: Llama 4 scales its queries so, from the 8192nd token on.
    """
    asked = _Asked()
    ids = torch.tensor([probe_ids(model)[:SHORT]], device=next(model.parameters()).device)
    try:
        with own_attention(model):
            body(model)(input_ids=ids, past_key_values=asked, use_cache=True)
    except Exception:  # of the model's own code: it has a cache of another kind
        return False
    return asked.by_layers


def traits(model: PreTrainedModel) -> str:
    """What the model does that an implementation may leave out, for an error's sentence."""
    head: Head = vars(model).get("spo_head") or Head()
    found = []
    if "logit_scale" in head.options:
        found.append(f"logits times {head.options['logit_scale']:g}")
    if "logit_softcap" in head.options:
        found.append(f"logits with a soft cap of {head.options['logit_softcap']:g}")
    if head.own_layers:
        found.append("layers before its output projection")
    if head.vocab_size is not None:
        found.append(f"a vocabulary padded beyond {head.vocab_size}")
    found += [f"a window of {size} tokens" for size in windows(model)]
    config = text_config(model)
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    found += [f"{kind} layers" for kind in sorted(kinds)]
    rope = getattr(config, "rope_parameters", None) or {}
    each = rope.values() if rope and all(isinstance(x, dict) for x in rope.values()) else [rope]
    kinds = {x.get("rope_type", "default") for x in each} - {"default"}
    found += [f"rope of type {kind}" for kind in sorted(kinds)]
    if "position_ids" not in inspect.signature(body(model).forward).parameters:
        found.append("positions of its own")
    return f"it has {', '.join(found)}" if found else "nothing in its configuration says why"
