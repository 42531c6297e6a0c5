"""The losses of verl 0.9.1: `loss_mode` and the other options of its actor."""

from __future__ import annotations

from rows import Row
from snippets import (
    GSPO_TOKEN,
    LOGPROBS,
    RATIO,
    REINFORCE,
    SAPO,
    WEIGHT,
    by_sequence,
    cispo,
    clipped,
    with_kl,
)
from torch import Tensor


def actor(mode: str = "vanilla", agg: str = "token-mean", weighted=False, policy=None, **options):
    """`compute_policy_loss_<mode>` with these options of ActorConfig and PolicyLossConfig."""

    def theirs(names: dict, logprobs: Tensor, entropies: Tensor) -> Tensor:
        from verl.trainer.ppo.core_algos import agg_loss, get_policy_loss_fn, kl_penalty
        from verl.workers.config import ActorConfig, PolicyLossConfig

        config = ActorConfig(
            strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1,
            policy_loss=PolicyLossConfig(loss_mode=mode, **policy or {}), **options,
        )  # fmt: skip
        totals = {"token-mean": {"batch_num_tokens": names["tokens"]}}.get(agg, {})
        config.global_batch_info.update(totals)
        mask = names["mask"].to(logprobs.dtype)
        advantages = names["advantages"].expand_as(logprobs)
        weights = (names["old"] - names["sampled"]).exp().clamp(max=1.1) if weighted else None
        loss, _ = get_policy_loss_fn(mode)(
            names["old"], logprobs, advantages, mask, agg, config, weights
        )
        if config.use_kl_loss:
            kl = kl_penalty(logprobs, names["ref"], config.kl_loss_type)
            loss = loss + config.kl_loss_coef * agg_loss(kl, mask, agg, **totals)
        if config.entropy_coeff:
            loss = loss - config.entropy_coeff * agg_loss(entropies, mask, agg, **totals)
        return loss

    return theirs


def kl(kind: str):
    return actor(use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type=kind)


DUAL = "\n    clip_ratio_max=3.0, policy_norm=tokens,"
KL = DUAL + "\n    kl_coef=0.1, ref_logprobs=ref,"
K3 = """\
d = (ref - logprobs).clamp(-20, 20)
kl = (d.exp() - d - 1).clamp(max=10)"""
STRAIGHT = (
    K3
    + """
surrogate = (logprobs - ref).square() / 2
kl = surrogate + (kl - surrogate).detach()"""
)

DPPO = (
    LOGPROBS
    + WEIGHT.format(most=3)
    + """\
p, q = logprobs.detach().exp(), old.exp()
{near}
loss = -(weight * advantages * logprobs * near * mask).sum() / tokens"""
)
TV = "near = torch.where(advantages > 0, p - q <= 0.05, q - p <= 0.05)"
BINARY_KL = """\
rest = ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
kl = q * (old - logprobs.detach()) + (1 - q) * rest
near = (kl <= 0.01) | torch.where(advantages > 0, p <= q, p >= q)"""

COVARIANCE = """\
cov = advantages - (advantages * mask).sum() / mask.sum()
cov = cov * (logprobs.detach() - logprobs.detach()[mask].mean())
"""
CLIP_COV = (
    RATIO
    + COVARIANCE
    + """\
clipped = (ratio - 1) * advantages.sign() > 0.2
unstable = (cov > 0.1) & (cov < 5) & ~clipped
loss = policy_objective(
    logprobs, old, advantages, loss_mask=mask & ~unstable, prob_threshold=None,
    log_ratio_clamp=None, policy_norm=tokens,
).loss"""
)
KL_COV = (
    RATIO
    + COVARIANCE
    + """\
count = int(0.2 * mask.sum())
highest = mask & (cov >= cov[mask].topk(count).values[-1])
penalty = 0.1 * (logprobs - old).abs() * highest
loss = ((penalty - ratio * advantages) * mask).sum() / tokens"""
)

GMPO = (
    LOGPROBS
    + """\
sign, log_ratio = advantages.sign(), logprobs - old
held = sign * torch.minimum(sign * log_ratio, sign * log_ratio.clamp(-0.2, 0.2))
ratio = ((held * mask).sum(-1) / lengths[:, 0]).exp()
loss = -(advantages[:, 0] * ratio * mask.any(-1)).mean()"""
)

