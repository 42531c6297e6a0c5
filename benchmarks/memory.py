"""The peak memory of training steps, measured in a fresh process each, beside its prediction.

A configuration is a policy with random weights, and settings of a recipe. Its process loads the
models as a run does and makes two optimiser steps of two batches, without an engine. The peak is
the process's high-water mark of resident memory less that of a process which imports the same and
loads nothing. The prediction is `spo.learn.footprint`'s for the same batch.

    python -m benchmarks.memory [--only NAME ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import ROOT
from benchmarks.common import write_json
from benchmarks.peak import _status as status
from benchmarks.policy import build_policy
from benchmarks.provenance import environment
from spo.config.recipe import Recipe, load_recipe
from spo.learn.footprint import footprint
from spo.learn.trace import Pack, trace

SIZES = {
    "26M": {"hidden": 512, "layers": 8, "vocabulary": 8000},
    "58M": {"hidden": 640, "layers": 10, "vocabulary": 20000},
}
LENGTH, RESPONSES = 128, 8  # tokens of a response, and responses of a prompt
CHECKPOINTED = "policy.gradient_checkpointing=true"
BF16 = "policy.dtype=bfloat16"
CASES: dict[str, tuple[str, list[str]]] = {
    "fp32": ("26M", []),
    "fp32, checkpointing": ("26M", [CHECKPOINTED]),
    "fp32, reference": ("26M", ["loss.kl_coef=0.1"]),
    "fp32, critic": ("26M", ["credit.type=gae"]),
    "fp32, long path": ("26M", ["train.tokens_per_batch=256", "sampling.max_new_tokens=1024"]),
    "larger, fp32": ("58M", []),
    "larger, bf16 with masters": ("58M", [BF16]),
    "larger, bf16, checkpointing": ("58M", [BF16, CHECKPOINTED]),
    "larger, 8-bit, checkpointing": ("58M", ["train.optimizer=adamw_8bit", CHECKPOINTED]),
    "larger, LoRA": ("58M", ["policy.lora={rank: 16}"]),
    "larger, LoRA, checkpointing": ("58M", ["policy.lora={rank: 16}", CHECKPOINTED]),
}


def recipe_of(name: str, folder: str, out: str) -> Recipe:
    """Two prompts in one step, each a star of 8 responses; a batch holds one of them."""
    own = [
        f"policy.path={folder}",
        f"shape={{kind: star, group_size: {RESPONSES}}}",
        f"sampling.max_new_tokens={LENGTH}",
        "train={prompts: 2, minibatches: 1, tokens_per_batch: 1100}",
        "loss.prob_threshold=null",
        f"out={out}",
    ]
    return load_recipe(None, own + CASES[name][1])


def predicted(recipe: Recipe) -> tuple[float, Pack]:
    """Bytes of the models and the steps, without the engine, and the batch."""
    from spo.learn.pack import pack

    forest, credit = _step(recipe)
    batches, _ = pack(
        forest, credit, prob_threshold=None, tokens_per_batch=recipe.train.tokens_per_batch
    )
    largest = max(batches, key=lambda batch: batch.token_ids.numel())
    longest = int(largest.position_ids.max()) + 1
    of_run = Pack(largest.token_ids.numel(), longest, largest.targets.numel())
    config = AutoConfig.from_pretrained(recipe.policy.source)
    found = footprint(recipe, config, partial(trace, AutoModelForCausalLM, config), pack=of_run)
    return found.peak - found.held["engine"], of_run


def _step(recipe: Recipe):
    """The forest of a step and its credit."""
    from benchmarks.train_step import build_forest
    from spo.credit.nodes import of_tokens

    size = recipe.sampling.max_new_tokens
    count = max(1, RESPONSES * LENGTH // size)
    shape = f"grpo/{size}" if count == RESPONSES else f"1-{count}/{size // 2}"
    trees = [build_forest(shape, 64, 8000, 1.0) for _ in range(2)]
    forest = _joined([tree for tree, _ in trees])
    return forest, of_tokens(forest, torch.cat([credit for _, credit in trees]))


def _joined(trees):
    """Trees as one forest."""
    first, second = trees
    fields = {}
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if field.name == "cu_tokens":
            b = b[1:] + a[-1]
        elif field.name == "parent":
            b = torch.where(b < 0, b, b + first.num_nodes)
        elif field.name == "prompt":
            b = b + 1
        if isinstance(a, torch.Tensor):
            fields[field.name] = torch.cat([a, b])
        elif field.name == "prompts":
            fields[field.name] = a + b
    return dataclasses.replace(first, **fields)


def run_steps(recipe: Recipe) -> None:
    """Two optimiser steps of the recipe's models."""
    from spo.learn.checkpoint import State
    from spo.learn.distributed import Ranks
    from spo.learn.learner import Learner
    from spo.records import Credit, Targets

    forest, tokens = _step(recipe)
    learner = Learner(recipe, Ranks())
    targets = Targets(torch.zeros_like(tokens), tokens) if recipe.credit.critic else None
    for _ in range(2):
        learner.step(forest, Credit(tokens, targets=targets), [0, 1], State(), 1.0)


def measure(name: str | None, folder: str) -> int:
    """Peak resident bytes of a fresh process; None: of one that imports the same.

    It gives what it frees back to the system at once from 1 MiB on, as any process does from 32 MiB
    on: the tensors of a policy of a usual size are larger than that.
    """
    given = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    words = [sys.executable, "-m", "benchmarks.memory", "--folder", folder]
    words += ["--child", name or "nothing"]
    done = subprocess.run(words, cwd=ROOT, env=given, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def child(name: str, folder: str) -> None:
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    import spo_kernels  # noqa: F401

    if name != "nothing":
        with tempfile.TemporaryDirectory() as out:
            run_steps(recipe_of(name, folder, out))
    else:
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    print(status("VmHWM"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.folder)
        return 0
    rows, where = [], environment("training code")
    with tempfile.TemporaryDirectory() as folder:
        folders = {}
        for size, numbers in SIZES.items():
            folders[size] = f"{folder}/{size}"
            build_policy(folders[size], **numbers, context=8192)
        nothing = measure(None, folders["26M"])
        for name in arguments.only:
            size, settings = CASES[name]
            expected, pack = predicted(recipe_of(name, folders[size], folder))
            found = measure(name, folders[size]) - nothing
            rows.append(
                {
                    "configuration": name,
                    "policy": size,
                    "settings": settings,
                    "tokens": pack.tokens,
                    "predicted_mb": expected / 1e6,
                    "measured_mb": found / 1e6,
                    "ratio": expected / found,
                }
            )
            print(
                f"{name:30s} predicted {expected / 1e6:7.0f} MB, measured {found / 1e6:7.0f} MB, "
                f"ratio {expected / found:.2f}",
                flush=True,
            )
            if arguments.json:
                write_json(arguments.json, [row | where for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
