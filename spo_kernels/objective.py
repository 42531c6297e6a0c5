"""The per-token objective in PyTorch, from logprobs, and what the policy losses return.

All policy losses share it; csrc/objective.h is its native counterpart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from spo_kernels import rows, tokens
from spo_kernels.tokens import KL_ESTIMATORS, Tokens


@dataclass(frozen=True)
class PolicyLoss:
    """What the policy losses return; everything but `loss` is detached.

    A token is kept if the loss mask and the probability mask both keep it. A kept token with
    advantage 0 counts in `num_kept` and in Z, but has no gradient. So its logprob is computed only
    if `metrics=True`, a KL term or an entropy bonus asks for it.
    """

    loss: Tensor  # (), differentiable: policy_loss + kl + entropy_loss
    policy_loss: Tensor  # (), the clipped objective / its norm
    kl: Tensor  # (), kl_coef * KL estimate / its norm
    entropy_loss: Tensor  # (), -entropy_coef * entropy of kept tokens / the policy's norm
    logprobs: Tensor  # (...) of token_ids at the temperature; NaN where none was computed
    entropy: Tensor | None  # (...) of the policy, NaN where none was computed; None unless wanted
    clipfrac: Tensor  # (), share of kept tokens that are clipped, low or high
    clipfrac_low: Tensor  # (), at 1 - clip_eps_low: the advantage is negative
    clipfrac_high: Tensor  # (), at 1 + clip_eps_high: the advantage is positive
    clipfrac_max: Tensor  # (), at clip_ratio_max: the advantage is negative
    ratio_mean: Tensor  # (), mean importance ratio of the kept tokens that were computed
    kl_mean: Tensor  # (), mean KL estimate of the KL term's tokens that were computed; no weights
    num_kept: Tensor  # (), int64, number of kept tokens
    num_nan: Tensor  # (), int64, number of tokens that nan_logprobs="drop" dropped
    overflow: Tensor | None  # (), bool: rows beyond `max_active` were left out; None from logits


# DDP, FSDP and torch.func look for tensors in what a module returns: they go by this registry.
register_pytree_node(
    PolicyLoss, lambda x: (list(vars(x).values()), None), lambda values, _: PolicyLoss(*values)
)


FIGURES = (
    *("policy_loss", "kl", "entropy_loss", "clipfrac", "clipfrac_low", "clipfrac_high"),
    *("clipfrac_max", "ratio_mean", "kl_mean"),
)


def policy_mask(
    old_logprobs: Tensor,  # (...) of the sampling policy
    loss_mask: Tensor,  # (...) bool or integer, not 0 = trained
    prob_threshold: float | None,
) -> Tensor:  # (...) bool
    """The tokens that train: M = loss_mask and old probability < prob_threshold (strictly).

    An old logprob of NaN keeps its token, so that the loss shows the error instead of hiding it.
    Raises TypeError if an argument is not a tensor or the mask holds floats, ValueError for a
    threshold outside (0, 1].
    """
    rows.check_tensors(old_logprobs=old_logprobs, loss_mask=loss_mask)
    rows.check_mask("loss_mask", loss_mask)
    trained = loss_mask != 0
    if prob_threshold is None:
        return trained
    return trained & ~(old_logprobs.float() >= tokens.log_threshold(prob_threshold))


def evaluate(
    logprobs: Tensor,  # (N,) differentiable, of the tokens' dtype
    entropy: Tensor | None,  # (N,) differentiable
    tokens: Tokens,  # N tokens
    known: Tensor,  # (N,) bool: the tokens whose logprob and entropy are given
    shape: tuple[int, ...],
) -> PolicyLoss:
    """The objective and its figures, in differentiable PyTorch.

    What is not used may be NaN, so it is replaced before the arithmetic: masking only the result
    would leak NaN into the gradient.
    """
    mask = tokens.policy_mask(logprobs.detach())
    zero = logprobs.new_zeros(())
    z, z_kl = tokens.norms(mask.sum())
    policy_scale = torch.where(z == 0, zero, 1 / z)
    acts = mask & (tokens.advantages != 0) & (z != 0)
    ratio, terms = _policy_terms(logprobs, tokens, mask & known, acts)
    if tokens.weights is not None:
        terms = terms * tokens.weights.where(acts, zero)
    policy_loss = -policy_scale * terms.where(acts, zero).sum()
    entropy_loss = kl = zero
    if entropy is not None and tokens.entropy_coef != 0:
        bonus = entropy.where(mask, zero).sum()
        entropy_loss = -tokens.entropy_coef * policy_scale * bonus
    kl_mask = tokens.kl_mask(logprobs.detach()) & known
    estimate = _kl_estimate(logprobs, tokens, kl_mask)
    if tokens.kl_coef > 0:
        acts = kl_mask & (z_kl != 0)
        term = _kl_estimate(logprobs, tokens, acts)
        if tokens.kl_ratio:
            term = term * _log_ratio(logprobs, tokens, acts).exp()
        if tokens.kl_weights is not None:
            term = term * tokens.kl_weights.where(acts, zero)
        kl_scale = torch.where(z_kl == 0, zero, tokens.kl_coef / z_kl)
        kl = kl_scale * term.where(acts, zero).sum()
    low, high, most = _clipped(ratio, tokens, mask & known)
    unknown = tokens.unknown()
    return PolicyLoss(
        loss=policy_loss + kl + entropy_loss,
        policy_loss=policy_loss.detach(),
        kl=kl.detach(),
        entropy_loss=entropy_loss.detach(),
        logprobs=logprobs.detach().where(known, torch.nan).reshape(shape),
        entropy=None
        if entropy is None
        else entropy.detach().where(known, torch.nan).reshape(shape),
        clipfrac=_mean((low | high).to(zero.dtype), mask),
        clipfrac_low=_mean(low.to(zero.dtype), mask),
        clipfrac_high=_mean(high.to(zero.dtype), mask),
        clipfrac_max=_mean(most.to(zero.dtype), mask),
        ratio_mean=_mean(ratio, mask & known),
        kl_mean=_mean(estimate.detach(), kl_mask),
        num_kept=mask.sum(),
        num_nan=mask.new_zeros((), dtype=torch.int64) if unknown is None else unknown.sum(),
        overflow=None,
    )


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over the mask; 0 if it is empty."""
    return values.where(mask, 0.0).sum() / mask.sum().clamp(min=1)