DRO = (
    LOGPROBS
    + """\
penalty = 0.5 * 0.3 * (logprobs - old).square()
loss = ((penalty - logprobs * advantages) * mask).sum() / tokens"""
)

TRUNCATED = (
    LOGPROBS
    + WEIGHT.format(most=1.1)
    + "loss = -(weight * advantages * logprobs * mask).sum() / tokens"
)


def row(option: str, theirs, code: str) -> Row:
    return Row("verl 0.9.1", option, theirs, code)


def correction(**options):
    def theirs(names: dict, logprobs: Tensor, entropies: Tensor) -> Tensor:
        from verl.trainer.config import RolloutCorrectionConfig

        config = RolloutCorrectionConfig(bypass_mode=True, **options)
        policy = {"rollout_correction": config}
        return actor("bypass_mode", policy=policy)(names, logprobs, entropies)

    return theirs


ROWS = [
    row('"vanilla"', actor(), clipped(DUAL)),
    row('"vanilla", clip_ratio_c=1.3', actor(clip_ratio_c=1.3),
        clipped(DUAL.replace("3.0", "1.3"))),
    row('loss_agg_mode="token-sum"', actor(agg="token-sum"),
        clipped("\n    clip_ratio_max=3.0, policy_norm=1,")),
    row('loss_agg_mode="seq-mean-token-sum"', actor(agg="seq-mean-token-sum"),
        clipped("\n    clip_ratio_max=3.0, policy_norm=sequences,")),
    row('loss_agg_mode="seq-mean-token-sum-norm"', actor(agg="seq-mean-token-sum-norm"),
        clipped("\n    clip_ratio_max=3.0, policy_norm=sequences * longest,")),
    row('loss_agg_mode="seq-mean-token-mean"', actor(agg="seq-mean-token-mean"),
        by_sequence("clip_ratio_max=3.0")),
    row('rollout_is="token"', actor(weighted=True),
        clipped(DUAL + "\n    weights=(old - sampled).exp().clamp(max=1.1),")),
    row('kl_loss_type="kl" (k1)', kl("kl"), clipped(KL + ' kl_estimator="k1",')),
    row('kl_loss_type="mse" (k2)', kl("mse"), clipped(KL + ' kl_estimator="k2",')),
    row('kl_loss_type="low_var_kl" (k3)', kl("low_var_kl"), with_kl(K3, DUAL)),
    row('kl_loss_type="k3+"', kl("k3+"), with_kl(STRAIGHT, DUAL)),
    row('kl_loss_type="abs"', kl("abs"), with_kl("kl = (logprobs - ref).abs()", DUAL)),
    row("entropy_coeff=0.01", actor(entropy_coeff=0.01, agg="seq-mean-token-mean"),
        by_sequence("clip_ratio_max=3.0") + "\nentropy = token_logprobs("
        "logits, ids, loss_mask=mask, entropy=True)[1]"
        "\nloss = loss - 0.01 * (entropy * mask / lengths).sum() / sequences"),
    row('"gspo"', actor("gspo", agg="seq-mean-token-mean"), GSPO_TOKEN),
    row('"sapo"', actor("sapo", agg="seq-mean-token-mean"), SAPO),
    row('"cispo"', actor("cispo"), cispo("0.8", "1.2", "tokens")),
    row('"geo_mean" (GMPO)', actor("geo_mean"), GMPO),
    row('"gpg"', actor("gpg"), REINFORCE.format(norm="tokens")),
    row('"dppo_tv", clip_ratio=0.05', actor("dppo_tv", clip_ratio_low=0.05, clip_ratio_high=0.05),
        DPPO.format(near=TV)),
    row('"dppo_kl", clip_ratio=0.01', actor("dppo_kl", clip_ratio_low=0.01, clip_ratio_high=0.01),
        DPPO.format(near=BINARY_KL)),
    row('"clip_cov", clip_cov_ratio=1, clip_cov_lb=0.1',
        actor("clip_cov", policy={"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1}), CLIP_COV),
    row('"kl_cov", kl_cov_ratio=0.2', actor("kl_cov", policy={"kl_cov_ratio": 0.2}), KL_COV),
    row('"dro", dro_beta=0.3', actor("dro", policy={"dro_beta": 0.3}), DRO),
    row('"bypass_mode", loss_type="reinforce", rollout_is="token"',
        correction(loss_type="reinforce", rollout_is="token", rollout_is_threshold=1.1),
        TRUNCATED),
]  # fmt: skip
