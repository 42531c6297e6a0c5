"""The per-token objective: its arguments, checked and flattened, and its value in PyTorch.

Both policy losses (from logits and from hidden states) share it; csrc/objective.h is its native
counterpart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from spo_kernels import rows

KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}  # values of `KlEstimator` in csrc/ops.h


@dataclass(frozen=True)
class PolicyLoss:
    """What the policy losses return; everything but `loss` is detached.

    A token is kept if the loss mask and the probability mask both keep it. A kept token with
    advantage 0 counts in `num_kept` and in Z, but has no gradient. So its logprob is computed only
    if a KL term needs it.
    """

    loss: Tensor  # (), differentiable: policy_loss + kl
    policy_loss: Tensor  # (), the clipped objective / its norm
    kl: Tensor  # (), kl_coef * KL estimate / its norm
    logprobs: Tensor  # (...) of token_ids at the temperature; 0 where none was computed
    entropy: Tensor | None  # (...) of the policy, 0 where none was computed; None unless asked for
    clipfrac: Tensor  # (), share of clipped tokens among those with a policy gradient term
    ratio_mean: Tensor  # (), mean importance ratio of the tokens with a policy gradient term
    num_kept: Tensor  # (), int64, number of kept tokens
    overflow: Tensor | None  # (), bool: rows beyond `max_active` were left out; None from logits


@dataclass(frozen=True)
class Tokens:
    """The objective's inputs per token, and its scalars: the only list of them in Python.

    It generates the schemas of the ops, the arguments of the kernels, `take` and `padded`.
    SPO_TOKEN_FIELDS in csrc/ops.h has the same names. A tensor's metadata may hold "broadcast" (the
    user's tensor may broadcast), "padding" (the value of a row that no mask keeps, else 0) and
    "whole" (the tensor has no rows).
    """

    token_ids: Tensor  # (N,) int64
    old_logprobs: Tensor  # (N,)
    advantages: Tensor = field(metadata={"broadcast": True})  # (N,)
    ref_logprobs: Tensor | None  # (N,)
    temperature: Tensor = field(metadata={"padding": 1})  # (N,) or (1,)
    policy_mask: Tensor  # (N,) bool, M
    kl_mask: Tensor | None  # (N,) bool, K; None without a KL term
    scales: Tensor = field(metadata={"whole": True})  # (2,) 1 / Z and kl_coef / Z_kl; 0 if Z is 0
    clip_eps_low: float
    clip_eps_high: float
    log_ratio_clamp: float
    kl_estimator: int

    def has_policy(self) -> Tensor:
        """(N,) bool: the policy term is not identically 0."""
        return self.policy_mask & (self.advantages != 0)

    def used(self) -> Tensor:
        """(N,) bool: the row contributes to the loss, so its logprob is needed."""
        used = self.has_policy()
        return used if self.kl_mask is None else used | self.kl_mask

    def check(self, vocab: int) -> None:
        """Raise ValueError if a kept row holds a bad value, see `rows.check_rows`."""
        kept = self.policy_mask if self.kl_mask is None else self.policy_mask | self.kl_mask
        rows.check_rows(self.token_ids, self.temperature, kept, vocab, self.old_logprobs)

    def check_scalars(self) -> None:
        """Raise ValueError for a scalar out of its range."""
        if not (self.clip_eps_low >= 0 and self.clip_eps_high >= 0 and self.log_ratio_clamp > 0):
            raise ValueError(
                "expected clip_eps_low >= 0, clip_eps_high >= 0 and log_ratio_clamp > 0, "
                f"found {self.clip_eps_low}, {self.clip_eps_high} and {self.log_ratio_clamp}"
            )

    def take(self, index: Tensor) -> Tokens:
        """Only the rows `index` (n,)."""
        return self._map_rows(lambda x, _: x[index])

    def padded(self) -> Tokens:
        """One more row at the end, which no mask keeps."""
        return self._map_rows(lambda x, padding: torch.cat([x, x.new_full((1,), padding)]))

    def _map_rows(self, change: Callable[[Tensor, float], Tensor]) -> Tokens:
        """With `change(x, padding)` for every tensor x of one row per token."""
        n = self.token_ids.shape[0]
        values = {name: getattr(self, name) for name in TYPES}
        for name, kind in _TENSORS.items():
            x = values[name]
            if x is not None and "whole" not in kind and x.shape[0] == n:  # else one for all rows
                values[name] = change(x, kind.get("padding", 0))
        return Tokens(**values)

    def arguments(self) -> tuple[Any, ...]:
        """In the order of the op schemas."""
        return tuple(getattr(self, name) for name in TYPES)


TYPES = {f.name: str(f.type).replace(" | None", "?") for f in fields(Tokens)}
SCHEMA = ", ".join(f"{kind} {name}" for name, kind in TYPES.items())  # ends the schema of every op
_TENSORS = {f.name: dict(f.metadata) for f in fields(Tokens) if "Tensor" in TYPES[f.name]}


def policy_mask(
    old_logprobs: Tensor,  # (...) of the sampling policy
    loss_mask: Tensor,  # (...) bool, integer or float, non-zero = trained
    prob_threshold: float | None,
) -> Tensor:  # (...) bool
    """The tokens that train: M = loss_mask and old probability < prob_threshold (strictly).

    An old logprob of NaN keeps its token, so that the loss shows the error instead of hiding it.
    Raises TypeError if an argument is not a tensor, ValueError for a threshold outside (0, 1].
    """
    rows.check_tensors(old_logprobs=old_logprobs, loss_mask=loss_mask)
    trained = loss_mask != 0
    if prob_threshold is None:
        return trained
    if not 0 < prob_threshold <= 1:
        raise ValueError(f"prob_threshold: expected (0, 1] or None, found {prob_threshold}")
    return trained & ~(old_logprobs.float() >= math.log(prob_threshold))


def prepare(
    like: Tensor,  # logits or hidden: gives device and precision
    shape: tuple[int, ...],
    *,
    token_ids: Tensor,
    loss_mask: Tensor | None,
    prob_threshold: float | None,
    ref_logprobs: Tensor | None,
    temperature: float | Tensor,
    kl_coef: float,
    kl_estimator: str,
    kl_scope: str,
    policy_norm: float | Tensor | None,
    kl_norm: float | Tensor | None,
    **others: Any,
) -> Tokens:
    """Check and flatten the arguments that both public functions share.

    `others` become the fields of `Tokens` with their names. Scalars are taken as they are; floats
    per token must have the shape of the tokens, or broadcast if the field's metadata allow it.
    """
    rows.check_devices(
        like,
        token_ids=token_ids,
        **others,
        loss_mask=loss_mask,
        ref_logprobs=ref_logprobs,
        temperature=temperature,
        policy_norm=policy_norm,
        kl_norm=kl_norm,
    )
    rows.check_tensors(token_ids=token_ids)
    rows.check_optional_tensors(loss_mask=loss_mask, ref_logprobs=ref_logprobs)
    _check_kl(kl_coef, kl_estimator, kl_scope, ref_logprobs)
    dtype = rows.math_dtype(like)
    for k, x in others.items():
        left_out = others[k] is None and TYPES[k] == "Tensor?"
        if k in _TENSORS and not left_out:
            flatten = rows.broadcast_floats if "broadcast" in _TENSORS[k] else rows.flat_floats
            others[k] = flatten(k, x, shape, dtype)
    ids = rows.flat_ids("token_ids", token_ids, shape)
    trained = rows.flat_mask("loss_mask", loss_mask, ids, shape)
    mask = policy_mask(others["old_logprobs"], trained, prob_threshold)
    count = mask.sum()
    scale = _scale("policy_norm", 1.0, policy_norm, count, dtype)
    reference, kl_mask, estimator, kl_scale = None, None, 0, torch.zeros_like(scale)
    if ref_logprobs is not None and kl_coef > 0:
        reference = rows.flat_floats("ref_logprobs", ref_logprobs, shape, dtype)
        kl_mask = mask if kl_scope == "masked" else trained
        estimator = KL_ESTIMATORS[kl_estimator]
        kl_norm = policy_norm if kl_norm is None else kl_norm
        kl_scale = _scale("kl_norm", kl_coef, kl_norm, count, dtype)
    tokens = Tokens(
        token_ids=ids,
        ref_logprobs=reference,
        temperature=rows.flat_temperature(temperature, like, shape, dtype),
        policy_mask=mask,
        kl_mask=kl_mask,
        scales=torch.stack([scale, kl_scale]),
        kl_estimator=estimator,
        **others,
    )
    tokens.check_scalars()
    return tokens


def _check_kl(coef: float, estimator: str, scope: str, ref_logprobs: Tensor | None) -> None:
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator: expected k1, k2 or k3, found {estimator!r}")
    if scope not in ("masked", "all"):
        raise ValueError(f"kl_scope: expected 'masked' or 'all', found {scope!r}")
    if not 0 <= coef < math.inf:
        raise ValueError(f"kl_coef: expected a finite number >= 0, found {coef}")
    if coef > 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected a tensor with kl_coef={coef}, found None")


def _scale(
    name: str,
    coef: float,
    norm: float | Tensor | None,
    count: Tensor,  # (), the norm if `norm` is None
    dtype: torch.dtype,
) -> Tensor:
    """coef / norm as a () tensor, 0 where the norm is 0."""
    if norm is None:
        norm = count.to(dtype)
    elif not isinstance(norm, Tensor):
        if not 0 <= norm < math.inf:
            raise ValueError(f"{name}: expected a finite count >= 0, found {norm}")
        return torch.full((), coef / norm if norm else 0.0, dtype=dtype, device=count.device)
    else:
        if norm.numel() != 1:
            raise ValueError(f"{name}: expected one number, found shape {tuple(norm.shape)}")
        norm = norm.detach().reshape(()).to(dtype)
        if not rows.is_captured(norm) and norm.device.type == "cpu" and not 0 <= norm < math.inf:
            raise ValueError(f"{name}: expected a finite count >= 0, found {float(norm)}")
    return torch.where(norm == 0, 0.0, coef / norm)


def token_objective(
    logprobs: Tensor,  # (N,) differentiable
    tokens: Tokens,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # (N,) each
    """Policy term and KL term (scaled), clipped (0 or 1) and ratio of every row; 0 where unused.

    The PyTorch counterpart of csrc/objective.h. An unused argument may be NaN, so it is replaced
    before the arithmetic: masking only the result would leak NaN into the gradient.
    """
    has = tokens.has_policy()
    old = tokens.old_logprobs.masked_fill(~has, 0)
    advantages = tokens.advantages.masked_fill(~has, 0)
    bound = tokens.log_ratio_clamp
    ratio = torch.exp((logprobs - old).clamp(-bound, bound))
    free = ratio * advantages
    held = ratio.clamp(1 - tokens.clip_eps_low, 1 + tokens.clip_eps_high) * advantages
    policy = -tokens.scales[0] * torch.minimum(free, held)
    zero = torch.zeros_like(policy)
    clipped, ratio = (free > held).to(policy.dtype), torch.where(has, ratio, zero)
    if tokens.kl_mask is None or tokens.ref_logprobs is None:
        return torch.where(has, policy, zero), zero, clipped.detach(), ratio.detach()
    difference = logprobs - torch.where(tokens.kl_mask, tokens.ref_logprobs, 0.0)
    difference = torch.where(tokens.kl_mask, difference, zero)
    if tokens.kl_estimator == KL_ESTIMATORS["k1"]:
        kl = difference
    elif tokens.kl_estimator == KL_ESTIMATORS["k2"]:
        kl = difference.square() / 2
    else:
        d = (-difference).clamp(-10, 10)
        kl = torch.expm1(d) - d
    kl = tokens.scales[1] * kl
    return torch.where(has, policy, zero), kl, clipped.detach(), ratio.detach()


def record(
    loss: Tensor,  # ()
    totals: Tensor,  # (4,) sums of what `token_objective` returns
    logprobs: Tensor,  # (N,)
    entropy: Tensor | None,  # (N,)
    tokens: Tokens,
    shape: tuple[int, ...],
    overflow: Tensor | None = None,  # () bool
) -> PolicyLoss:
    """Assemble what the public functions return."""
    policy, kl, clipped, ratio = totals.detach().unbind()
    count = tokens.has_policy().sum().clamp(min=1)
    return PolicyLoss(
        loss=loss,
        policy_loss=policy,
        kl=kl,
        logprobs=logprobs.reshape(shape),
        entropy=None if entropy is None else entropy.reshape(shape),
        clipfrac=clipped / count,
        ratio_mean=ratio / count,
        num_kept=tokens.policy_mask.sum(),
        overflow=overflow,
    )
