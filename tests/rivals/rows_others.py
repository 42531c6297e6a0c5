"""The losses of torchtune 0.6.1, OpenRLHF 0.11.2 and prime-rl.

prime-rl is in no registry: its formula stands here, and `PRIME_BY_HAND` in the test.
"""

from __future__ import annotations

import math
import sys
from types import ModuleType

import torch
from rows import Row
from snippets import GSPO_MEAN, LOGPROBS, by_sequence, clipped, unbounded, with_kl
from torch import Tensor

from benchmarks.kernels.rivals import import_part


def openrlhf(kl: str = "", unbiased: bool = False, **options):
    """`PolicyLoss` with these options, plus its KL term."""

    def theirs(names: dict, logprobs: Tensor, entropies: Tensor) -> Tensor:
        # Its helpers import DeepSpeed, which the losses do not use.
        sys.modules.setdefault("deepspeed", ModuleType("deepspeed"))
        losses, helpers = (import_part(f"openrlhf.models.{x}") for x in ("loss", "utils"))
        mask = names["mask"].to(logprobs.dtype)
        sampled = names["sampled"] if options.get("is_correction_level", "off") != "off" else None
        loss = losses.PolicyLoss(**options)(
            logprobs, names["old"], names["advantages"].expand_as(logprobs), mask, sampled,
            batch_num_tokens=names["tokens"],
        )[0]  # fmt: skip
        if kl:
            per_token = helpers.compute_approx_kl(
                logprobs, names["ref"], names["old"], kl, unbiased_gradient=unbiased
            )
            loss = loss + 0.1 * (per_token * mask).sum() / names["tokens"]
        return loss

    return theirs


def torchtune(names: dict, logprobs: Tensor, entropies: Tensor) -> Tensor:
    # The package, which imports torchao, exports the mean; the loss takes it from there.
    mean = import_part("torchtune.rlhf.rewards").masked_mean
    sys.modules["torchtune.rlhf"].masked_mean = mean
    loss = import_part("torchtune.rlhf.loss.ppo").PPOLoss(epsilon=0.2)
    nothing = torch.zeros_like(logprobs)
    advantages = names["advantages"].expand_as(logprobs)
    values = (nothing, nothing, nothing)
    return loss(names["old"], logprobs, advantages, *values, names["mask"], names["mask"])[0]


def preference(module: str, name: str, **options):
    """A loss of chosen sequences, the first half of the batch, and rejected ones."""

    def theirs(names: dict, logprobs: Tensor, entropies: Tensor) -> Tensor:
        sys.modules.setdefault("deepspeed", ModuleType("deepspeed"))
        loss = getattr(import_part(module), name)(**options)
        totals = [(x * names["mask"]).sum(-1).chunk(2) for x in (logprobs, names["ref"])]
        return loss(*totals[0], *totals[1])[0].mean()

    return theirs


def prime(names: dict, logprobs: Tensor, entropies: Tensor) -> Tensor:
    """By token: -ratio * A where the ratio lies within its bounds, plus tau * log ratio."""
    total = logprobs.new_zeros(())
    for place in names["mask"].nonzero().tolist():
        i, j = place
        log_ratio = logprobs[i, j] - names["sampled"][i, j]
        if PRIME_LOW <= math.exp(log_ratio) <= PRIME_HIGH:
            total = total - log_ratio.exp() * names["advantages"][i, 0]
        total = total + PRIME_TAU * log_ratio
    return total / names["tokens"]


PRIME_LOW, PRIME_HIGH, PRIME_TAU = 0.8, 1.25, 0.1
PRIME = """\
logprobs = token_logprobs(logits, ids, loss_mask=mask)
ratio = (logprobs - sampled).exp()
near = mask & (ratio >= 0.8) & (ratio <= 1.25)
loss = -(ratio * advantages * near).sum() + 0.1 * ((logprobs - sampled) * mask).sum()
loss = loss / tokens"""

SCORES = (
    LOGPROBS
    + """\
scores = ((logprobs - ref) * mask).sum(-1)
chosen, rejected = scores.chunk(2)
"""
)
DPO = SCORES + "loss = -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).mean()"

