"""A causal model of transformers whose forward returns logprobs of given tokens, not logits."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

from torch import Tensor

from spo_kernels.head_weight import head_bias, head_weight, output_layer
from spo_kernels.integrations.patch import Patch, check_once
from spo_kernels.linear_logprobs import linear_token_logprobs
from spo_kernels.model_inputs import check_inputs
from spo_kernels.model_logits import measure

CALLER = "patch_transformers"


def patch_transformers(
    model: Any,  # AutoModelForCausalLM, before PEFT, DDP or FSDP wrap it
) -> Patch:
    """Let `model(..., token_ids=ids)` return logprobs; the logits never exist as a whole.

        logprobs = model(input_ids, attention_mask=mask, token_ids=input_ids.roll(-1, 1))

    `token_ids` (B, L) holds the token that each position predicts: nothing is shifted. `loss_mask`
    (B, L), `temperature` and `entropy` are those of `linear_token_logprobs`, whose result is
    returned. Without `token_ids` the forward is the model's own, and so is generation. A scale or
    soft cap of the logits is applied as the model does it. The load-balancing loss of a mixture of
    experts is not returned.

    Runs the model once, on two tokens. Returns a `Patch`: call it to undo. Raises ValueError for a
    model whose logits are not its head's output, up to a scale and a soft cap of its configuration;
    RuntimeError where it is applied already. With `token_ids`, the forward raises TypeError for
    keywords that the model does not know.
    """
    _check_kind(model)
    check_once(CALLER, hasattr(vars(model).get("forward"), "returns_logprobs"))
    transform = measure(CALLER, model)
    held = vars(model).get("forward")  # of a hook, say; else the class has it

    @functools.wraps(type(model).forward)  # `generate` looks for its arguments in the signature
    def forward(
        self: Any,
        *args: Any,
        token_ids: Tensor | None = None,  # (B, L)
        loss_mask: Tensor | None = None,  # (B, L)
        temperature: float | Tensor = 1.0,
        entropy: bool = False,
        **kwargs: Any,
    ) -> Any:
        if token_ids is None:
            return _original(self, held)(*args, **kwargs)
        if "labels" in kwargs or "logits_to_keep" in kwargs:
            raise TypeError("token_ids: expected neither labels nor logits_to_keep beside it")
        check_inputs(CALLER, self, kwargs)
        kwargs["use_cache"] = False
        hidden = self.base_model(*args, **kwargs).last_hidden_state
        options: dict[str, Any] = dict(transform, temperature=temperature, entropy=entropy)
        # The head is looked up in each call: PEFT and FSDP replace it.
        options |= {"bias": head_bias(output_layer(self)), "loss_mask": loss_mask}
        return linear_token_logprobs(hidden, head_weight(self), token_ids, **options)

    vars(forward)["returns_logprobs"] = True
    patch = Patch()
    patch.replace(model, "forward", types.MethodType(forward, model))
    return patch


def _original(model: Any, held: Any) -> Callable[..., Any]:
    """The forward that was replaced, bound to this model: it may be a copy of the patched one."""
    if held is None:
        return types.MethodType(type(model).forward, model)
    return types.MethodType(held.__func__, model) if isinstance(held, types.MethodType) else held


def _check_kind(model: Any) -> None:
    name = type(model).__name__
    if hasattr(model, "get_base_model"):
        raise ValueError(
            f"{CALLER}: expected the model inside {name}: pass model.get_base_model(), which keeps "
            "the adapters"
        )
    find = getattr(model, "get_output_embeddings", None)
    if find is None or find() is None or model.base_model is model:
        raise ValueError(f"{CALLER}: expected a causal model, found {name}")
