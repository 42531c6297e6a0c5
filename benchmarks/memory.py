"""The peak memory of training steps, measured in a fresh process each, beside its prediction.

A configuration is a policy with random weights, and settings of a recipe. Its process loads the
models as a run does and makes two optimiser steps of two batches, without an engine. The peak is
the process's high-water mark of resident memory less that of a process which imports the same and
loads nothing. The prediction is `spo.learn.footprint`'s for the same batch.

With `--device cuda` the policies have the sizes of Qwen2.5's 1.5B and 7B, and PyTorch's allocator
says the peak: of what was allocated, and of what it took from the card. The folder of temporary
files (TMPDIR) needs 15 GB for the larger one. Tokens per second are those of the last step.

    python -m benchmarks.memory [--only NAME ...] [--device cuda] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config

from benchmarks import ROOT
from benchmarks.common import write_json
from benchmarks.peak import _status as status
from benchmarks.policy import build_policy
from benchmarks.provenance import environment
from spo.config.recipe import Recipe, load_recipe
from spo.learn.footprint import footprint
from spo.learn.trace import Pack, trace
from spo_kernels.head import share_of

SIZES = {
    "26M": {"hidden": 512, "layers": 8, "vocabulary": 8000},
    "58M": {"hidden": 640, "layers": 10, "vocabulary": 20000},
}
QWEN = {  # Qwen2.5's
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
}
# tokens of a response, responses of a prompt, tokens of a batch
CARD = 79 << 30  # bytes of the card that the figures of docs/memory.md are of: an H100
SHAPES = {"cpu": (128, 8, 1100), "cuda": (1024, 8, 8320)}
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
EIGHT_BIT, LORA = "train.optimizer=adamw_8bit", "policy.lora={rank: 16}"
SHORT = [BF16, CHECKPOINTED]
CARDS: dict[str, tuple[str, list[str]]] = {
    "bf16": ("1.5B", [BF16]),
    "bf16, checkpointing": ("1.5B", SHORT),
    "bf16, checkpointing, reference": ("1.5B", [*SHORT, "loss.kl_coef=0.1"]),
    "bf16, checkpointing, 8-bit": ("1.5B", [*SHORT, EIGHT_BIT]),
    "bf16, checkpointing, offload": ("1.5B", [*SHORT, "train.offload=[optimizer]"]),
    "bf16, checkpointing, LoRA": ("1.5B", [*SHORT, LORA]),
    "bf16, checkpointing, nf4": ("1.5B", [*SHORT, "policy.lora={rank: 16, quantize: nf4}"]),
    "7B, checkpointing, LoRA": ("7B", [*SHORT, LORA]),
    "7B, checkpointing, nf4": ("7B", [*SHORT, "policy.lora={rank: 16, quantize: nf4}"]),
    "7B, checkpointing, 8-bit": ("7B", [*SHORT, EIGHT_BIT]),
}


def recipe_of(name: str, folder: str, out: str, device: str) -> Recipe:
    """Two prompts in one step, each a star of responses; a batch holds one of them."""
    length, responses, tokens = SHAPES[device]
    own = [
        f"policy={{path: {folder}, device: {device}}}",
        f"shape={{kind: star, group_size: {responses}}}",
        f"sampling.max_new_tokens={length}",
        f"train={{prompts: 2, minibatches: 1, tokens_per_batch: {tokens}}}",
        "loss.prob_threshold=null",
        f"out={out}",
    ]
    return load_recipe(None, own + (CASES | CARDS)[name][1])


def save_policy(folder: str, size: str, device: str) -> None:
    """A folder with a policy of random weights."""
    if size in SIZES:
        build_policy(folder, **SIZES[size], context=8192)
        return
    config = Qwen2Config(
        **QWEN[size], num_hidden_layers=28, eos_token_id=1, bos_token_id=None, pad_token_id=0
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


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
    count = partial(footprint, recipe, config, partial(trace, AutoModelForCausalLM, config))
    found = count(pack=of_run)
    if torch.device(recipe.policy.device).type == "cuda":
        # There the head makes as many logits at a time as fit a quarter of what is free then.
        room = share_of(CARD - int(found.peak))
        found = count(pack=dataclasses.replace(of_run, logits=room))
    return found.peak - found.held.get("engine", 0), of_run


def _step(recipe: Recipe):
    """The forest of a step and its credit."""
    from benchmarks.train_step import build_forest
    from spo.credit.nodes import of_tokens

    size = recipe.sampling.max_new_tokens
    length, responses, _ = SHAPES[torch.device(recipe.policy.device).type]
    count = max(1, responses * length // size)
    shape = f"grpo/{size}" if count == responses else f"1-{count}/{size // 2}"
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


def run_steps(recipe: Recipe) -> float:
    """Two optimiser steps of the recipe's models; the seconds of the second."""
    from spo.learn.checkpoint import State
    from spo.learn.distributed import Ranks
    from spo.learn.learner import Learner
    from spo.records import Credit, Targets

    forest, tokens = _step(recipe)
    learner = Learner(recipe, Ranks())
    targets = Targets(torch.zeros_like(tokens), tokens) if recipe.credit.critic else None
    start = 0.0
    for _ in range(2):
        start = time.perf_counter()
        learner.step(forest, Credit(tokens, targets=targets), [0, 1], State(), 1.0)
    return time.perf_counter() - start


