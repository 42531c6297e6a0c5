"""Do trainer and engine hold the same policy? Asked at load, and after each update."""

from __future__ import annotations

import torch

from spo.grow.sampler import PROBE_TOKENS, Sampler
from spo.learn.learner import Learner
from spo.learn.model import sequence_logprobs
from spo.models.check import SHORT, agree, in_dtype, probe_ids, traits
from spo.records import Prompt


def sync(learner: Learner, sampler: Sampler, prompt: Prompt, version: int) -> float:
    """Load the trained weights into the engine, then `compare_logprobs`."""
    sampler.engine.load_weights(learner.weights(sampler.engine), version)
    return compare_logprobs(learner, sampler, prompt)


def compare_logprobs(learner: Learner, sampler: Sampler, prompt: Prompt) -> float:
    """The largest difference of trainer and engine in a logprob of one sample.

    Raises RuntimeError if it exceeds `train.probe_tolerance`: then the engine's weights are not
    those of the trainer.
    """
    recipe = sampler.recipe
    prefix = list(prompt.prompt_ids)[: max(1, sampler.engine.max_model_len - PROBE_TOKENS)]
    sample = sampler.sample_one(prefix)
    trainer = sequence_logprobs(
        learner.model, prefix, list(sample.token_ids), recipe.sampling.temperature
    )
    worst = max(abs(a - b) for a, b in zip(trainer, sample.logprobs, strict=True))
    if not worst <= recipe.train.probe_tolerance:
        raise RuntimeError(
            f"weight version {sampler.engine.version}: trainer and engine differ by {worst:.3g} in "
            f"a logprob, expected at most train.probe_tolerance={recipe.train.probe_tolerance:g}"
        )
    return worst


def check_engine(learner: Learner, sampler: Sampler) -> None:
    """Compare trainer and engine on a short sequence and on one past the windows of attention.

    Raises ValueError with one sentence that says what the model does if the engine leaves it out:
    then the logprobs differ by more than the rounding of the coarser type, which the trainer's
    model shows in both types.
    """
    recipe, model = sampler.recipe, learner.model
    short = "bfloat16" in (recipe.engine.dtype, recipe.policy.dtype)
    coarse = torch.bfloat16 if short else torch.float32
    ids = probe_ids(model, vars(model)["spo_head"].vocab_size)
    prefixes = [ids[:SHORT], ids[: sampler.engine.max_model_len - 1]]
    samples = [sampler.sample_one(prefix) for prefix in prefixes]
    found = torch.cat([torch.tensor(sample.logprobs) for sample in samples])
    each = {}
    for dtype in (torch.float32, coarse):
        with in_dtype(model, dtype) as done:
            if done:
                each[dtype] = torch.tensor(
                    [
                        logprob
                        for prefix, sample in zip(prefixes, samples, strict=True)
                        for logprob in sequence_logprobs(
                            model, prefix, list(sample.token_ids), recipe.sampling.temperature
                        )
                    ]
                )
    own, *rounded = each.values()
    if not agree(found, own, coarse, *rounded):
        gap = (found - own).abs()
        behind = prefixes[int(gap.argmax()) >= len(samples[0].token_ids)]
        raise ValueError(
            f"engine.name={recipe.engine.name} samples {recipe.policy.path} with logprobs that are "
            f"{float(gap.max()):.2g} nats from its own, after {len(behind)} tokens; {traits(model)}"
        )
