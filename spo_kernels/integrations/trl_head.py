"""TRL's trainers with `linear_token_logprobs` as their head."""

from __future__ import annotations

import math
import warnings
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spo_kernels.integrations.patch import Patch, check_once, check_parameters, import_known
from spo_kernels.linear_logprobs import linear_token_logprobs

VERSION = "1.16"
PARAMETERS = (
    "ctx hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale "
    "outputs"
)
OTHER_OUTPUTS = ("log_sum_sq_probs", "mean_logits", "is_top1")  # in TRL's order


@dataclass(frozen=True)
class _Mask:
    """The probability mask of one call of `GRPOTrainer._compute_loss`."""

    log_threshold: float
    old_logprobs: Tensor | None  # (N,) of the scored tokens; None: those of this pass
    needs_all: bool  # whether the trainer looks at the entropies of dropped tokens too


_mask: ContextVar[_Mask | None] = ContextVar("mask", default=None)


def patch_trl_head(prob_threshold: float | None = None) -> Patch:
    """Let the trainers that use TRL's chunked head compute logprobs with `linear_token_logprobs`.

    These are the GRPO, RLOO, DPO, KTO and SFT trainers, their subclasses, and the experimental
    AsyncGRPO. They compute logprobs and entropies from hidden states in one function, which this
    replaces: the same numbers, and padding never reaches the projection. Backward, only tokens
    whose gradient is not 0 are projected.

    `prob_threshold` adds SPO's probability mask to GRPOTrainer and to subclasses that keep its
    `_compute_loss` (GMPOTrainer does not): a token whose old probability is not below it sends no
    gradient to the policy, an entropy bonus included. Other trainers have no mask; the first one
    that trains is warned about. In the on-policy steps that TRL has by default, the old probability
    is that of the same pass, so the forward projects all tokens. Where TRL's batch holds
    `old_per_token_logps`, dropped tokens are not projected at all: they count with their old
    logprob, and TRL's metric `entropy` takes 0 for them. With `top_entropy_quantile` below 1 and
    with `use_adaptive_entropy`, which look at these entropies, all tokens are projected.
    TRL's norm of the loss stays.

    Returns a `Patch`: call it to undo. Raises RuntimeError for a release of TRL other than 1.16 and
    where it is applied already, ValueError for a threshold outside (0, 1].
    """
    caller = "patch_trl_head"
    if prob_threshold is not None and not 0 < prob_threshold <= 1:
        raise ValueError(f"prob_threshold: expected a number in (0, 1], found {prob_threshold}")
    utils = import_known(caller, "trl", VERSION, "trl.trainer.utils")
    head = utils._ChunkedLogProbFunction
    check_once(caller, issubclass(head, _Head))
    check_parameters(caller, head.forward, PARAMETERS)
    patch = Patch()
    if prob_threshold is not None:
        trainer = import_known(caller, "trl", VERSION, "trl.trainer.grpo_trainer").GRPOTrainer
        check_parameters(caller, trainer._compute_loss, "self model inputs")
        masked = _with_mask(trainer._compute_loss, math.log(prob_threshold))
        patch.replace(trainer, "_compute_loss", masked)
    patch.replace(
        utils, "_ChunkedLogProbFunction", _Head if prob_threshold is None else _masked_head()
    )
    # Where this says no, TRL scores padding too and drops it afterwards.
    patch.replace(utils, "_use_triton", lambda device: True)
    return patch


class _Head:
    """Stands in for TRL's autograd function, of which TRL uses `apply` only."""

    @staticmethod
    def apply(
        hidden: Tensor,  # (N, D)
        weight: Tensor,  # (V, D)
        bias: Tensor | None,  # (V,)
        targets: Tensor,  # (N,) int64
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", *OTHER_OUTPUTS),
    ) -> tuple[Tensor | None, ...]:  # (N,) each: logprobs, entropy, `OTHER_OUTPUTS`
        if hasattr(weight, "ds_id"):
            raise RuntimeError(
                "patch_trl_head: expected a whole head, found one that DeepSpeed ZeRO-3 splits"
            )
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        mask = _mask.get()
        keep = None if mask is None else _kept(mask, targets)
        logprobs, entropy, more = linear_token_logprobs(
            hidden, weight, targets, bias=bias, loss_mask=keep, temperature=temperature,
            entropy=True, logit_scale=logit_scale, logit_softcap=final_logit_softcapping,
            extras=[name for name in OTHER_OUTPUTS if name in outputs],
        )  # fmt: skip
        if mask is not None:
            logprobs, entropy = _without_gradient(logprobs, entropy, mask, keep)
        others = (getattr(more, name) for name in OTHER_OUTPUTS)
        return logprobs, entropy if "entropy" in outputs else None, *others


def _masked_head() -> type[_Head]:
    """A head that warns once where gradients are computed and no mask is in reach."""
    warned = False

    def apply(*args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        nonlocal warned
        if _mask.get() is None and torch.is_grad_enabled() and not warned:
            warned = True
            warnings.warn(
                "patch_trl_head: prob_threshold acts in GRPOTrainer._compute_loss; this trainer "
                "has its own and trains without the mask",
                RuntimeWarning,
                stacklevel=2,
            )
        return _Head.apply(*args, **kwargs)

    return type("_MaskedHead", (_Head,), {"apply": staticmethod(apply)})


def _with_mask(compute_loss: Any, log_threshold: float) -> Any:
    """`GRPOTrainer._compute_loss` with the mask in reach of the head."""

    def _compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
        old = inputs.get("old_per_token_logps")  # (B, L)
        # The head is given the completions' tokens, one sequence after the other.
        old = None if old is None else old[inputs["completion_mask"] != 0]
        needs_all = self.top_entropy_quantile < 1 or self.use_adaptive_entropy
        token = _mask.set(_Mask(log_threshold, old, needs_all))
        try:
            return compute_loss(self, model, inputs)
        finally:
            _mask.reset(token)

    return _compute_loss


def _kept(mask: _Mask, targets: Tensor) -> Tensor | None:
    """(N,) bool: the tokens to project; None for all."""
    if mask.old_logprobs is None:
        return None
    if mask.old_logprobs.shape != targets.shape:
        raise ValueError(
            f"prob_threshold: expected old logprobs of the {targets.numel()} tokens that the head "
            f"scores, found {mask.old_logprobs.numel()}: sequence-parallel batches have no mask"
        )
    return None if mask.needs_all else ~(mask.old_logprobs >= mask.log_threshold)


def _without_gradient(
    logprobs: Tensor, entropy: Tensor, mask: _Mask, keep: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both (N,), where the mask drops a token without a gradient."""
    if keep is None or mask.old_logprobs is None:
        old = logprobs if mask.old_logprobs is None else mask.old_logprobs
        sure = old >= mask.log_threshold
        logprobs = torch.where(sure, logprobs.detach(), logprobs)
        return logprobs, torch.where(sure, entropy.detach(), entropy)
    return torch.where(keep, logprobs, mask.old_logprobs.to(logprobs.dtype)), entropy
