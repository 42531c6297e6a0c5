"""The per-token objective: its arguments, checked and flattened, and its value in PyTorch.

Both policy losses (from logits and from hidden states) share it; csrc/objective.h is its native
counterpart.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from torch import Tensor

from spo_kernels import rows

# Values of `KlEstimator` and `KlScope` in csrc/ops.h.
KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}
KL_SCOPES = {"masked": 0, "all": 1}


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

    It generates the schemas of the ops and the arguments of the kernels. SPO_TOKEN_FIELDS in
    csrc/ops.h has the same names. Where a norm is a tensor, its value is not used; a value below 0
    stands for the number of kept tokens. "broadcast": the user's tensor may broadcast.
    """

    token_ids: Tensor  # (N,) int32 or int64
    old_logprobs: Tensor  # (N,)
    advantages: Tensor = field(metadata={"broadcast": True})  # (N,)
    ref_logprobs: Tensor | None  # (N,); None without a KL term
    loss_mask: Tensor | None  # (N,) bool or integer, not 0 = trained; None: all
    temperature: Tensor | None  # (N,) or (1,); None: temperature_value
    policy_norm: Tensor | None  # (1,), int64 or as the other floats
    kl_norm: Tensor | None  # (1,)
    temperature_value: float
    policy_norm_value: float
    kl_norm_value: float
    log_threshold: float
    clip_eps_low: float
    clip_eps_high: float
    log_ratio_clamp: float
    kl_coef: float
    kl_estimator: int
    kl_scope: int

    def trained(self) -> Tensor:
        """(N,) bool: what the loss mask trains."""
        if self.loss_mask is None:
            return torch.ones_like(self.token_ids, dtype=torch.bool)
        return self.loss_mask != 0

    def policy_mask(self) -> Tensor:
        """(N,) bool: M, the tokens that the masks keep."""
        return self.trained() & ~(self.old_logprobs >= self.log_threshold)

    def kl_mask(self) -> Tensor | None:
        """(N,) bool: K, the tokens of the KL term; None without one."""
        if self.kl_estimator == 0:
            return None
        return self.trained() if self.kl_scope == KL_SCOPES["all"] else self.policy_mask()

    def has_policy(self) -> Tensor:
        """(N,) bool: the policy term is not identically 0."""
        return self.policy_mask() & (self.advantages != 0)

    def used(self) -> Tensor:
        """(N,) bool: the token contributes to the loss, so its logprob is needed."""
        kl_mask = self.kl_mask()
        return self.has_policy() if kl_mask is None else self.has_policy() | kl_mask

    def temperatures(self) -> Tensor:
        """(N,) or (1,)."""
        if self.temperature is None:
            return self.old_logprobs.new_full((1,), self.temperature_value)
        return self.temperature

    def scales(self) -> tuple[Tensor, Tensor]:
        """() each: 1 / Z and kl_coef / Z_kl, 0 where the norm is 0."""
        count = self.policy_mask().sum().to(self.old_logprobs.dtype)
        norms = ((self.policy_norm, self.policy_norm_value), (self.kl_norm, self.kl_norm_value))
        zs = []
        for norm, value in norms:
            given = count if value < 0 else torch.full_like(count, value)
            zs.append(given if norm is None else norm.reshape(()).to(count.dtype))
        z, z_kl = zs
        return torch.where(z == 0, 0.0, 1 / z), torch.where(z_kl == 0, 0.0, self.kl_coef / z_kl)

    def check(self, vocab: int) -> None:
        """Raise ValueError if a norm or a kept token holds a bad value, see `rows.check_rows`."""
        for name, norm in (("policy_norm", self.policy_norm), ("kl_norm", self.kl_norm)):
            if norm is not None and not 0 <= norm < math.inf:
                raise ValueError(f"{name}: expected a finite count >= 0, found {float(norm)}")
        kl_mask, kept = self.kl_mask(), self.policy_mask()
        kept = kept if kl_mask is None else kept | kl_mask
        rows.check_rows(self.token_ids, self.temperatures(), kept, vocab, self.old_logprobs)

    def check_scalars(self) -> None:
        """Raise ValueError for a scalar out of its range."""
        if not (self.clip_eps_low >= 0 and self.clip_eps_high >= 0 and self.log_ratio_clamp > 0):
            raise ValueError(
                "expected clip_eps_low >= 0, clip_eps_high >= 0 and log_ratio_clamp > 0, "
                f"found {self.clip_eps_low}, {self.clip_eps_high} and {self.log_ratio_clamp}"
            )

    def take(self, index: Tensor) -> Tokens:
        """Only the tokens `index` (n,). `scales` is that of all: a count would be of these."""
        n = self.token_ids.shape[0]
        values: dict[str, Any] = {
            name: value[index] if isinstance(value, Tensor) and value.shape[0] == n else value
            for name, value in vars(self).items()
            if name not in ("policy_norm", "kl_norm")
        }
        return Tokens(**values, policy_norm=self.policy_norm, kl_norm=self.kl_norm)

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
    return trained & ~(old_logprobs.float() >= log_threshold(prob_threshold))


