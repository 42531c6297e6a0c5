"""The four things whose speed `make bench-check` guards, each small enough to repeat often.

Run as a program it is one side of that comparison: a name a line comes in, the milliseconds of one
run go out. It measures the packages that Python finds first.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

POLICY = {"hidden": 192, "layers": 4, "vocabulary": 8192}


def loss(width: int) -> Callable[[], object]:
    """Forward and backward of the masked loss, from logits (width 0) or from hidden states."""
    from benchmarks.kernels import heads
    from benchmarks.kernels.policy_loss import ours

    problem = heads.make(heads.Case(512, 32000, width, 0.2, torch.float32), "cpu")
    return lambda: heads.step(ours, problem)


def packed_step() -> Callable[[], object]:
    """Packing, forward and backward of a tree of 4-4-4 with segments of 16 tokens."""
    from benchmarks.policy import build_policy
    from benchmarks.train_step import THRESHOLD, build_forest, fused_step
    from spo.config.policy import PolicyConfig
    from spo.credit.nodes import of_tokens
    from spo.learn.pack import pack
    from spo.learn.policy import load_policy

    with tempfile.TemporaryDirectory() as folder:
        build_policy(folder, **POLICY, context=512)
        model = load_policy(PolicyConfig(path=folder))
    forest, credit = build_forest("4-4-4/16", 64, POLICY["vocabulary"], 0.2)
    worth = of_tokens(forest, credit)

    def run() -> None:
        batches, _ = pack(forest, worth, prob_threshold=THRESHOLD, tokens_per_batch=4096)
        fused_step(model, batches)

    return run


def rollout_prefill() -> Callable[[], object]:
    """The embedded engine reads 16 prompts of 128 tokens and samples one token for each of four
    branches.
    """
    from benchmarks.policy import build_policy
    from spo.engines.make import make_engine
    from spo.records import Request, Sampling

    with tempfile.TemporaryDirectory() as folder:
        build_policy(folder, **POLICY, context=512)
        engine = make_engine("hf", folder, max_num_seqs=64, max_model_len=256)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, POLICY["vocabulary"], (16, 128), generator=generator).tolist()

    def run() -> None:
        for key, prompt in enumerate(prompts):
            engine.submit(Request(key, tuple(prompt), 4, 1, Sampling(key)))
        while engine.room < 64:
            engine.poll()
        engine.abort()  # forgets the prompts

    return run


WORKLOADS: dict[str, Callable[[], Callable[[], object]]] = {
    "loss from logits": lambda: loss(0),
    "head": lambda: loss(256),
    "packed step": packed_step,
    "rollout prefill": rollout_prefill,
}


def serve() -> None:
    """Build what is asked for on its first line; then a name in, milliseconds out, to the end."""
    names = json.loads(sys.stdin.readline())
    runs = {name: WORKLOADS[name]() for name in names}
    for run in runs.values():
        for _ in range(2):  # what the first call builds and allocates
            run()
    answers = os.fdopen(os.dup(1), "w")  # apart from what a library may print
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        runs[line.strip()]()
        print(1e3 * (time.perf_counter() - start), file=answers, flush=True)


if __name__ == "__main__":
    serve()
