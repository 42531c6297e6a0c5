"""The losses of Liger 0.8.5: options of LigerFusedLinearGRPOLoss."""

from __future__ import annotations

import torch
from rows import Row
from snippets import (
    BY_SEQUENCE_KL,
    GSPO_MEAN,
    LOGPROBS,
    LUSPO,
    SAPO,
    UNBOUNDED_BY_SEQUENCE,
    VESPO,
    cispo,
    clipped,
    unbounded,
)
from torch import Tensor


def grpo(on_policy: bool = False, importance: str = "", **options):
    """The loss over hidden states that are the logits, and a head that is the identity."""

    def theirs(names: dict, logprobs: Tensor, entropies: Tensor) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

        loss = LigerFusedLinearGRPOLoss(
            **dict(beta=0.0, compiled=False, use_ref_model="beta" in options) | options
        )
        logits = names["logits"]
        ratio = (names["old"] - names["sampled"]).exp()
        return loss(
            logits, torch.eye(logits.shape[-1]), names["ids"], names["mask"].float(),
            names["advantages"][:, 0], ref_per_token_logps=names["ref"],
            old_per_token_logps=None if on_policy else names["old"],
            vllm_is_ratio=ratio.clamp(max=float(importance)) if importance else None,
            num_items_in_batch=torch.tensor(names["tokens"]),
        )[0]  # fmt: skip

    return theirs


def pairs(name: str, **options):
    """A loss of chosen sequences, the first half of the batch, and rejected ones."""

    def theirs(names: dict, logprobs: Tensor, entropies: Tensor) -> Tensor:
        from liger_kernel import chunked_loss

        loss = getattr(chunked_loss, name)(compiled=False, **options)
        logits, ids = names["logits"], names["ids"].masked_fill(~names["mask"], -100)
        return loss(torch.eye(logits.shape[-1]), logits, ids)[0]

    return theirs


SUMS = LOGPROBS + "chosen, rejected = (logprobs * mask).sum(-1).chunk(2)\n"
MEANS = LOGPROBS + "chosen, rejected = ((logprobs * mask).sum(-1) / lengths[:, 0]).chunk(2)\n"
# The odds of a probability of 1, as of a sequence without a token, are infinite.
NOT_SURE = MEANS.replace(".chunk", ".clamp(max=-1e-6).chunk")
LOGISTIC = "loss = -torch.nn.functional.logsigmoid({}).mean()"
CPO = SUMS + LOGISTIC.format("0.1 * (chosen - rejected)")
ODDS = (
    NOT_SURE
    + """\
odds = chosen - rejected - ((1 - chosen.exp()) / (1 - rejected.exp())).log()
loss = -0.1 * torch.nn.functional.logsigmoid(odds).mean()"""
)
KL = "policy_norm=tokens,\n    kl_coef=0.1, ref_logprobs=ref, kl_clamp=None"


def row(option: str, theirs, code: str) -> Row:
    return Row("Liger 0.8.5", option, theirs, code)


ROWS = [
    row('loss_type="dapo"', grpo(), unbounded("policy_norm=tokens")),
    row('loss_type="grpo"', grpo(loss_type="grpo"), UNBOUNDED_BY_SEQUENCE),
    row('loss_type="bnpo"', grpo(loss_type="bnpo"), unbounded()),
    row('loss_type="dr_grpo"', grpo(loss_type="dr_grpo", max_completion_length=17),
        unbounded("policy_norm=sequences * longest")),
    row('loss_type="luspo", importance_sampling_level="sequence"',
        grpo(loss_type="luspo", importance_sampling_level="sequence"),
        LUSPO),
    row('loss_type="cispo", epsilon_high=1.2', grpo(loss_type="cispo", epsilon_high=1.2),
        cispo("", "1.2", "tokens")),
    row('loss_type="sapo"', grpo(loss_type="sapo"), SAPO),
    row('loss_type="vespo"', grpo(loss_type="vespo"), VESPO),
    row('loss_type="grpo", importance_sampling_level="sequence"',
        grpo(loss_type="grpo", importance_sampling_level="sequence"), GSPO_MEAN),
    row("no old_per_token_logps (on-policy)", grpo(on_policy=True),
        clipped("policy_norm=tokens").replace("ids, old,", "ids, None,")),
    row("delta=1.3", grpo(delta=1.3), unbounded("clip_ratio_max=1.3, policy_norm=tokens")),
    row("beta=0.1", grpo(beta=0.1), unbounded(KL)),
    row('beta=0.1, loss_type="grpo"', grpo(beta=0.1, loss_type="grpo"), BY_SEQUENCE_KL),
    row("beta=0.1, use_bias_correction_kl=True", grpo(beta=0.1, use_bias_correction_kl=True),
        unbounded(KL + ", kl_ratio=True")),
    row("vllm_is_ratio", grpo(importance="1.1"),
        unbounded("policy_norm=tokens,\n    weights=(old - sampled).exp().clamp(max=1.1)")),
    row("LigerFusedLinearCPOLoss",
        pairs("LigerFusedLinearCPOLoss"),
        CPO + "\nloss = loss - chosen.sum() / mask.chunk(2)[0].sum()"),
    row("LigerFusedLinearCPOLoss, compute_nll_loss=False",
        pairs("LigerFusedLinearCPOLoss", compute_nll_loss=False), CPO),
    row("LigerFusedLinearSimPOLoss, compute_nll_loss=False",
        pairs("LigerFusedLinearSimPOLoss", compute_nll_loss=False),
        MEANS + LOGISTIC.format("0.1 * (chosen - rejected) - 0.5")),
    row("LigerFusedLinearORPOLoss, compute_nll_loss=False",
        pairs("LigerFusedLinearORPOLoss", compute_nll_loss=False), ODDS),
]  # fmt: skip
