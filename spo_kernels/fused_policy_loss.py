"""A model and its policy loss as one module, so that DDP and FSDP see the call as a forward."""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spo_kernels.head_weight import _active_ddp, _weight, head_bias, output_layer, unwrapped
from spo_kernels.linear_policy_loss import linear_masked_ppo_loss
from spo_kernels.model_inputs import check_inputs
from spo_kernels.model_logits import measure
from spo_kernels.objective import PolicyLoss

OPTIONS = set(inspect.signature(linear_masked_ppo_loss).parameters) - {"hidden", "weight", "bias"}
FLOATS = (
    *("old_logprobs", "ref_logprobs", "advantages", "weights", "kl_weights", "temperature"),
    *("policy_norm", "kl_norm"),
)


class FusedPolicyLoss(nn.Module):
    """`linear_masked_ppo_loss` of a causal model's hidden states, inside one forward.

        loss_module = FusedPolicyLoss(model, clip_eps_high=0.28)
        parallel = DistributedDataParallel(loss_module)     # or FSDP(...), or fully_shard(...)
        parallel(input_ids, attention_mask=mask, old_logprobs=old, advantages=adv).loss.backward()

    DDP and FSDP synchronise the gradients of what runs inside the forward of the module that they
    wrap. The parts of a wrapped model, called on their own, train each process by itself.

    The model's body and head run, not its own forward: the load-balancing loss of a mixture of
    experts is not added.
    """

    def __init__(
        self,
        model: nn.Module,  # of transformers, or with `lm_head`; a PeftModel; not wrapped by DDP
        *,
        hidden_states: Callable[..., Tensor] | None = None,
        **options: Any,
    ):
        """`options` are those of `linear_masked_ppo_loss`; a call may add or replace some.

        `hidden_states(model, input_ids, **inputs)` gives the last hidden states (B, L, D). By
        default they are `model.base_model(input_ids, **inputs).last_hidden_state`.

        A model of transformers runs once, on two tokens. Raises ValueError for a model that DDP
        wraps, for one without a head, and for one whose forward scales or caps the output of its
        head otherwise than the options say, or has more between its body and the head. TypeError
        for other options.
        """
        super().__init__()
        if isinstance(model, DistributedDataParallel) or hasattr(model, "_fsdp_wrapped_module"):
            raise ValueError(
                f"model: expected the model itself, found {type(model).__name__}; put it around "
                "FusedPolicyLoss(model)"
            )
        _check_options(options)
        _check_adapter(model)
        output_layer(model)
        if hidden_states is None and not hasattr(unwrapped(model), "base_model"):
            raise ValueError(
                f"hidden_states: expected a function, since {type(model).__name__} has no "
                "base_model, found None"
            )
        if hidden_states is None:
            _check_logits(unwrapped(model), options)
        self.model, self.options = model, options
        self._hidden_states = hidden_states
        self._warned = False

    def forward(
        self,
        input_ids: Tensor,  # (B, L)
        *,
        token_ids: Tensor | None = None,  # (B, L), what each position predicts
        **kwargs: Any,  # options of the loss by their names; the model's inputs
    ) -> PolicyLoss:
        """The record of the loss.

        Without `token_ids` each position predicts the next input, and the arguments per token are
        those of `input_ids[:, 1:]`, (B, L - 1).
        """
        self._warn_outside()
        options = self.options | {k: x for k, x in kwargs.items() if k in OPTIONS}
        inputs = {k: x for k, x in kwargs.items() if k not in OPTIONS}
        _check_precision(options)
        model = unwrapped(self.model)
        if hasattr(model, "set_requires_gradient_sync"):  # fully_shard(model): gathered in forwards
            return _as_forward(model)(self._loss, input_ids, token_ids, inputs, options)
        return self._loss(model, input_ids, token_ids, inputs, options)

    def _loss(
        self,
        model: Any,
        input_ids: Tensor,
        token_ids: Tensor | None,
        inputs: dict[str, Any],
        options: dict[str, Any],
    ) -> PolicyLoss:
        if self._hidden_states is not None:
            hidden = self._hidden_states(model, input_ids, **inputs)
        else:
            check_inputs("FusedPolicyLoss", model, inputs)
            body = model.base_model
            if "use_cache" in inspect.signature(body.forward).parameters:
                # A cache is no use here, and with one transformers does not see packed sequences.
                inputs = {"use_cache": False} | inputs
            hidden = body(input_ids, **inputs).last_hidden_state
        if token_ids is None:
            hidden, token_ids = hidden[:, :-1], input_ids[:, 1:]
        layer = output_layer(model)
        options = {"bias": head_bias(layer)} | options
        return linear_masked_ppo_loss(hidden, _weight(layer), token_ids, **options)

    def _warn_outside(self) -> None:
        """Warn once if neither DDP nor FSDP runs this call though there are several processes."""
        if self._warned or not (torch.is_grad_enabled() and dist.is_available()):
            return
        if not dist.is_initialized() or dist.get_world_size() == 1 or _active_ddp() is not None:
            return
        sharded = (
            hasattr(p, "_fsdp_flattened") or hasattr(p, "placements") for p in self.parameters()
        )
        if hasattr(self, "reshard") or any(sharded):  # FSDP2 makes it an FSDPModule
            return
        self._warned = True
        warnings.warn(
            f"FusedPolicyLoss: called in {dist.get_world_size()} processes outside the forward of "
            "DDP and FSDP; gradients are not synchronised unless you do so",
            RuntimeWarning,
            stacklevel=3,
        )