def log_threshold(prob_threshold: float | None) -> float:
    """Its logarithm, infinity for None. Raises ValueError for a threshold outside (0, 1]."""
    if prob_threshold is None:
        return math.inf
    if not 0 < prob_threshold <= 1:
        raise ValueError(f"prob_threshold: expected (0, 1] or None, found {prob_threshold}")
    return math.log(prob_threshold)


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
        if k in _TENSORS and not (x is None and TYPES[k] == "Tensor?"):
            flatten = rows.broadcast_floats if "broadcast" in _TENSORS[k] else rows.flat_floats
            others[k] = flatten(k, cast(Tensor, x), shape, dtype)
    has_kl = ref_logprobs is not None and kl_coef > 0
    z, z_value = _norm("policy_norm", policy_norm, dtype)
    z_kl, z_kl_value = (z, z_value) if kl_norm is None else _norm("kl_norm", kl_norm, dtype)
    heat = rows.flat_temperature(temperature, shape, dtype)
    reference = None
    if has_kl and ref_logprobs is not None:
        reference = rows.flat_floats("ref_logprobs", ref_logprobs, shape, dtype)
    tokens = Tokens(
        token_ids=rows.flat_ids("token_ids", token_ids, shape),
        ref_logprobs=reference,
        loss_mask=rows.flat_mask("loss_mask", loss_mask, shape),
        temperature=heat,
        policy_norm=z,
        kl_norm=z_kl if has_kl else None,
        temperature_value=float(temperature) if heat is None else 1.0,
        policy_norm_value=z_value,
        kl_norm_value=z_kl_value,
        log_threshold=log_threshold(prob_threshold),
        kl_coef=float(kl_coef),
        kl_estimator=KL_ESTIMATORS[kl_estimator] if has_kl else 0,
        kl_scope=KL_SCOPES[kl_scope],
        **others,
    )
    tokens.check_scalars()
    return tokens


def _check_kl(coef: float, estimator: str, scope: str, ref_logprobs: Tensor | None) -> None:
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator: expected k1, k2 or k3, found {estimator!r}")
    if scope not in KL_SCOPES:
        raise ValueError(f"kl_scope: expected 'masked' or 'all', found {scope!r}")
    if not 0 <= coef < math.inf:
        raise ValueError(f"kl_coef: expected a finite number >= 0, found {coef}")
    if coef > 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected a tensor with kl_coef={coef}, found None")


def _norm(
    name: str, norm: float | Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, float]:
    """A norm as the two fields of `Tokens`: a tensor of one number, and a value."""
    if norm is None:
        return None, -1.0
    if not isinstance(norm, Tensor):
        if not 0 <= norm < math.inf:
            raise ValueError(f"{name}: expected a finite count >= 0, found {norm}")
        return None, float(norm)
    if norm.numel() != 1:
        raise ValueError(f"{name}: expected one number, found shape {tuple(norm.shape)}")
    return norm.detach().reshape(1).to(norm.dtype if norm.dtype == torch.int64 else dtype), 0.0


def token_objective(
    logprobs: Tensor,  # (N,) differentiable
    tokens: Tokens,
    scales: tuple[Tensor, Tensor],  # of `Tokens.scales` over all tokens of the loss
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
    policy = -scales[0] * torch.minimum(free, held)
    zero = torch.zeros_like(policy)
    clipped, ratio = (free > held).to(policy.dtype), torch.where(has, ratio, zero)
    kl_mask = tokens.kl_mask()
    if kl_mask is None or tokens.ref_logprobs is None:
        return torch.where(has, policy, zero), zero, clipped.detach(), ratio.detach()
    difference = logprobs - torch.where(kl_mask, tokens.ref_logprobs, 0.0)
    difference = torch.where(kl_mask, difference, zero)
    if tokens.kl_estimator == KL_ESTIMATORS["k1"]:
        kl = difference
    elif tokens.kl_estimator == KL_ESTIMATORS["k2"]:
        kl = difference.square() / 2
    else:
        d = (-difference).clamp(-10, 10)
        kl = torch.expm1(d) - d
    kl = scales[1] * kl
    return torch.where(has, policy, zero), kl, clipped.detach(), ratio.detach()


def record(
    loss: Tensor,  # ()
    figures: Tensor,  # (4,) or more: policy, KL, clipfrac, mean ratio
    num_kept: Tensor,  # () int64
    logprobs: Tensor,  # (N,)
    entropy: Tensor | None,  # (N,)
    shape: tuple[int, ...],
    overflow: Tensor | None = None,  # (1,) int64, 0 or 1
) -> PolicyLoss:
    """Assemble what the public functions return."""
    policy, kl, clipfrac, ratio_mean, *_ = figures.unbind()
    return PolicyLoss(
        loss=loss,
        policy_loss=policy,
        kl=kl,
        logprobs=logprobs.reshape(shape),
        entropy=None if entropy is None else entropy.reshape(shape),
        clipfrac=clipfrac,
        ratio_mean=ratio_mean,
        num_kept=num_kept,
        overflow=None if overflow is None else overflow.view(torch.bool)[0],
    )
