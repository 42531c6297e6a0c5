"""The code of docs/losses.md: what a trainer's user writes with spo_kernels, by name."""

# The clipped loss; its norm is the number of kept tokens.
CLIPPED = """\
loss = masked_ppo_loss(
    logits, ids, old, advantages, loss_mask=mask, prob_threshold=None, {options}
).loss"""

# The mean over sequences of the mean over tokens.
BY_SEQUENCE = """\
loss = masked_ppo_loss(
    logits, ids, old, advantages, loss_mask=mask, prob_threshold=None,
    weights=1 / lengths.expand_as(ids), policy_norm=sequences, {options}
).loss"""

BY_SEQUENCE_KL = BY_SEQUENCE.format(
    options="\n    kl_coef=0.1, ref_logprobs=ref, kl_weights=1 / lengths.expand_as(ids)"
)

LOGPROBS = "logprobs = token_logprobs(logits, ids, loss_mask=mask)\n"
RATIO = LOGPROBS + "ratio = (logprobs - old).exp()\n"


def clipped(options: str = "") -> str:
    return CLIPPED.format(options=options).replace(", \n)", "\n)")


def by_sequence(options: str = "") -> str:
    return BY_SEQUENCE.format(options=options).replace(", \n)", ",\n)")


GSPO = """\
logprobs = token_logprobs(logits, ids, loss_mask=mask)
ratio = (((logprobs - old) * mask).sum(-1) / lengths[:, 0]).exp()
held = ratio.clamp(0.8, 1.2)
loss = -torch.minimum(ratio * advantages[:, 0], held * advantages[:, 0])"""

GSPO_TOKEN = """\
logprobs = token_logprobs(logits, ids, loss_mask=mask)
log_ratio = ((logprobs.detach() - old) * mask).sum(-1, keepdim=True) / lengths
loss = policy_objective(
    logprobs, logprobs.detach() - log_ratio, advantages, loss_mask=mask, prob_threshold=None,
    weights=1 / lengths.expand_as(ids), policy_norm=sequences,
).loss"""

SAPO = (
    RATIO
    + """\
heat = torch.where(advantages > 0, 1.0, 1.05)
gate = torch.sigmoid(heat * (ratio - 1)) * 4 / heat
loss = -(gate * advantages * mask / lengths).sum() / sequences"""
)

VESPO = """\
logprobs = token_logprobs(logits, ids, loss_mask=mask)
log_w = ((logprobs.detach() - old) * mask).sum(-1, keepdim=True)
k, rate = torch.where(advantages >= 0, 2, 3), torch.where(advantages >= 0, 3, 2)
weight = (rate + k * log_w - rate * log_w.exp()).exp()
loss = -(weight * advantages * logprobs * mask).sum() / tokens"""


def cispo(low: str, high: str, norm: str) -> str:
    bounds = f"min={low}, max={high}" if low else f"max={high}"
    return RATIO + (
        f"loss = -(ratio.detach().clamp({bounds}) * advantages * logprobs * mask).sum() / {norm}"
    )


REINFORCE = LOGPROBS + "loss = -(logprobs * advantages * mask).sum() / {norm}"
