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
    if room < 1:
        return  # no sequence is long enough to be continued
    ids = probe_ids(model)[:room]
    if model.device.type == "cpu":
        ids = ids[: max(SHORT, int(WORK / model.num_parameters()))]
    prefixes = [ids[:SHORT], ids]
    found, own, names = [], [], []
    for name in ("a sample behind", "a cached branch behind"):
        for key, prefix in enumerate(prefixes):
            submit(engine, Request(key, tuple(prefix), 2, DRAWN, Sampling(key)))
        done: list[Completion] = []
        while len(done) < 4:
            done += poll(engine)
        for sample in sorted(done, key=lambda c: -c.index):
            prefix = prefixes[sample.key]
            found.append(torch.tensor(sample.logprobs))
            own.append(own_logprobs(model, [*prefix, *sample.token_ids], DRAWN).cpu())
            names.append(f"{name} a prefix of {len(prefix)} tokens")
            if sample.index == 0:
                prefixes[sample.key] = [*prefix, *sample.token_ids]
    # All at once: in a short type a few tokens may differ by much, where another expert is chosen.
    if not agree(torch.cat(found), torch.cat(own), model.dtype):
        gaps = (torch.stack(found) - torch.stack(own)).abs().amax(1)
        raise ValueError(
            f"{names[int(gaps.argmax())]} has logprobs that are {float(gaps.max()):.2g} nats from "
            f"the model's own; {traits(model)}"
        )