def measure_on_gpu(recipe: Recipe) -> dict[str, float]:
    """Peaks in bytes above what stood before, and seconds of a step."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    seconds = run_steps(recipe)
    return {
        "measured": torch.cuda.max_memory_allocated() - before,
        "reserved": torch.cuda.max_memory_reserved(),
        "seconds": seconds,
    }


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
            run_steps(recipe_of(name, folder, out, "cpu"))
    else:
        torch.mm(torch.ones(64, 64), torch.ones(64, 64))
    print(status("VmHWM"))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=[*CASES, *CARDS])
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.folder)
        return 0
    device, cases = arguments.device, CARDS if arguments.device == "cuda" else CASES
    names = [name for name in arguments.only or cases if name in cases]
    rows, where = [], environment("training code", device)
    with tempfile.TemporaryDirectory() as folder:
        nothing = 0
        for size in dict.fromkeys(cases[name][0] for name in names):
            save_policy(f"{folder}/{size}", size, device)
            if device == "cpu":
                nothing = nothing or measure(None, f"{folder}/{size}")
            for name in [name for name in names if cases[name][0] == size]:
                recipe = recipe_of(name, f"{folder}/{size}", folder, device)
                rows.append(row_of(name, recipe, nothing) | where)
                if arguments.json:
                    write_json(arguments.json, rows)
            shutil.rmtree(f"{folder}/{size}")
    return 0


def row_of(name: str, recipe: Recipe, nothing: int) -> dict:
    """Measure a configuration, print it, and return its figures."""
    device = torch.device(recipe.policy.device).type
    size, settings = (CASES | CARDS)[name]
    expected, pack = predicted(recipe)
    if device == "cuda":
        found = measure_on_gpu(recipe)
    else:
        found = {"measured": float(measure(name, recipe.policy.source) - nothing)}
    row = {
        "configuration": name,
        "policy": size,
        "settings": settings,
        "tokens": pack.tokens,
        "predicted_mb": expected / 1e6,
        "measured_mb": found["measured"] / 1e6,
        "ratio": expected / found["measured"],
    }
    line = (
        f"{name:30s} predicted {expected / 1e6:7.0f} MB, measured {row['measured_mb']:7.0f} MB, "
        f"ratio {row['ratio']:.2f}"
    )
    if "seconds" in found:
        row["reserved_mb"] = found["reserved"] / 1e6
        row["tokens_per_second"] = 2 * pack.tokens / found["seconds"]
        line += f", reserved {row['reserved_mb']:7.0f} MB, {row['tokens_per_second']:.0f} tokens/s"
    print(line, flush=True)
    return row


if __name__ == "__main__":
    raise SystemExit(main())
