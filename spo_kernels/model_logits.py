"""What a causal model of transformers does to the output of its head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spo_kernels.head_weight import head_bias, head_weight

FAR = 16.0  # the chosen logits are powers of 2 between 2^-FAR and 2^FAR


def measure(
    caller: str,
    model: Any,
    *,
    body: Any = None,  # makes the hidden states; by default `model.base_model`
    own_layers: bool = False,  # whatever lies between hidden states and head is the caller's care
) -> dict[str, Any]:
    """What a causal model's forward does to its head's output, as options of the losses.

    The model runs once with chosen numbers in place of hidden states and of the head's output.
    These reach as far as a soft cap bends them, which the logits of an untrained model do not.
    Nothing is read from a configuration.
    """
    head = model.get_output_embeddings()
    body = model.base_model if body is None else body
    if head is None or body is model:
        raise ValueError(f"{caller}: expected a causal model, found {type(model).__name__}")
    seen: list[Tensor] = []

    def put_states(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if not own_layers:
            states = output.last_hidden_state
            numbers = torch.linspace(-1, 2, states.numel(), device=states.device)
            output.last_hidden_state = numbers.view(states.shape)
        seen.append(output.last_hidden_state)
        return output

    def take_input(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (args[0].to(head.weight.dtype), *args[1:])

    def put_logits(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        product = torch.nn.functional.linear(args[0], head_weight(model), head_bias(module))
        size = output.shape[-1]
        probe = torch.exp2(torch.linspace(-FAR, FAR, size, device=output.device))
        probe[1::2] *= -1
        seen.extend((output, product, probe.expand(output.shape).clone()))
        return seen[-1].clone()  # the model may work in place

    hooks = (
        body.register_forward_hook(put_states, with_kwargs=True),
        head.register_forward_pre_hook(take_input),
        head.register_forward_hook(put_logits),
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
    return _fit(caller, model, seen, logits, own_layers)


def _fit(
    caller: str, model: Any, seen: list[Tensor], logits: Tensor, own_layers: bool
) -> dict[str, Any]:
    name = type(model).__name__
    if len(seen) != 5:
        raise ValueError(f"{caller}: expected one call of the head in the forward of {name}")
    states, head_input, head_output, product, probe = seen
    factor = 1.0
    if not own_layers:
        if states.shape == head_input.shape:
            product_of = (head_input.double() * states).sum() / states.double().square().sum()
            factor = _snap(float(product_of), torch.finfo(head_input.dtype).eps)
        if not _close(states * factor, head_input):
            raise ValueError(f"{caller}: expected the last hidden state at the head of {name}")
    if not _close(product, head_output):
        raise ValueError(f"{caller}: expected a linear head, {name} has {_head_of(model)}")
    eps = torch.finfo(logits.dtype).eps
    scale, softcap = _scale_and_cap(probe, logits.float(), eps)
    bent = probe * scale if softcap is None else softcap * torch.tanh(probe * scale / softcap)
    if scale <= 0 or not torch.allclose(bent, logits.float(), rtol=16 * eps, atol=1e-7):
        raise ValueError(
            f"{caller}: expected logits of {name} that are its head's output, times a scale and "
            "with a soft cap, found others"
        )
    options = {} if scale * factor == 1 else {"logit_scale": scale * factor}
    return options if softcap is None else options | {"logit_softcap": softcap}


def _scale_and_cap(probe: Tensor, logits: Tensor, eps: float) -> tuple[float, float | None]:
    """From logits near 0, where a soft cap bends nothing, and far away, where they are the cap."""
    probe, logits = probe.flatten(), logits.flatten()
    near, far = int(probe.abs().argmin()), int(probe.abs().argmax())
    scale = _snap(float(logits[near].double() / probe[near].double()), eps)
    reached = abs(float(logits[far]))
    bent = reached < 0.5 * abs(scale * float(probe[far]))
    return scale, _snap(reached, eps) if bent else None


def _snap(x: float, eps: float = torch.finfo(torch.float32).eps) -> float:
    """The simplest number, or inverse of one, that is `x` up to rounding by `eps`; else `x`."""
    for digits in range(1, 7):
        for simple in (float(f"{x:.{digits}g}"), 1 / float(f"{1 / x:.{digits}g}") if x else 0.0):
            if abs(simple - x) <= 4 * eps * abs(x):
                return simple
    return x


def _head_of(model: Any) -> str:
    return type(model.get_output_embeddings()).__name__


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of the coarser dtype."""
    if a.shape != b.shape:
        return False
    coarsest = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    size = max(float(b.abs().max()), 1e-6)
    return bool((a.float() - b.float()).abs().max() <= 8 * coarsest * size)
