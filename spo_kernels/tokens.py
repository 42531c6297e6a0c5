"""The policy loss's arguments per token and its options: one list, checked and flattened.

SPO_TOKEN_FIELDS in csrc/ops.h has the same names as `Tokens`, which generates the schemas of the
ops and the arguments of the kernels.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, field, fields
from typing import Any, cast

import torch
from torch import Tensor

from spo_kernels import rows

# Values of `KlEstimator` and `KlScope` in csrc/ops.h.
KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3}
KL_SCOPES = {"masked": 0, "all": 1}
NAN_LOGPROBS = ("error", "drop")


@dataclass(frozen=True)
class Tokens:
    """The objective's inputs per token, and its scalars: the only list of them in Python.

    Where a norm is a tensor, its value is not used; a value below 0 stands for the number of kept
    tokens. "broadcast": the user's tensor may broadcast.
    """

    token_ids: Tensor  # (N,) int32 or int64
    old_logprobs: Tensor | None  # (N,); None: those of this pass
    advantages: Tensor = field(metadata={"broadcast": True})  # (N,)
    weights: Tensor | None = field(metadata={"broadcast": True})  # (N,); None: 1
    ref_logprobs: Tensor | None  # (N,); None: no KL
    kl_weights: Tensor | None = field(metadata={"broadcast": True})  # (N,); None: 1
    loss_mask: Tensor | None  # (N,) bool or integer, not 0 = trained; None: all
    temperature: Tensor | None  # (N,) or (1,); None: temperature_value
    policy_norm: Tensor | None  # (1,), int64 or as the other floats
    kl_norm: Tensor | None  # (1,)
    temperature_value: float
    policy_norm_value: float
    kl_norm_value: float
    logit_scale: float
    logit_softcap: float
    log_threshold: float
    clip_eps_low: float
    clip_eps_high: float
    clip_ratio_max: float
    log_ratio_clamp: float
    kl_coef: float
    kl_clamp: float
    entropy_coef: float
    kl_estimator: int
    kl_scope: int
    kl_ratio: bool
    drop_nan: bool
    metrics: bool

    @property
    def masks_late(self) -> bool:
        """The probability mask needs the logprobs of this pass."""
        return self.old_logprobs is None and self.log_threshold < math.inf

    @property
    def norm_is_late(self) -> bool:
        """So Z is known after the rows; it is 1 until then."""
        return self.masks_late and self.policy_norm is None and self.policy_norm_value < 0

    def unknown(self) -> Tensor | None:
        """(N,) bool: trained, but dropped because the old logprob is NaN; None if that is an error
        or cannot be."""
        if self.old_logprobs is None or not self.drop_nan:
            return None
        return self._in_mask() & self.old_logprobs.isnan()

    def trained(self) -> Tensor:
        """(N,) bool: what the loss mask trains, without what is dropped."""
        unknown = self.unknown()
        return self._in_mask() if unknown is None else self._in_mask() & ~unknown

    def _in_mask(self) -> Tensor:
        if self.loss_mask is None:
            return torch.ones_like(self.token_ids, dtype=torch.bool)
        return self.loss_mask != 0

    def policy_mask(self, logprobs: Tensor | None = None) -> Tensor:
        """(N,) bool: M, the tokens that the masks keep. Without `logprobs` (N,), a late mask keeps
        all."""
        given = logprobs if self.masks_late else self.old_logprobs
        return self.trained() if given is None else self.trained() & ~(given >= self.log_threshold)

    def kl_mask(self, logprobs: Tensor | None = None) -> Tensor:
        """(N,) bool: K, the tokens of the KL term."""
        if self.kl_estimator == 0:
            return torch.zeros_like(self.token_ids, dtype=torch.bool)
        return self.trained() if self.kl_scope == KL_SCOPES["all"] else self.policy_mask(logprobs)

    def needs_all_kept(self) -> bool:
        """Whether kept tokens without a policy term need their logprob too."""
        return self.metrics or self.entropy_coef != 0 or self.masks_late

    def wants_entropy(self, asked: bool) -> bool:
        return asked or self.metrics or self.entropy_coef != 0

    def runs(self) -> Tensor:
        """(N,) bool: the token's logprob is computed."""
        runs = self.policy_mask()
        if not self.needs_all_kept():
            runs = runs & (self.advantages != 0)
        return runs | self.kl_mask() if self.kl_coef > 0 or self.metrics else runs

    def temperatures(self) -> Tensor:
        """(N,) or (1,)."""
        if self.temperature is None:
            return self.advantages.new_full((1,), self.temperature_value)
        return self.temperature

    def norms(self, num_kept: Tensor) -> tuple[Tensor, Tensor]:
        """() each: Z and Z_kl."""
        count = num_kept.to(self.advantages.dtype)
        given = ((self.policy_norm, self.policy_norm_value), (self.kl_norm, self.kl_norm_value))
        z, z_kl = (
            (count if value < 0 else torch.full_like(count, value))
            if norm is None
            else norm.reshape(()).to(count.dtype)
            for norm, value in given
        )
        return z, z_kl

    def check(self, vocab: int) -> None:
        """Raise ValueError if a norm or a kept token holds a bad value, see `rows.check_rows`."""
        for name, norm in (("policy_norm", self.policy_norm), ("kl_norm", self.kl_norm)):
            if norm is not None and not 0 <= norm < math.inf:
                raise ValueError(f"{name}: expected a finite count >= 0, found {float(norm)}")
        kept = self.policy_mask() | self.kl_mask()
        rows.check_rows(self.token_ids, self.temperatures(), kept, vocab, self.old_logprobs)

    def check_scalars(self) -> None:
        """Raise ValueError for a scalar out of its range."""
        for name in ("clip_eps_low", "clip_eps_high"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected a number >= 0, found {getattr(self, name)}")
        for name in ("log_ratio_clamp", "kl_clamp"):
            if not getattr(self, name) > 0:
                raise ValueError(
                    f"{name}: expected a positive number or None, found {getattr(self, name)}"
                )
        if not self.clip_ratio_max > 1:
            raise ValueError(
                f"clip_ratio_max: expected a number above 1 or None, found {self.clip_ratio_max}"
            )
        if not -math.inf < self.entropy_coef < math.inf:
            raise ValueError(f"entropy_coef: expected a finite number, found {self.entropy_coef}")
        own_kl_norm = self.kl_norm is not None or self.kl_norm_value >= 0
        if self.norm_is_late and own_kl_norm:
            raise ValueError(
                "kl_norm: expected policy_norm beside it, as old_logprobs=None with a "
                "prob_threshold finds the number of kept tokens only at the end"
            )

    def arguments(self) -> tuple[Any, ...]:
        """In the order of the op schemas."""
        return tuple(getattr(self, name) for name in TYPES)


TYPES = {f.name: str(f.type).replace(" | None", "?") for f in fields(Tokens)}
SCHEMA = ", ".join(f"{kind} {name}" for name, kind in TYPES.items())  # ends the schema of every op
_TENSORS = {f.name: dict(f.metadata) for f in fields(Tokens) if "Tensor" in TYPES[f.name]}


def log_threshold(prob_threshold: float | None) -> float:
    """Its logarithm, infinity for None. Raises ValueError for a threshold outside (0, 1]."""
    if prob_threshold is None:
        return math.inf
    _check_numbers(prob_threshold=prob_threshold)
    if not 0 < prob_threshold <= 1:
        raise ValueError(f"prob_threshold: expected (0, 1] or None, found {prob_threshold}")
    return math.log(prob_threshold)


def prepare(
    like: Tensor,  # logits, hidden states or logprobs: gives device and precision
    shape: tuple[int, ...],
    *,
    token_ids: Tensor,
    loss_mask: Tensor | None,
    prob_threshold: float | None,
    temperature: float | Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    clip_eps_low: float | None,
    clip_eps_high: float | None,
    clip_ratio_max: float | None,
    log_ratio_clamp: float | None,
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    kl_scope: str,
    kl_clamp: float | None,
    policy_norm: float | Tensor | None,
    kl_norm: float | Tensor | None,
    nan_logprobs: str,
    **others: Any,
) -> Tokens:
    """Check and flatten the arguments that the public functions share.

    `others` become the fields of `Tokens` with their names. Scalars are taken as they are; floats
    per token must have the shape of the tokens, or broadcast if the field's metadata allow it.
    """
    others["ref_logprobs"] = ref_logprobs
    rows.check_devices(
        like,
        token_ids=token_ids,
        **others,
        loss_mask=loss_mask,
        temperature=temperature,
        policy_norm=policy_norm,
        kl_norm=kl_norm,
    )
    rows.check_tensors(token_ids=token_ids)
    rows.check_scaling(logit_scale, logit_softcap)
    bounds = _bounds(
        clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high, clip_ratio_max=clip_ratio_max,
        log_ratio_clamp=log_ratio_clamp, kl_clamp=kl_clamp,
    )  # fmt: skip
    _check_numbers(kl_coef=kl_coef, entropy_coef=others["entropy_coef"])
    _check_flags(kl_ratio=others["kl_ratio"], metrics=others["metrics"])
    _check_names(kl_coef, kl_estimator, kl_scope, nan_logprobs, ref_logprobs)
    dtype = rows.math_dtype(like)
    ids = rows.flat_ids("token_ids", token_ids, shape)  # first: it tells most about a wrong shift
    for k, x in others.items():
        if k in _TENSORS and not (x is None and TYPES[k] == "Tensor?"):
            flatten = rows.broadcast_floats if "broadcast" in _TENSORS[k] else rows.flat_floats
            others[k] = flatten(k, cast(Tensor, x), shape, dtype)
    z, z_value = _norm("policy_norm", policy_norm, dtype)
    z_kl, z_kl_value = (z, z_value) if kl_norm is None else _norm("kl_norm", kl_norm, dtype)
    heat = rows.flat_temperature(temperature, shape, dtype)
    tokens = Tokens(
        token_ids=ids,
        loss_mask=rows.flat_mask("loss_mask", loss_mask, shape),
        temperature=heat,
        policy_norm=z,
        kl_norm=z_kl,
        temperature_value=float(temperature) if heat is None else 1.0,
        policy_norm_value=z_value,
        kl_norm_value=z_kl_value,
        logit_scale=float(logit_scale),
        logit_softcap=math.inf if logit_softcap is None else float(logit_softcap),
        log_threshold=log_threshold(prob_threshold),
        **bounds,
        kl_coef=float(kl_coef),
        kl_estimator=0 if ref_logprobs is None else KL_ESTIMATORS[kl_estimator],
        # Without a term the figure is that of the mask, whose rows are computed anyway.
        kl_scope=KL_SCOPES[kl_scope if kl_coef > 0 or others["metrics"] else "masked"],
        drop_nan=nan_logprobs == "drop",
        **others,
    )
    tokens.check_scalars()
    return tokens


def _bounds(**options: float | None) -> dict[str, float]:
    """None is no bound."""
    bounds = {name: math.inf if x is None else x for name, x in options.items()}
    _check_numbers(**bounds)
    return bounds


def _check_numbers(**options: Any) -> None:
    """Raise TypeError for what is no number. A kernel would take a tensor's address for one."""
    for name, value in options.items():
        # The types come first: asking the abstract class takes as long as ten of these calls.
        if type(value) not in (float, int) and not isinstance(value, numbers.Real):
            found = "a tensor: use .item()" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name}: expected a number, found {found}")


def _check_flags(**options: Any) -> None:
    for name, value in options.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, found {value!r}")


def _check_names(
    kl_coef: float,
    kl_estimator: str,
    kl_scope: str,
    nan_logprobs: str,
    ref_logprobs: Tensor | None,
) -> None:
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"kl_estimator: expected k1, k2 or k3, found {kl_estimator!r}")
    if kl_scope not in KL_SCOPES:
        raise ValueError(f"kl_scope: expected 'masked' or 'all', found {kl_scope!r}")
    if nan_logprobs not in NAN_LOGPROBS:
        raise ValueError(f"nan_logprobs: expected 'error' or 'drop', found {nan_logprobs!r}")
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"kl_coef: expected a finite number >= 0, found {kl_coef}")
    if kl_coef > 0 and ref_logprobs is None:
        raise ValueError(f"ref_logprobs: expected a tensor with kl_coef={kl_coef}, found None")


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
