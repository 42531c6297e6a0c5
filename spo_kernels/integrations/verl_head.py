"""verl's fused head for PPO, replaced by `linear_token_logprobs`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spo_kernels.integrations.patch import Patch, check_once, check_parameters, import_known
from spo_kernels.linear_logprobs import linear_token_logprobs

VERSION = "0.9"
MODULE = "verl.utils.experimental.torch_functional"


def patch_verl_head() -> Patch:
    """Let verl's `FusedLinearForPPO` compute logprobs and entropy with `linear_token_logprobs`.

    verl uses it with `use_fused_kernels` and the backend torch or liger. Logits are fp32 here;
    those of verl have the dtype of the hidden states.

    Returns a `Patch`: call it to undo. Raises RuntimeError for a release of verl other than 0.9,
    and where it is applied already.
    """
    caller = "patch_verl_head"
    head = import_known(caller, "verl", VERSION, MODULE).FusedLinearForPPO
    check_once(caller, head.forward is _forward)
    check_parameters(caller, head.forward, "self hidden_states vocab_weights input_ids temperature")
    patch = Patch()
    patch.replace(head, "forward", _forward)
    return patch


def _forward(
    self: Any,
    hidden_states: Tensor,  # (N, D) or (B, L, D)
    vocab_weights: Tensor,  # (V, D)
    input_ids: Tensor,  # (N,) or (B, L)
    temperature: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:  # fp32, and the dtype of the hidden states, as verl has them
    logprobs, entropy = linear_token_logprobs(
        hidden_states, vocab_weights, input_ids, temperature=temperature, entropy=True
    )
    return logprobs, entropy.to(hidden_states.dtype)
