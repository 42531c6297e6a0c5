"""Does the embedded engine sample with the model's own logprobs? Asked once, when it is made."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spo.records import Completion, Request, Sampling

FP32_TOLERANCE = 1e-4  # nats
ROUNDINGS = 64  # tolerance of shorter types, in steps of their rounding at 1
LONG = 4096  # tokens; a longer window is not tried to its end
WORK = 4e12  # parameters * tokens of the long sequence on a CPU, some seconds


@torch.inference_mode()
def check_logprobs(
    engine: Any,
    submit: Callable[[Any, Request], None],
    poll: Callable[[Any], list[Completion]],
) -> None:
    """Raise ValueError if the engine's logprobs differ from those of the model's own forward.

    Two short samples run beside two long ones, past the sliding window where there is one. Then two
    branches continue a short sample, and two a long one, from what is cached.
    """
    model, limit = engine.model, engine.max_model_len
    vocabulary = model.config.get_text_config().vocab_size
    sizes = [min(9, limit - 4), long_size(model, limit) - 4]
    prefixes = [[(vocabulary // 3 + 7 * i * i) % vocabulary for i in range(n)] for n in sizes]
    cases = ["a short sequence", "a long sequence"]
    for again in (False, True):
        for key, prefix in enumerate(prefixes):
            submit(engine, Request(key, tuple(prefix), 2, 2, Sampling(key)))
        done: list[Completion] = []
        while len(done) < 4:
            done += poll(engine)
        for key, prefix in enumerate(prefixes):
            samples = sorted((c for c in done if c.key == key), key=lambda c: c.index)
            what = f"a branch of {cases[key]}" if again else cases[key]
            _compare(engine, prefix, samples, f"{what} ({len(prefix) + 2} tokens)")
            prefix += samples[0].token_ids


def long_size(model: PreTrainedModel, limit: int) -> int:
    """Tokens of the long sequence of the check: past the sliding window where there is one."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", 0)
    size = min((window or 0) + 32, LONG)
    if model.device.type == "cpu":
        size = min(size, int(WORK / model.num_parameters()))
    return min(max(size, 64), limit)


def _compare(engine: Any, prefix: Sequence[int], samples: Sequence[Completion], what: str) -> None:
    own = own_logprobs(engine.model, prefix, [s.token_ids for s in samples])
    worst = float((own - torch.tensor([s.logprobs for s in samples])).abs().max())
    dtype = engine.model.dtype
    allowed = FP32_TOLERANCE if dtype == torch.float32 else ROUNDINGS * torch.finfo(dtype).eps
    if not worst <= allowed:
        raise ValueError(
            f"on {what} its logprobs differ by up to {worst:.2g} nats from those of the model's "
            "own forward: its layers keep more than keys and values, or read them in another way"
        )


def own_logprobs(
    model: PreTrainedModel,
    prefix: Sequence[int],
    samples: Sequence[Sequence[int]],  # of one length
) -> Tensor:  # (n, length) fp32
    """Logprobs of samples behind a prefix, by the model's own forward with its eager attention."""
    ids = torch.tensor([[*prefix, *s] for s in samples], device=model.device)
    size = len(samples[0])
    few: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        few = {"logits_to_keep": size + 1}
    implementation = model.config._attn_implementation or ""
    model.set_attn_implementation("eager")  # the only one with soft caps and sinks
    try:
        logits = model(input_ids=ids, use_cache=False, **few).logits[:, -size - 1 : -1]
    finally:
        model.set_attn_implementation(implementation)
    logprobs = torch.log_softmax(logits.float(), -1)
    return logprobs.gather(-1, ids[:, -size:, None])[..., 0].cpu()