def _as_forward(model: Any) -> Callable[..., Any]:
    """A method of the model that FSDP2 treats as its forward; it calls a function of the model."""
    if "_run_inside" not in vars(model):
        run = MethodType(lambda self, function, *args: function(self, *args), model)
        vars(model)["_run_inside"] = run
        importlib.import_module("torch.distributed.fsdp").register_fsdp_forward_method(
            model, "_run_inside"
        )
    return model._run_inside


def _check_options(options: dict[str, Any]) -> None:
    unknown = sorted(options.keys() - OPTIONS)
    if unknown:
        raise TypeError(
            "FusedPolicyLoss: expected options of linear_masked_ppo_loss, found "
            f"{', '.join(unknown)}"
        )


def _check_adapter(model: Any) -> None:
    """Raise ValueError for adapters of peft that act in the forward of PeftModel, which is passed
    by."""
    config = getattr(model, "active_peft_config", None)
    acts = getattr(config, "is_prompt_learning", False)
    if acts or getattr(config, "alora_invocation_tokens", None) is not None:
        raise ValueError(
            "model: expected adapters inside the layers, found "
            f"{getattr(config, 'peft_type', config)}, which changes the input of the model"
        )


def _check_logits(model: Any, options: dict[str, Any]) -> None:
    """Raise ValueError if the model does to its logits what the options do not say.

    The model runs once on two tokens, if it is one of transformers whose weights are here.
    """
    weights = list(model.parameters())
    plain = all(not p.is_meta and not hasattr(p, "placements") for p in weights)
    if not (weights and plain and hasattr(model, "config") and hasattr(model, "base_model")):
        return
    found = measure("FusedPolicyLoss", model)
    for option, default in (("logit_scale", 1.0), ("logit_softcap", None)):
        given, want = options.get(option, default), found.get(option, default)
        if given != want and not (given and want and math.isclose(given, want, rel_tol=1e-6)):
            raise ValueError(
                f"{option}: expected {option}={want}, which {type(model).__name__} does to its "
                f"logits, found {given}"
            )


def _check_precision(options: dict[str, Any]) -> None:
    """Mixed precision of FSDP casts the inputs of a forward. Logprobs of 16 bits are 1 % wrong, the
    other numbers 0.4 %."""
    for name in FLOATS:
        value = options.get(name)
        if isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"{name}: expected float32 or float64, found {value.dtype}; if FSDP's mixed "
                "precision cast it, pass cast_forward_inputs=False (FSDP1: "
                "cast_root_forward_inputs=False too)"
            )
