"""Settings of a recipe that are out of range or contradict each other, each one sentence."""

from __future__ import annotations

import math
import operator

from spo.config.recipe import Config

LOSS_OF = {"values": "policy", "gae": "policy", "correct": "nll", "pairs": "dpo"}
# None stands for no limit.
POSITIVE = (
    "train.iterations",
    "train.prompts",
    "train.epochs",
    "train.minibatches",
    "train.tokens_per_batch",
    "train.checkpoint_every",
    "train.learning_rate",
    "sampling.max_new_tokens",
    "engine.max_num_seqs",
    "engine.max_model_len",
    "eval.problems",
    "train.replay_age",
    "train.replay_samples",
    "train.max_generated_tokens",
    "data.max_prompt_tokens",
    "train.max_grad_norm",
    "shape.group_size",
    "shape.num_probes",
    "shape.interval",
    "shape.max_steps",
    "advantage.max_correct",
    "loss.log_ratio_clamp",
    "loss.beta",
    "critic.learning_rate",
    "critic.value_clip",
)
NOT_NEGATIVE = (
    "train.stream_depth",
    "train.max_skipped",
    "train.probe_tolerance",
    "train.replay_nodes",
    "train.weight_decay",
    "loss.clip_eps_low",
    "loss.clip_eps_high",
    "loss.kl_coef",
    "loss.dpo_positive",
    "eval.every",
)
PROBABILITIES = ("shape.prob_threshold", "loss.prob_threshold")
SHARES = (
    "advantage.gamma",
    "advantage.lam",
    "train.warmup_share",
)


def check(config: Config) -> None:
    """Raise ValueError where settings contradict each other."""
    sampling, shape, advantage = config.sampling, config.shape, config.advantage
    if sampling.top_p != 1 or sampling.top_k != 0:
        raise ValueError(
            "sampling.top_p must be 1 and sampling.top_k 0 for training, found "
            f"{sampling.top_p:g} and {sampling.top_k}: a truncated distribution biases the ratio"
        )
    if not 0 < sampling.temperature < math.inf:
        raise ValueError(
            "sampling.temperature must be above 0 and finite for training, found "
            f"{sampling.temperature:g}"
        )
    by_siblings = {"baseline": "loo", "scale": "std", "node_weight": "path"}
    for key, value in by_siblings.items():
        if shape.kind == "chain" and getattr(advantage, key) == value:
            raise ValueError(
                f"advantage.{key}={value} needs siblings of one kind: "
                "it works for trees and stars, not for shape.kind=chain"
            )
    _check_ranges(config)
    _check_method(config)


def _check_ranges(config: Config) -> None:
    """Raise ValueError where a number is outside of its range."""
    for names, holds, expected in (
        (POSITIVE, lambda x: 0 < x < math.inf, "a positive number"),
        (NOT_NEGATIVE, lambda x: 0 <= x < math.inf, "0 or more"),
        (PROBABILITIES, lambda x: 0 < x <= 1, "a probability in (0, 1]"),
        (SHARES, lambda x: 0 <= x <= 1, "a number in [0, 1]"),
        (("train.seed",), lambda x: 0 <= x < 1 << 31, "0 to 2147483647"),
    ):
        for name in names:
            value = operator.attrgetter(name)(config)
            if value is not None and not holds(value):
                raise ValueError(f"{name}: expected {expected}, found {value}")


def _check_method(config: Config) -> None:
    """Raise ValueError where shape, estimator and loss do not belong together."""
    sampling, advantage, loss, train = (
        config.sampling,
        config.advantage,
        config.loss,
        config.train,
    )
    estimator = advantage.estimator
    if loss.kind != LOSS_OF[estimator]:
        raise ValueError(
            f"advantage.estimator={estimator} needs loss.kind={LOSS_OF[estimator]}, "
            f"found {loss.kind}"
        )
    if estimator != "values" and (config.shape.kind != "star" or train.replay_nodes):
        raise ValueError(
            f"advantage.estimator={estimator} needs shape.kind=star and train.replay_nodes=0, "
            f"found {config.shape.kind} and {train.replay_nodes}"
        )
    if loss.kind != "policy" and (loss.prob_threshold is not None or loss.kl_coef):
        raise ValueError(
            f"loss.kind={loss.kind} reads every token and has no KL term: expected "
            "loss.prob_threshold=null and loss.kl_coef=0, found "
            f"{loss.prob_threshold} and {loss.kl_coef:g}"
        )
    if loss.kind != "policy" and loss.policy_norm != "tokens":
        raise ValueError(
            f"loss.policy_norm={loss.policy_norm} needs loss.kind=policy, found {loss.kind}"
        )
    if train.restart and train.parallel == "fsdp":
        raise ValueError("train.restart works with train.parallel=ddp, not with fsdp")
    starts = [0.0, *(share for share, _ in sampling.stages), 1.0]
    tokens = [0, *(tokens for _, tokens in sampling.stages), sampling.max_new_tokens + 1]
    if any(a >= b for row in (starts, tokens) for a, b in zip(row, row[1:], strict=False)):
        raise ValueError(
            "sampling.stages: expected shares between 0 and 1 and limits up to "
            f"max_new_tokens={sampling.max_new_tokens}, both rising, found {sampling.stages}"
        )
    inner = sum(config.shape.segment_tokens)
    if config.shape.kind == "tree" and sampling.stages and inner >= tokens[1]:
        raise ValueError(
            f"sampling.stages: a limit of {tokens[1]} leaves nothing behind the "
            f"{inner} tokens of shape.segment_tokens"
        )
