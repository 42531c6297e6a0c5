"""The loss of a batch: one forward pass over the pack and one fused kernel call.

Metrics are sums over the trained rows (except `ratio_max`), so that they add up over the batches of
a step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from spo.config.loss import LikelihoodLossConfig, LossConfig, PolicyLossConfig
from spo.learn.model import Body, forward, inside
from spo.models.head import head_arguments
from spo.records import Batch, LossOutput
from spo_kernels import linear_masked_ppo_loss, linear_token_logprobs, policy_mask


def policy_loss(
    model: PreTrainedModel, batch: Batch, config: PolicyLossConfig, temperature: float
) -> LossOutput:
    """The clipped-ratio loss of a packed batch; the losses of a step's batches add up.

    Rows that the mask drops never reach the vocabulary projection, unless the KL term covers them.
    """
    return LossOutput(*inside(model, _policy_loss, batch, config, temperature))


def _policy_loss(
    model: PreTrainedModel, batch: Batch, config: PolicyLossConfig, temperature: float
) -> tuple[torch.Tensor, dict[str, float]]:
    layers = forward(model, batch, router_loss=True)
    everywhere = config.kl_coef > 0 and config.kl_scope == "all"  # every row is in the KL term
    out = linear_masked_ppo_loss(
        **head_arguments(model, layers.states, batch.hidden_index),
        token_ids=batch.targets,
        old_logprobs=batch.old_logprobs,
        advantages=batch.advantages,
        loss_mask=None if everywhere else batch.loss_mask,
        prob_threshold=config.prob_threshold,
        ref_logprobs=batch.ref_logprobs,
        temperature=temperature,
        clip_eps_low=config.clip_eps_low,
        clip_eps_high=config.clip_eps_high,
        log_ratio_clamp=config.log_ratio_clamp,
        kl_coef=config.kl_coef,
        kl_estimator=config.kl_estimator,
        kl_scope=config.kl_scope,
        policy_norm=batch.policy_norm,
        kl_norm=batch.kl_norm,
        metrics=True,  # every row with a logprob trains or is in the KL term
    )
    assert out.entropy is not None
    kept = policy_mask(batch.old_logprobs, batch.loss_mask, config.prob_threshold)
    num_kept = float(kept.sum())
    metrics = {
        "loss": float(out.loss.detach()),
        "kept": num_kept,
        "clipfrac": float(out.clipfrac) * float(out.num_kept),  # without an advantage: not clipped
        "entropy": float(out.entropy[kept].sum()),
    }
    if config.kl_coef:
        covered = float(kept.numel()) if everywhere else num_kept
        metrics |= {"kl": float(out.kl_mean) * covered, "covered": covered}
    loss, metrics = _with_router_loss(out.loss, metrics, layers, batch.share)
    return loss, metrics | _mismatch((out.logprobs - batch.old_logprobs)[kept])


def likelihood_loss(
    model: PreTrainedModel, batch: Batch, config: LikelihoodLossConfig, temperature: float
) -> LossOutput:
    """-(1/Z) sum of credit * logprob.

    With credit 1 it is the NLL (RestEM). If the credit is minus the derivative of a loss of whole
    responses, the gradient is that of this loss (see spo/credit/pairs.py).
    """
    return LossOutput(*inside(model, _likelihood_loss, batch, temperature))


def _likelihood_loss(
    model: PreTrainedModel, batch: Batch, temperature: float
) -> tuple[torch.Tensor, dict[str, float]]:
    layers = forward(model, batch, router_loss=True)
    logprobs, entropy = linear_token_logprobs(
        **head_arguments(model, layers.states, batch.hidden_index),
        token_ids=batch.targets,
        temperature=temperature,
        entropy=True,
    )
    loss = -(batch.advantages * logprobs).sum() / max(batch.policy_norm, 1.0)
    metrics = {
        "loss": float(loss.detach()),
        "kept": float(logprobs.numel()),
        "clipfrac": 0.0,
        "entropy": float(entropy.detach().sum()),
    }
    loss, metrics = _with_router_loss(loss, metrics, layers, batch.share)
    return loss, metrics | _mismatch(logprobs.detach() - batch.old_logprobs)


def _with_router_loss(
    loss: torch.Tensor, metrics: dict[str, float], layers: Body, share: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Add the routers' loss, a mean over the batch, by the batch's share of the step's tokens."""
    if layers.router_loss is None:
        return loss, metrics
    router_loss = share * layers.router_loss
    return loss + router_loss, metrics | {"router_loss": float(router_loss.detach())}


def _mismatch(log_ratio: torch.Tensor) -> dict[str, float]:
    """How far the trained policy is from the sampling policy."""
    log_ratio = log_ratio.double()
    return {
        "mismatch_kl": float((log_ratio.exp() - log_ratio - 1).sum()),
        "ratio_max": float(log_ratio.max().exp()) if log_ratio.numel() else 1.0,
    }


LOSSES: dict[type[LossConfig], Callable[..., LossOutput]] = {
    PolicyLossConfig: policy_loss,
    LikelihoodLossConfig: likelihood_loss,
}
"""By the type of their settings."""
