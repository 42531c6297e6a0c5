"""Decoding many branches of one prefix on the embedded engine: prefix read once against once each.

Both engines run the same samples from the same seeds; before a clock starts, their logprobs must
agree. A decode step reads the weights, the branches' own keys and values, and the prefix:

    per branch    branches x prefix x 2 x kv_heads x head_dim x itemsize x layers bytes
    in place      the same without the factor `branches`

which is the column "prefix MB". Steps of the two ways alternate, so that a busy spell hits both.

    python -m benchmarks.shared_prefix [--prefix 128 512 1024 2048] [--branches 6 36 216] [--json F]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import measure
from benchmarks.policy import build_policy
from benchmarks.provenance import environment
from spo.engines.hf import HFEngine
from spo.records import Request, Sampling

WAYS = {"per branch": None, "in place": 64}  # Slots.min_shared
CHECKED, ROOM = 8, 256  # steps compared before timing; tokens that a branch may grow to


def compare(folder: str, prefix: int, branches: int, vocabulary: int, seconds: float) -> list[dict]:
    """Time decode steps both ways; one record per way."""
    rng = random.Random(prefix)
    ids = tuple(rng.randrange(2, vocabulary) for _ in range(prefix))
    engines = {}
    for way, min_shared in WAYS.items():
        engine = HFEngine(
            folder,
            max_num_seqs=branches,
            max_model_len=prefix + ROOM,
            num_cached=1,
            min_shared=min_shared,
        )
        engine.submit(Request(0, ids, branches, ROOM, Sampling(1)))
        for _ in range(CHECKED):
            engine.poll()
        engines[way] = engine
    logprobs = [[s.logprobs for s in engine.running] for engine in engines.values()]
    difference = float((torch.tensor(logprobs[0]) - torch.tensor(logprobs[1])).abs().max())
    if difference > 1e-3:
        raise RuntimeError(f"logprobs differ by {difference:.2g} between the two ways")
    timings = measure({w: e.poll for w, e in engines.items()}, seconds=seconds, warmup=0)
    config = engines["in place"].model.config
    token = sum(kv[:, 0, :, 0].nbytes for kv in engines["in place"].slots.kv)  # of all layers
    records = []
    for way, timing in timings.items():
        reads = branches if way == "per branch" else 1
        records.append(
            {
                "way": way,
                "prefix": prefix,
                "branches": branches,
                "layers": config.num_hidden_layers,
                "heads": config.num_attention_heads,
                "kv_heads": config.num_key_value_heads,
                "ms": timing.ms,
                "ms_p20": timing.p20,
                "ms_p80": timing.p80,
                "tokens_per_s": branches / timing.ms * 1e3,
                "prefix_mb": reads * prefix * token / 1e6,
                "speedup": timings["per branch"].ms / timing.ms,
                "logprob_difference": difference,
            }
        )
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prefix", type=int, nargs="+", default=[128, 512, 1024, 2048])
    parser.add_argument("--branches", type=int, nargs="+", default=[6, 36, 216])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, help="default: a quarter of the heads")
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="of each way, but at least 5 steps"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    records = []
    with tempfile.TemporaryDirectory() as folder:
        parameters = build_policy(
            folder,
            hidden=arguments.hidden,
            layers=arguments.layers,
            vocabulary=arguments.vocabulary,
            context=max(arguments.prefix) + ROOM,
            kv_heads=arguments.kv_heads,
        )
        for prefix in arguments.prefix:
            for branches in arguments.branches:
                records += compare(
                    folder, prefix, branches, arguments.vocabulary, arguments.seconds
                )
    table = Table(title=f"decode on the embedded engine, {parameters / 1e6:.0f}M parameters")
    for column in ("prefix", "branches", "way", "ms/step", "p20-p80", "tokens/s", "prefix MB", "×"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for r in records:
        table.add_row(
            str(r["prefix"]),
            str(r["branches"]),
            r["way"],
            f"{r['ms']:.1f}",
            f"{r['ms_p20']:.1f}-{r['ms_p80']:.1f}",
            f"{r['tokens_per_s']:.0f}",
            f"{r['prefix_mb']:.0f}",
            f"{r['speedup']:.2f}",
        )
    console = Console(highlight=False)
    console.width = max(console.width, 110)
    console.print(table)
    if arguments.json:
        where = environment("rollout code") | {"parameters": parameters}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps([r | where for r in records], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