BINARY_KL = """\
p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (sampled, old))
kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
near = kl <= 0.02
weights = torch.where(near, (old - sampled).exp(), 0.0)
"""
WEIGHTED = clipped("\n    weights=weights, policy_norm=tokens,")
GATE = "weights = (old - sampled).exp()\n"
SEQUENCE_GATE = (
    GATE
    + """\
mean = (((old - sampled) * mask).sum(-1, keepdim=True) / lengths).exp()
weights = torch.where((mean >= 0.9) & (mean <= 1.1), weights, 0.0)
"""
)
K1 = "kl = (logprobs - ref).clamp(-10, 10)"
K2 = "kl = ((logprobs - ref).square() / 2).clamp(max=10)"
K3 = """\
d = (ref - logprobs).clamp(max=10)
kl = (d.exp() - d - 1).clamp(max=10)"""
UNBIASED = (
    K3
    + """
ratio = (logprobs - old).exp().clamp(max=10).detach()
surrogate = ratio * (ref - logprobs).square() / 2
kl = surrogate + (kl - surrogate).detach()"""
)


def row(option: str, theirs, code: str) -> Row:
    return Row("OpenRLHF 0.11.2", option, theirs, code)


def gate(mode: str, low: float, high: float, level="token", gating="ratio"):
    return openrlhf(
        is_correction_level=level, is_correction_mode=mode, is_correction_gating=gating,
        is_correction_threshold=(low, high),
    )  # fmt: skip


ROWS = [
    row('policy_loss_type="ppo"', openrlhf(), clipped("policy_norm=tokens")),
    row("token_level_loss=False", openrlhf(token_level_loss=False), by_sequence()),
    row("dual_clip=1.3", openrlhf(dual_clip=1.3),
        clipped("\n    clip_ratio_max=1.3, policy_norm=tokens,")),
    row('policy_loss_type="gspo"', openrlhf(policy_loss_type="gspo"), GSPO_MEAN),
    row('is_correction_level="token", is_correction_mode="clip"', gate("clip", 0.9, 1.1),
        GATE + "weights = weights.clamp(0.9, 1.1)\n" + WEIGHTED),
    row('is_correction_level="token", is_correction_mode="mask"', gate("mask", 0.9, 1.1),
        GATE + "weights = torch.where((weights >= 0.9) & (weights <= 1.1), weights, 0.0)\n"
        + WEIGHTED),
    row('is_correction_level="seq", is_correction_mode="mask"',
        gate("mask", 0.9, 1.1, level="seq"), SEQUENCE_GATE + WEIGHTED),
    row('is_correction_level="token", is_correction_gating="binary_kl"',
        gate("mask", -1.0, 0.02, gating="binary_kl"), BINARY_KL + WEIGHTED),
    row('kl_estimator="k1"', openrlhf("k1"), with_kl(K1, "policy_norm=tokens")),
    row('kl_estimator="k2"', openrlhf("k2"), with_kl(K2, "policy_norm=tokens")),
    row('kl_estimator="k3"', openrlhf("k3"), with_kl(K3, "policy_norm=tokens")),
    row('kl_estimator="k3", unbiased_gradient=True', openrlhf("k3", unbiased=True),
        with_kl(UNBIASED, "policy_norm=tokens")),
    row("DPOLoss", preference("openrlhf.models.loss", "DPOLoss", beta=0.1), DPO),
    Row("torchtune 0.6.1", "PPOLoss", torchtune, unbounded()),
    Row("torchtune 0.6.1", "DPOLoss", preference("torchtune.rlhf.loss.dpo", "DPOLoss"), DPO),
    Row("torchtune 0.6.1", "RSOLoss", preference("torchtune.rlhf.loss.dpo", "RSOLoss"),
        SCORES + "loss = torch.relu(1 - 0.1 * (chosen - rejected)).mean()"),
    Row("prime-rl", "mask_ratio_low=0.8, mask_ratio_high=1.25, kl_tau=0.1", prime, PRIME),
]  # fmt: skip
