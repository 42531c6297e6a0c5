"""What a causal model of transformers does to the output of its head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spo_kernels.head_weight import head_bias, head_weight


def measure(caller: str, model: Any) -> dict[str, Any]:
    """What a causal model's forward does to its head's output, as options of the losses.

    The model runs once with chosen numbers in place of the head's output. These reach as far as a
    soft cap bends them, which the logits of an untrained model do not.
    """
    head = model.get_output_embeddings()
    if head is None or model.base_model is model:
        raise ValueError(f"{caller}: expected a causal model, found {type(model).__name__}")
    seen: list[Tensor] = []

    def record_states(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.append(output.last_hidden_state)

    def put_probe(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        product = torch.nn.functional.linear(args[0], head_weight(model), head_bias(module))
        seen.extend((args[0], output, product))
        probe = torch.linspace(-60, 60, output.shape[-1], device=output.device)
        seen.append(probe.to(output.dtype).expand(output.shape).clone())
        return seen[-1].clone()  # the model may work in place

    hooks = (
        model.base_model.register_forward_hook(record_states, with_kwargs=True),
        head.register_forward_hook(put_probe),
    )
    was_training = model.training
    model.eval()
    try:
        ids = torch.tensor([[0, 1]], device=head.weight.device)
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return _fit(caller, model, seen, logits)


def _fit(caller: str, model: Any, seen: list[Tensor], logits: Tensor) -> dict[str, Any]:
    name = type(model).__name__
    if len(seen) != 5:
        raise ValueError(f"{caller}: expected one call of the head in the forward of {name}")
    states, head_input, head_output, product, probe = seen
    if not _close(states, head_input):
        raise ValueError(f"{caller}: expected the last hidden state at the head of {name}")
    if not _close(product, head_output):
        raise ValueError(f"{caller}: expected a linear head, {name} has {_head_of(model)}")
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    for scale in _scales(config):
        for softcap in (None, cap) if cap else (None,):
            scaled = probe.float() * scale
            bent = scaled if softcap is None else softcap * torch.tanh(scaled / softcap)
            if _close(bent, logits):
                options = {} if scale == 1 else {"logit_scale": float(scale)}
                return options if softcap is None else options | {"logit_softcap": float(softcap)}
    raise ValueError(
        f"{caller}: expected logits of {name} that are its head's output, times a scale and with a "
        "soft cap of its configuration, found others"
    )


def _head_of(model: Any) -> str:
    return type(model.get_output_embeddings()).__name__


def _scales(config: Any) -> list[float]:
    """Factors of the logits that configurations name; some models divide by `logits_scaling`."""
    names = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    found = [x for x in (getattr(config, name, None) for name in names) if x]
    return [1.0, *found, *(1 / x for x in found)]


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of the coarser dtype."""
    if a.shape != b.shape:
        return False
    coarsest = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    size = max(float(b.abs().max()), 1e-6)
    return bool((a.float() - b.float()).abs().max() <= 8 * coarsest * size)
