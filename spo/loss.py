"""Batch -> LossOutput: one forward of the pack and one fused kernel call."""

from __future__ import annotations

import torch

from spo.config import LossConfig
from spo.model import hidden_states
from spo.records import Batch, LossOutput
from spo_kernels import linear_masked_ppo_loss


def policy_loss(
    model: torch.nn.Module, batch: Batch, config: LossConfig, temperature: float
) -> LossOutput:
    """The clipped-ratio loss of a packed batch, a summand of its optimiser step's loss.

    Rows that the mask drops never reach the vocabulary projection. Metrics are sums over the kept
    rows (except `ratio_max`), so that they add up over the batches of a step.
    """
    head = model.get_output_embeddings()
    out = linear_masked_ppo_loss(
        hidden_states(model, batch),
        head.weight,
        batch.targets,
        batch.old_logprobs,
        batch.advantages,
        bias=head.bias,
        hidden_index=batch.hidden_index,
        loss_mask=batch.loss_mask,
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
        entropy=True,
    )
    kept = out.logprobs != 0  # rows that were dropped read 0
    log_ratio = (out.logprobs - batch.old_logprobs)[kept].double()
    num_kept = float(out.num_kept)
    metrics = {
        "loss": float(out.loss.detach()),
        "kl": float(out.kl),
        "kept": num_kept,
        "clipfrac": float(out.clipfrac) * num_kept,
        "entropy": float(out.entropy.sum()),
        "mismatch_kl": float((log_ratio.exp() - log_ratio - 1).sum()),
        "ratio_max": float(log_ratio.max().exp()) if kept.any() else 1.0,
    }
    return LossOutput(out.loss, metrics)