def _log_ratio(logprobs: Tensor, tokens: Tokens, mask: Tensor) -> Tensor:
    """(N,) log of the importance ratio, clamped; 0 where unused."""
    safe = torch.where(mask, logprobs, 0.0)
    old = safe.detach() if tokens.old_logprobs is None else tokens.old_logprobs.where(mask, 0.0)
    bound = tokens.log_ratio_clamp
    return (safe - old).clamp(-bound, bound)


def _policy_terms(
    logprobs: Tensor, tokens: Tokens, mask: Tensor, acts: Tensor
) -> tuple[Tensor, Tensor]:
    """(N,) each: the ratio, and min(ratio A, clip(ratio) A), for A < 0 not below clip_ratio_max A.

    So a positive A takes the ratio up to 1 + clip_eps_high, a negative one that from
    1 - clip_eps_low to clip_ratio_max. Where it is clipped, or the term does not act, its
    exponential is kept out of the graph: it may be infinite.
    """
    log_ratio = _log_ratio(logprobs, tokens, mask)
    advantages = tokens.advantages.where(mask, 0.0)
    ratio, falls = log_ratio.detach().exp(), advantages < 0
    lowest = torch.full_like(ratio, -torch.inf).masked_fill(falls, 1 - tokens.clip_eps_low)
    highest = torch.full_like(ratio, 1 + tokens.clip_eps_high)
    highest = highest.masked_fill(falls, tokens.clip_ratio_max)
    clipped = (ratio < lowest) | (ratio > highest)
    free = torch.where(clipped | ~acts, 0.0, log_ratio).exp()
    held = torch.maximum(torch.minimum(ratio, highest), lowest)
    return ratio, torch.where(clipped, held, free) * advantages


