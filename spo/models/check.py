"""The logprobs of a model's own forward, which trainer and engine are compared with at load."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spo.models.head import Head
from spo.models.load import body, longest, own_attention, text_config, windows

SHORT, PAST = 9, 16  # tokens of a short sequence; of a long one beyond the longest window
LONGEST = 8192  # a window beyond this is not passed: the model's own attention would need 2 GB


@torch.no_grad()
def own_logprobs(
    model: PreTrainedModel,
    ids: Sequence[int],  # one sequence
    last: int,  # tokens at its end to score
    vocab_size: int | None = None,  # leave out ids from here on
) -> Tensor:  # (last,) fp32
    """Logprobs of the last tokens of a sequence, by the model's own forward and attention.

    Of the hidden states only the last rows reach the head.
    """

    def keep_last(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state[:, -last - 1 :]
        return output

    device = next(model.parameters()).device
    tokens = torch.tensor([list(ids)], device=device)
    hook = body(model).register_forward_hook(keep_last)
    try:
        with own_attention(model):
            logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
    finally:
        hook.remove()
    logprobs = logits.float()[:, :vocab_size].log_softmax(-1)
    return logprobs.gather(1, tokens[0, -last:, None])[:, 0]


def probe_ids(model: PreTrainedModel, vocab_size: int | None = None) -> list[int]:
    """Ids of a long sequence: past the longest window, if the model's context reaches so far.

    Ids that the configuration names are left out: an image's token stands for an image.
    """
    named = set()
    for config in (model.config, text_config(model)):
        for key, value in config.to_dict().items():
            if "token" in key:
                values = value if isinstance(value, list) else [value]
                named |= {x for x in values if isinstance(x, int)}
    size = vocab_size or text_config(model).vocab_size
    free = [i for i in range(size) if i not in named] or list(range(size))
    length = max([SHORT + PAST, *(w + PAST for w in windows(model) if w <= LONGEST)])
    length = min(length, longest(model) or length)
    chosen = torch.randint(len(free), (length,), generator=torch.Generator().manual_seed(0))
    return [free[i] for i in chosen.tolist()]


def agree(found: Tensor, own: Tensor, dtype: torch.dtype) -> bool:
    """Whether logprobs are equal up to the rounding of a model of `dtype`, 1e-4 nats in fp32."""
    gap = (found.float().cpu() - own.float().cpu()).abs()
    if dtype in (torch.float32, torch.float64):
        return bool(gap.max() <= 1e-4 * max(1.0, float(own.abs().max()) / 20))
    return bool(gap.mean() <= 0.1)


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
