"""Settings of several groups that do not go together."""

from __future__ import annotations

from collections.abc import Sequence

from spo import named
from spo.config.credit import Rule
from spo.config.engine import EngineConfig
from spo.config.lora import LoraConfig
from spo.config.loss import LossConfig
from spo.config.policy import PolicyConfig
from spo.config.sampling import SamplingConfig
from spo.config.shape import ShapeConfig
from spo.config.train import TrainConfig


def check_pairs(
    policy: PolicyConfig,
    engine: EngineConfig,
    sampling: SamplingConfig,
    shape: ShapeConfig,
    credit: Rule,
    loss: LossConfig,
    train: TrainConfig,
    figures: Sequence[str],  # of the recipe's evaluations
) -> None:
    """Raise ValueError with one sentence for the first pair that cannot work."""
    rule = f"credit.type={named.name_of('credit.type', type(credit))}"
    if train.keep_best is not None and train.keep_best not in figures:
        raise ValueError(
            f"train.keep_best: expected a figure of the evaluations, {', '.join(figures)}, found "
            f"{train.keep_best!r}"
        )
    if train.replay_nodes and not credit.replayable:
        raise ValueError(
            f"train.replay_nodes: expected 0 with {rule}, whose credit "
            f"is true in its own iteration only, found {train.replay_nodes}"
        )
    train.check(policy)
    asked = {"reference_every": train.reference_every, "offload": train.offload.count("reference")}
    for key, found in asked.items():
        if found and not (loss.kl_coef or credit.reference):
            raise ValueError(
                f"train.{key}: expected nothing of a reference, as loss.kl_coef is 0 and "
                f"{rule} has none, found {getattr(train, key)!r}"
            )
    if train.replay_nodes and loss.kl_coef and loss.kl_scope == "all":
        raise ValueError(
            "train.replay_nodes: expected 0 with loss.kl_scope=all, as only nodes with an "
            f"advantage are drawn from the buffer, found {train.replay_nodes}"
        )
    if shape.rescores and train.stream_depth:
        raise ValueError(
            "shape.rescore=true: expected train.stream_depth=0, as the trainer's weights are newer "
            f"than those that sampled a stream's first tokens, found {train.stream_depth}"
        )
    if engine.max_model_len is not None and engine.max_model_len <= sampling.max_new_tokens:
        raise ValueError(
            f"engine.max_model_len: expected more than sampling.max_new_tokens="
            f"{sampling.max_new_tokens}, to hold the prompt too, found {engine.max_model_len}"
        )
    _check_lora(policy.lora, train)


def _check_lora(lora: LoraConfig | None, train: TrainConfig) -> None:
    """Raise ValueError for settings that do not go with adapters."""
    if lora is None:
        return
    if train.parallel == "fsdp":
        raise ValueError(
            "train.parallel: expected ddp with policy.lora, whose weights do not train and so need "
            "no shards of gradients or optimiser, found fsdp"
        )
    if "reference" in train.offload:
        raise ValueError(
            "train.offload: expected no reference with policy.lora, whose reference is the policy "
            "itself without its adapters"
        )
    if train.reference_every:
        raise ValueError(
            "train.reference_every: expected 0 with policy.lora, whose reference is the model "
            f"without its adapters, found {train.reference_every}"
        )
