"""SPO-tree rollouts in vLLM: what sharing prefixes and dropping barriers is worth.

Four ways to grow the same trees (same seeds, same lengths, no early stop) in one engine:

    naive     every request recomputes its whole prefix
    level     prefixes cached; a level starts when the one above has ended everywhere
    group     prefixes cached; a node branches when all its siblings have ended (the paper's code)
    ours      prefixes cached; a node branches in the step after it ends, deepest first

Every figure is a counter of the engine or a clock. The cache is reset before every run, the first
round is discarded, the order of the ways is drawn anew for every round, medians are printed. The
lower bound counts the tokens that a cache of full blocks cannot avoid: the first request of a
prompt computes it, every other request of length L computes ((L - 1) mod block) + 1.

    python benchmarks/rollout_tree.py [--widths 4 4 4] [--prompt 129] [--segment 32] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table

from spo.checkpoint import versions
from spo.engines import make_engine
from spo.records import Prompt
from spo.rollout import Rollout, RolloutOptions
from spo.shapes import TreeShape
from spo.tasks.grading import Grader

WAYS = {"naive": "none", "level": "level", "group": "group", "ours": "none"}


def build_policy(folder: str, hidden: int, layers: int, vocabulary: int, context: int) -> int:
    """A Qwen2 policy with random weights; returns its number of parameters."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(hidden // 256, 1),
        intermediate_size=hidden * 8 // 3 // 64 * 64,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def lower_bound(lengths: list[int], roots: int, block: int) -> int:
    """Prefill tokens that caching full blocks cannot avoid; `lengths` (R,) of all requests, the
    first `roots` of them the first of their prompts.
    """
    return sum(lengths[:roots]) + sum((n - 1) % block + 1 for n in lengths[roots:])


def request_lengths(prompt: int, trees: int, shape: TreeShape) -> list[int]:
    """Prefix lengths of every request of `trees` full trees, first requests of prompts first."""
    lengths, nodes, prefix = [], 1, prompt
    for width, segment in zip(shape.widths, (*shape.segment_tokens, 0), strict=True):
        nodes *= width
        lengths += [prefix] * (nodes * trees)
        prefix += segment
    return lengths


def run_once(way: str, engine, prompts: list[Prompt], shape: TreeShape, seed: int) -> dict:
    """Grow the trees one way; counters and clock of this run alone."""
    engine.reset_prefix_cache()
    engine.reuse_prefixes = way != "naive"
    options = RolloutOptions(stop_token_ids=(), seed=seed, barrier=WAYS[way])
    start = time.perf_counter()
    done = []
    with Grader() as grader:
        rollout = Rollout(prompts, engine, shape, grader, lambda ids: "", options)
        for _ in rollout:
            done.append(time.perf_counter() - start)
    wall = rollout.stats.seconds
    counted = rollout.stats.engine
    return {
        "way": way,
        "seconds": wall,
        "first_tree": done[0],
        "trees_per_s": len(done) / wall,
        "tokens_per_s": counted["generated"] / wall,
        "generated": counted["generated"],
        "prefill": counted["prefill"],
        "cached": counted["cached"],
        "hit_rate": counted["cached"] / (counted["cached"] + counted["prefill"]),
        "running": counted["running"] / counted["steps"],
        "steps": counted["steps"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 4, 4])
    parser.add_argument("--prompt", type=int, default=129, help="prompt tokens")
    parser.add_argument("--segment", type=int, default=32, help="tokens per segment")
    parser.add_argument("--trees", type=int, default=2)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(highlight=False)
    console.width = max(console.width, 110)
    depth = len(arguments.widths)
    total = arguments.segment * depth
    shape = TreeShape(tuple(arguments.widths), (arguments.segment,) * (depth - 1), total)
    context = arguments.prompt + total
    rng = random.Random(0)
    prompts = [
        Prompt(
            tuple(rng.randrange(2, arguments.vocabulary) for _ in range(arguments.prompt)), "", ""
        )
        for _ in range(arguments.trees)
    ]
    with tempfile.TemporaryDirectory() as folder:
        parameters = build_policy(
            folder, arguments.hidden, arguments.layers, arguments.vocabulary, context
        )
        try:
            engine = make_engine(
                "vllm", folder, max_num_seqs=arguments.max_num_seqs, max_model_len=context
            )
        except ValueError as error:
            print(f"rollout_tree: skipped: {error}", file=sys.stderr)
            return 1
        runs = []
        for repeat in range(-1, arguments.repeats):  # the first round warms up
            order = list(WAYS)
            random.Random(repeat).shuffle(order)
            for way in order:
                result = run_once(way, engine, prompts, shape, seed=repeat)
                if repeat >= 0:
                    runs.append({"repeat": repeat, **result})
            console.print(f"round {repeat + 1} of {arguments.repeats} done")
        block = engine.block_size
        engine.close()
    lengths = request_lengths(arguments.prompt, arguments.trees, shape)
    bound = lower_bound(lengths, arguments.trees, block)
    console.print(table(runs, bound, sum(lengths), parameters, arguments))
    console.print(noise(runs))
    if arguments.json:
        settings = vars(arguments) | {"json": None, "parameters": parameters, "block_size": block}
        result = {"settings": settings, "versions": versions(), "runs": runs}
        result |= {"prefill_lower_bound": bound, "prefill_naive": sum(lengths)}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1))
    return 0


def median(runs: list[dict], way: str, key: str) -> float:
    return statistics.median(r[key] for r in runs if r["way"] == way)


def table(runs: list[dict], bound: int, naive: int, parameters: int, arguments) -> Table:
    widths = "-".join(map(str, arguments.widths))
    title = (
        f"{arguments.trees} trees {widths}, prompt {arguments.prompt}, segments of "
        f"{arguments.segment}, {parameters / 1e6:.0f}M parameters; medians of {arguments.repeats}"
    )
    out = Table(title=title, caption=f"prefill: lower bound {bound:,}, without a cache {naive:,}")
    for column in (
        "way",
        "trees/s",
        "tokens/s",
        "prefill computed",
        "/ bound",
        "hit rate",
        "running per step",
        "first tree s",
        "× naive",
        "range",
    ):
        out.add_column(column, justify="left" if column == "way" else "right")
    base = median(runs, "naive", "seconds")
    for way in WAYS:
        seconds = [r["seconds"] for r in runs if r["way"] == way]
        out.add_row(
            way,
            f"{median(runs, way, 'trees_per_s'):.3f}",
            f"{median(runs, way, 'tokens_per_s'):.0f}",
            f"{median(runs, way, 'prefill'):,.0f}",
            f"{median(runs, way, 'prefill') / bound:.2f}",
            f"{median(runs, way, 'hit_rate'):.3f}",
            f"{median(runs, way, 'running'):.1f}",
            f"{median(runs, way, 'first_tree'):.2f}",
            f"{base / statistics.median(seconds):.2f}",
            f"{base / max(seconds):.2f}-{base / min(seconds):.2f}",
        )
    return out


def noise(runs: list[dict]) -> str:
    """Which differences to ours lie outside the ranges of the repeats."""
    ours = [r["seconds"] for r in runs if r["way"] == "ours"]
    parts = []
    for way in ("level", "group"):
        other = [r["seconds"] for r in runs if r["way"] == way]
        if min(other) > max(ours):
            parts.append(f"ours is faster than {way}")
        elif max(other) < min(ours):
            parts.append(f"ours is slower than {way}")
        else:
            parts.append(f"ours and {way}: no difference beyond the range of the repeats")
    return "; ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
