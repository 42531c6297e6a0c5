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

LOGPROBS = "logprobs = token_logprobs(logits, ids, loss_mask=mask)\n"
RATIO = LOGPROBS + "ratio = (logprobs - old).exp()\n"


def clipped(options: str = "") -> str:
    return CLIPPED.format(options=options).replace(", \n)", "\n)").replace(", \n", ",\n")


def unbounded(options: str = "") -> str:
    """For libraries that do not bound the log-ratio."""
    return clipped("\n    log_ratio_clamp=None, " + (options and options + ","))


def by_sequence(options: str = "") -> str:
    return BY_SEQUENCE.format(options=options).replace(", \n)", ",\n)").replace(", \n", ",\n")


UNBOUNDED_BY_SEQUENCE = by_sequence("log_ratio_clamp=None,")
BY_SEQUENCE_KL = by_sequence(
    "log_ratio_clamp=None,"
    "\n    kl_coef=0.1, ref_logprobs=ref, kl_weights=1 / lengths.expand_as(ids), kl_clamp=None,"
)

# The policy's part where no option gives the KL term.
POLICY = (
    LOGPROBS
    + """\
loss = policy_objective(
    logprobs, old, advantages, loss_mask=mask, prob_threshold=None, {options}
).loss
"""
)


def with_kl(kl: str, options: str) -> str:
    """`kl`: the lines that set it."""
    policy = POLICY.format(options=options).replace(", \n", ",\n")
    return policy + kl + "\nloss = loss + 0.1 * (kl * mask).sum() / tokens"


# A weight that has no gradient, as verl bounds it.
WEIGHT = "weight = (logprobs.detach() - old).clamp(-20, 20).exp().clamp(max={most})\n"


GSPO = """\
logprobs = token_logprobs(logits, ids, loss_mask=mask)
ratio = (((logprobs - old) * mask).sum(-1) / lengths[:, 0]).exp()
held = ratio.clamp(0.8, 1.2)
loss = -torch.minimum(ratio * advantages[:, 0], held * advantages[:, 0])"""
GSPO_MEAN = GSPO + "\nloss = (loss * mask.any(-1)).sum() / sequences"
LUSPO = GSPO + "\nloss = (loss * mask.sum(-1)).sum() / sequences"

GSPO_TOKEN = """\
logprobs = token_logprobs(logits, ids, loss_mask=mask)
mean = ((logprobs.detach() - old) * mask).sum(-1, keepdim=True) / lengths
ratio = (logprobs - logprobs.detach() + mean).clamp(max=10).exp()
loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
loss = (loss * mask / lengths).sum() / sequences"""

SAPO = (
    LOGPROBS
    + """\
ratio = (logprobs - old).clamp(-20, 20).exp()
heat = torch.where(advantages > 0, 1.0, 1.05)
gate = torch.sigmoid(heat * (ratio - 1)) * 4 / heat
loss = -(gate * advantages * mask / lengths).sum() / sequences"""
)

VESPO = """\
logprobs = token_logprobs(logits, ids, loss_mask=mask)
log_w = ((logprobs.detach() - old).clamp(-20, 20) * mask).sum(-1, keepdim=True)
log_w = log_w.clamp(-18.420681, 20)  # from 1e-8 on
k, rate = torch.where(advantages >= 0, 2, 3), torch.where(advantages >= 0, 3, 2)
weight = (rate + k * log_w - rate * log_w.exp()).exp()
loss = -(weight * advantages * logprobs * mask).sum() / tokens"""


def cispo(low: str, high: str, norm: str) -> str:
    bounds = f"min={low}, max={high}" if low else f"max={high}"
    return RATIO + (
        f"loss = -(ratio.detach().clamp({bounds}) * advantages * logprobs * mask).sum() / {norm}"
    )


REINFORCE = LOGPROBS + "loss = -(logprobs * advantages * mask).sum() / {norm}"