def _clipped(ratio: Tensor, tokens: Tokens, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) bool each: clipped low, high, and at clip_ratio_max."""
    rises, falls = mask & (tokens.advantages > 0), mask & (tokens.advantages < 0)
    low = falls & (ratio < 1 - tokens.clip_eps_low)
    high = rises & (ratio > 1 + tokens.clip_eps_high)
    return low, high, falls & (ratio > tokens.clip_ratio_max)


def _kl_estimate(logprobs: Tensor, tokens: Tokens, mask: Tensor) -> Tensor:
    """(N,) KL estimate of the mask's tokens, 0 elsewhere."""
    if tokens.ref_logprobs is None:
        return torch.zeros_like(logprobs)
    difference = torch.where(mask, logprobs, 0.0) - tokens.ref_logprobs.where(mask, 0.0)
    if tokens.kl_estimator == KL_ESTIMATORS["k1"]:
        return difference
    if tokens.kl_estimator == KL_ESTIMATORS["k2"]:
        return difference.square() / 2
    d = (-difference).clamp(-tokens.kl_clamp, tokens.kl_clamp)
    return torch.expm1(d) - d


def policy_objective(
    logprobs: Tensor,  # (...) fp32, bf16, fp16 or fp64, differentiable
    old_logprobs: Tensor | None,  # (...) of the sampling policy; None: on-policy
    advantages: Tensor,  # broadcasts against (...); (B,) against (B, L) is one per sequence
    *,
    entropy: Tensor | None = None,  # (...) of the policy, differentiable
    weights: Tensor | None = None,
    loss_mask: Tensor | None = None,
    prob_threshold: float | None = 0.9,
    ref_logprobs: Tensor | None = None,
    clip_eps_low: float | None = 0.2,
    clip_eps_high: float | None = 0.2,
    clip_ratio_max: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_scope: str = "masked",
    kl_weights: Tensor | None = None,
    kl_clamp: float | None = 10.0,
    kl_ratio: bool = False,
    entropy_coef: float = 0.0,
    policy_norm: float | Tensor | None = None,
    kl_norm: float | Tensor | None = None,
    nan_logprobs: str = "error",
) -> PolicyLoss:
    """The loss of `masked_ppo_loss` from logprobs, for heads of others.

    It is for logprobs that a sharded or a foreign head computed, and for losses whose ratio is not
    that of one token (docs/losses.md). It is differentiable by `logprobs` and, for
    `entropy_coef`, by `entropy`. All logprobs that the masks keep must be given; others may be NaN.
    The figures are those of `metrics=True`. `masked_ppo_loss` describes the options and errors.

    Computed in PyTorch, in fp32 (fp64 for fp64 logprobs), with any number of derivatives.
    """
    rows.check_tensors(logprobs=logprobs)
    rows.check_optional_tensors(entropy=entropy)
    if not logprobs.is_floating_point():
        raise TypeError(f"logprobs: expected floating-point numbers, found {logprobs.dtype}")
    shape = logprobs.shape
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy: expected a tensor with entropy_coef={entropy_coef}, found None")
    if entropy is not None and entropy.shape != shape:
        raise ValueError(f"entropy: expected shape {tuple(shape)}, found {tuple(entropy.shape)}")
    arguments = tokens.prepare(
        logprobs, shape, token_ids=torch.zeros_like(logprobs, dtype=torch.int32),
        old_logprobs=old_logprobs, advantages=advantages, weights=weights, loss_mask=loss_mask,
        prob_threshold=prob_threshold, temperature=1.0, logit_scale=1.0,
        logit_softcap=None, ref_logprobs=ref_logprobs,
        clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, clip_ratio_max=clip_ratio_max,
        log_ratio_clamp=log_ratio_clamp, kl_coef=kl_coef, kl_estimator=kl_estimator,
        kl_scope=kl_scope, kl_weights=kl_weights, kl_clamp=kl_clamp, kl_ratio=kl_ratio,
        entropy_coef=entropy_coef, policy_norm=policy_norm, kl_norm=kl_norm,
        nan_logprobs=nan_logprobs, metrics=True,
    )  # fmt: skip
    if not (rows.is_captured(logprobs) or rows.is_unreadable(logprobs)):
        arguments.check(1)
    dtype = rows.math_dtype(logprobs)
    flat, known = logprobs.reshape(-1).to(dtype), torch.ones_like(arguments.trained())
    flat_entropy = None if entropy is None else entropy.reshape(-1).to(dtype)
    return evaluate(flat, flat_entropy, arguments, known, shape)
