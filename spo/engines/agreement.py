"""Does the embedded engine sample with the model's own logprobs? Asked once, when it is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spo.models.check import SHORT, agree, own_logprobs, probe_ids, traits
from spo.records import Completion, Request, Sampling

DRAWN = 2  # tokens of each sample
WORK = 4e12  # parameters * tokens of the long sequence on a CPU, for some seconds at most


@torch.inference_mode()
def check_logprobs(
    engine: Any,
    submit: Callable[[Any, Request], None],
    poll: Callable[[Any], list[Completion]],
) -> None:
    """Raise ValueError if the engine's logprobs differ from those of the model's own forward.

    Two siblings behind a short prefix run beside two behind a long one, past the windows of the
    model's attention where its context reaches so far. Two branches then continue the first sibling
    of each from what is cached.
    """
    model, room = engine.model, engine.max_model_len - 2 * DRAWN
    ids = probe_ids(model)[:room]
    if model.device.type == "cpu":
        ids = ids[: max(SHORT, int(WORK / model.num_parameters()))]
    prefixes = [ids[:SHORT], ids]
    names = ["short", f"long one of {len(ids)} tokens"]
    for again in (False, True):
        for key, prefix in enumerate(prefixes):
            submit(engine, Request(key, tuple(prefix), 2, DRAWN, Sampling(key)))
        done: list[Completion] = []
        while len(done) < 4:
            done += poll(engine)
        for sample in sorted(done, key=lambda c: (c.key, c.index)):
            prefix = prefixes[sample.key]
            own = own_logprobs(model, [*prefix, *sample.token_ids], DRAWN)
            found = torch.tensor(sample.logprobs)
            if not agree(found, own, model.dtype):
                worst = float((found - own.cpu()).abs().max())
                what = "a cached branch behind" if again else "a sample behind"
                raise ValueError(
                    f"{what} a {names[sample.key]} prefix has logprobs that are {worst:.2g} nats "
                    f"from the model's own; {traits(model)}"
                )
        prefixes = [[*p, *s.token_ids] for p, s in zip(prefixes, first_siblings(done), strict=True)]


def first_siblings(done: list[Completion]) -> list[Completion]:
    return sorted((c for c in done if c.index == 0), key=lambda c: c.key)
