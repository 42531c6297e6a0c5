"""What lies between hidden states and logits, as arguments of the fused kernels."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from spo.models.load import body, own_attention
from spo_kernels import head_weight
from spo_kernels.model_logits import measure


@dataclass(frozen=True)
class Head:
    """How a model makes logits, found by running it; see `spo_kernels.model_logits.measure`."""

    options: dict[str, float] = field(default_factory=dict)  # logit_scale, logit_softcap
    own_layers: bool = False  # layers lie between the hidden states and the projection
    vocab_size: int | None = None  # ids from here on are never sampled; None: every id may be


def find_head(model: PreTrainedModel, vocab_size: int | None = None) -> Head:
    """Measure the model's head and keep what was found with the model.

    Args:
        vocab_size: ids that the tokenizer has; rows of the head beyond them are left out.

    Raises ValueError with one sentence for logits that the kernels cannot make.
    """
    projection: Any = model.get_output_embeddings()
    if projection is None:
        raise ValueError(
            f"policy.path: expected a model with one output projection, {type(model).__name__} "
            "has none"
        )
    own_layers = False
    try:
        options = _measure(model, own_layers)
    except ValueError:
        own_layers = True
        options = _measure(model, own_layers)
    size = projection.weight.shape[0]
    cut = vocab_size if vocab_size is not None and vocab_size < size else None
    head = Head(options, own_layers, cut)
    vars(model)["spo_head"] = head
    return head


def _measure(model: PreTrainedModel, own_layers: bool) -> dict[str, float]:
    try:
        with own_attention(model):
            return measure("policy.path", model, body=body(model), own_layers=own_layers)
    except ValueError:
        raise
    except Exception as error:  # of the model's own code
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(
            f"policy.path: {type(model).__name__} does not run on token ids alone ({reason})"
        ) from error


def head_arguments(
    model: PreTrainedModel,
    hidden: Tensor,  # (T, D)
    index: Tensor,  # (N,) int64, rows of `hidden` that predict a token
) -> dict[str, Any]:
    """Arguments of `linear_masked_ppo_loss` and `linear_token_logprobs` for these rows."""
    head: Head = vars(model).get("spo_head") or find_head(model)
    projection: Any = model.get_output_embeddings()
    weight, bias = projection.weight, projection.bias
    if hasattr(projection, "base_layer"):  # it has an adapter
        weight = head_weight(projection)
    if head.vocab_size is not None:
        weight = weight[: head.vocab_size]
        bias = None if bias is None else bias[: head.vocab_size]
    where: dict[str, Any] = {"hidden": hidden, "hidden_index": index}
    if head.own_layers:
        where = {"hidden": before_projection(model, hidden[index])}
    return where | {"weight": weight, "bias": bias} | head.options


class _Reached(Exception):
    """The forward has come to the projection."""


def before_projection(model: PreTrainedModel, states: Tensor) -> Tensor:
    """Hidden states (N, D) after the model's own layers, as its projection receives them."""
    seen: list[Tensor] = []

    def take(module: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    projection: Any = model.get_output_embeddings()
    hook = projection.register_forward_pre_hook(take)
    try:
        own_forward(model, BaseModelOutputWithPast(last_hidden_state=states[None]))  # pyright: ignore
    except _Reached:
        pass
    finally:
        hook.remove()
    return seen[0][0]


def own_forward(model: PreTrainedModel, output: Any, **inputs: Any) -> Any:
    """The causal model's own forward, with `output` in the place of what its body returns."""
    states = output.last_hidden_state
    ids = torch.zeros(states.shape[:2], dtype=torch.int64, device=states.device)
    with _stand_in(body(model), output):
        return model.forward(input_ids=ids, use_cache=False, **inputs)


@contextmanager
def _stand_in(module: Any, output: Any):
    """Let `module` return `output`, whatever it is called with."""
    own = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
