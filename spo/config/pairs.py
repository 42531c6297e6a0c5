"""Settings of several groups that do not go together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from spo.config.lora import check_lora

if TYPE_CHECKING:
    from spo.config.recipe import Recipe


def check_pairs(recipe: Recipe, figures: Sequence[str]) -> None:
    """Raise ValueError with one sentence for the first pair that cannot work.

    Args:
        figures: of the recipe's evaluations.
    """
    sampling, train, engine = recipe.sampling, recipe.train, recipe.engine
    if train.keep_best is not None and train.keep_best not in figures:
        raise ValueError(
            f"train.keep_best: expected a figure of the evaluations, {', '.join(figures)}, found "
            f"{train.keep_best!r}"
        )
    if train.replay_nodes and not recipe.credit.replayable:
        raise ValueError(
            f"train.replay_nodes: expected 0 with credit.type={recipe.credit_type}, whose credit "
            f"is true in its own iteration only, found {train.replay_nodes}"
        )
    train.check(recipe.policy)
    asked = {"reference_every": train.reference_every, "offload": train.offload.count("reference")}
    for key, found in asked.items():
        if found and not (recipe.loss.kl_coef or recipe.credit.reference):
            raise ValueError(
                f"train.{key}: expected nothing of a reference, as loss.kl_coef is 0 and "
                f"credit.type={recipe.credit_type} has none, found {getattr(train, key)!r}"
            )
    if train.replay_nodes and recipe.loss.kl_coef and recipe.loss.kl_scope == "all":
        raise ValueError(
            "train.replay_nodes: expected 0 with loss.kl_scope=all, as only nodes with an "
            f"advantage are drawn from the buffer, found {train.replay_nodes}"
        )
    if recipe.shape.rescores and train.stream_depth:
        raise ValueError(
            "shape.rescore=true: expected train.stream_depth=0, as the trainer's weights are newer "
            f"than those that sampled a stream's first tokens, found {train.stream_depth}"
        )
    if engine.max_model_len is not None and engine.max_model_len <= sampling.max_new_tokens:
        raise ValueError(
            f"engine.max_model_len: expected more than sampling.max_new_tokens="
            f"{sampling.max_new_tokens}, to hold the prompt too, found {engine.max_model_len}"
        )
    check_lora(recipe.policy.lora, train)
