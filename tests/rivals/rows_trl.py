"""The losses of TRL 1.16: options of GRPOConfig, and RLOOTrainer."""

from __future__ import annotations

import tempfile

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


def policy():
    from benchmarks.trl_step import build_model, build_tokenizer

    return build_model(13, 8, 1), build_tokenizer(13)


def trainer_of(kind: str, **options):
    """A trainer with these options, whose logprobs the caller gives."""
    import trl
    from datasets import Dataset

    model, tokenizer = policy()
    common = dict(use_cpu=True, bf16=False, report_to="none", save_strategy="no")
    sizes = dict(num_generations=2, per_device_train_batch_size=4, max_completion_length=17)
    with tempfile.TemporaryDirectory() as folder:
        config = getattr(trl, f"{kind}Config")(output_dir=folder, **common, **sizes, **options)
        trainer = getattr(trl, f"{kind}Trainer")(
            model=model, reward_funcs=lambda completions, **others: [0.0] * len(completions),
            args=config, train_dataset=Dataset.from_dict({"prompt": ["w3"] * 4}),
            processing_class=tokenizer,
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def grpo(on_policy: bool = False, importance: str = "", **options):
    """`GRPOTrainer._compute_loss` with these options, over the logprobs of a row."""

    def theirs(names: dict, logprobs: Tensor, entropies: Tensor) -> Tensor:
        trainer = trainer_of("GRPO", **{k: v for k, v in options.items() if k != "beta"})
        trainer.beta = options.get("beta", 0.0)  # earlier, it would ask the hub for a reference
        trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logprobs, entropies, None)
        ids, mask = names["ids"], names["mask"].int()
        inputs = {
            "prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1], "completion_ids": ids,
            "completion_mask": mask, "advantages": names["advantages"][:, 0],
            "num_items_in_batch": logprobs.new_tensor(names["tokens"]),
            "ref_per_token_logps": names["ref"], "sampling_per_token_logps": names["sampled"],
        }  # fmt: skip
        if not on_policy:
            inputs["old_per_token_logps"] = names["old"]
        if importance:  # what its sampling step computes from vLLM's logprobs
            trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
            ratio = (names["old"] - names["sampled"]).exp()
            inputs["importance_sampling_ratio"] = ratio.clamp(max=float(importance))
        return trainer._compute_loss(trainer.model, inputs)

    return theirs


def rloo(names: dict, logprobs: Tensor, entropies: Tensor) -> Tensor:
    trainer = trainer_of("RLOO", beta=0.0)
    trainer._get_per_token_logps_and_entropies = lambda *a, **k: (logprobs, entropies, None)
    ids, mask = names["ids"], names["mask"].int()
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": mask[:, :1], "completion_ids": ids,
        "completion_mask": mask, "advantages": names["advantages"][:, 0],
        "old_logps": (names["old"] * mask).sum(1),
    }  # fmt: skip
    return trainer._compute_loss(trainer.model, inputs)


RLOO = """\
logprobs = token_logprobs(logits, ids, loss_mask=mask)
ratio = ((logprobs - old) * mask).sum(-1).exp()
loss = -torch.minimum(ratio * advantages[:, 0], ratio.clamp(0.8, 1.2) * advantages[:, 0]).mean()"""

TOP_ENTROPY = """\
with torch.no_grad():
    entropy = token_logprobs(logits, ids, loss_mask=mask, entropy=True)[1]
unsure = mask & (entropy >= entropy[mask].quantile(0.6))
loss = masked_ppo_loss(
    logits, ids, old, advantages, loss_mask=unsure, prob_threshold=None,
    log_ratio_clamp=None, policy_norm=tokens,
).loss"""

OFF_POLICY_MASK = (
    LOGPROBS
    + """\
kl = ((sampled - logprobs.detach()) * mask).sum(-1, keepdim=True) / lengths
near = mask & ((advantages >= 0) | (kl <= 0.05))
loss = policy_objective(
    logprobs, old, advantages, loss_mask=near, prob_threshold=None,
    log_ratio_clamp=None, policy_norm=tokens,
).loss"""
)

IMPORTANCE = unbounded("policy_norm=tokens,\n    weights=(old - sampled).exp().clamp(max=1.1)")
KL = "policy_norm=tokens,\n    kl_coef=0.1, ref_logprobs=ref, kl_clamp=None"


def row(option: str, theirs, code: str) -> Row:
    return Row("TRL 1.16", option, theirs, code)


ROWS = [
    row('loss_type="dapo"', grpo(loss_type="dapo"), unbounded("policy_norm=tokens")),
    row(
        'loss_type="grpo"',
        grpo(loss_type="grpo"),
        UNBOUNDED_BY_SEQUENCE,
    ),
    row('loss_type="bnpo"', grpo(loss_type="bnpo"), unbounded()),
    row(
        'loss_type="dr_grpo"',
        grpo(loss_type="dr_grpo"),
        unbounded("policy_norm=sequences * longest"),
    ),
    row(
        'loss_type="luspo", importance_sampling_level="sequence"',
        grpo(loss_type="luspo", importance_sampling_level="sequence"),
        LUSPO,
    ),
    row('loss_type="cispo", epsilon_high=1.2', grpo(loss_type="cispo", epsilon_high=1.2),
        cispo("", "1.2", "tokens")),
    row('loss_type="sapo"', grpo(loss_type="sapo"), SAPO),
    row('loss_type="vespo"', grpo(loss_type="vespo"), VESPO),
    row(
        'loss_type="grpo", importance_sampling_level="sequence"',
        grpo(loss_type="grpo", importance_sampling_level="sequence"),
        GSPO_MEAN,
    ),
    row("num_iterations=1 (on-policy)", grpo(on_policy=True, loss_type="dapo"),
        clipped("policy_norm=tokens").replace("ids, old,", "ids, None,")),
    row("epsilon=0.1, epsilon_high=0.3", grpo(loss_type="dapo", epsilon=0.1, epsilon_high=0.3),
        unbounded("clip_eps_low=0.1, clip_eps_high=0.3, policy_norm=tokens")),
    row("delta=1.3", grpo(loss_type="dapo", delta=1.3),
        unbounded("clip_ratio_max=1.3, policy_norm=tokens")),
    row("beta=0.1", grpo(loss_type="dapo", beta=0.1), unbounded(KL + ", kl_ratio=True")),
    row("beta=0.1, use_bias_correction_kl=False",
        grpo(loss_type="dapo", beta=0.1, use_bias_correction_kl=False), unbounded(KL)),
    row('beta=0.1, use_bias_correction_kl=False, loss_type="grpo"',
        grpo(loss_type="grpo", beta=0.1, use_bias_correction_kl=False), BY_SEQUENCE_KL),
    row('entropy_coef=0.01, loss_type="bnpo"', grpo(loss_type="bnpo", entropy_coef=0.01),
        unbounded("entropy_coef=0.01")),
    row("top_entropy_quantile=0.4", grpo(loss_type="dapo", top_entropy_quantile=0.4), TOP_ENTROPY),
    row("off_policy_mask_threshold=0.05",
        grpo(loss_type="dapo", off_policy_mask_threshold=0.05), OFF_POLICY_MASK),
    row('vllm_importance_sampling_mode="token_truncate", vllm_importance_sampling_clip_max=1.1',
        grpo(loss_type="dapo", importance="1.1"), IMPORTANCE),
    row("RLOOTrainer", rloo, RLOO),
]  # fmt: skip
