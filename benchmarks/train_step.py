"""One optimiser step's forward and backward: rows as the paper's code, rows with our loss, packed.

    eager rows   one row per node with its own prefix, in random order, padded; the model's own
                 attention; logits of every position, log-softmax over the full vocabulary
    rows         one row per node, sorted by length; linear_masked_ppo_loss
    packed       every unique token once; linear_masked_ppo_loss

All three see the same nodes, advantages and masks, and micro-batches of the same number of tokens,
padding included. Their gradients are compared on a small tree before anything is timed. The floor
of the tokens is the number of unique tokens that some trained token depends on: its own node up to
it, and every ancestor. Every way is repeated until its steps have taken `--seconds`, at most three
times, in turn; the figure is the median; memory is the peak above what stood before the step.

    python -m benchmarks.train_step [--quick] [--shapes 6-6-6/64 grpo/256] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.utils import logging

from benchmarks.common import write_json
from benchmarks.peak import peak_memory
from benchmarks.policy import build_policy
from benchmarks.provenance import environment
from spo.config.loss import PolicyLossConfig
from spo.config.policy import PolicyConfig
from spo.credit.nodes import of_tokens
from spo.learn.loss import policy_loss
from spo.learn.model import to_device
from spo.learn.pack import PackStats, pack
from spo.learn.policy import load_policy
from spo.records import PROMPT, SEGMENT, STOP, Batch, Forest, Prompt

THRESHOLD = 0.9
SHAPES = ["4-4-4/16", "chain/8", "grpo/128", "6-6-6/64"]
QUICK = ["4-4-4/16", "chain/8", "grpo/64"]
CHECKED = "3-2/16"  # gradients are compared on this shape; it also warms up
WAYS = ("eager rows", "rows", "packed")


def build_forest(shape: str, prompt: int, vocabulary: int, kept: float) -> tuple[Forest, Tensor]:
    """One prompt's forest with full segments, and advantages; `kept` of the tokens pass the mask.

    `a-b-c/n` is a tree of these widths and segments of n tokens; `grpo/n` is 8 responses of n;
    `chain/n` is 8 responses of 8 segments of n with 9 untrained probes of n at every boundary.
    """
    kind, length = shape.split("/")
    parent, trained = [-1], [False]

    def add(under: int, train: bool = True) -> int:
        parent.append(under)
        trained.append(train)
        return len(parent) - 1

    if kind == "chain":
        for _ in range(8):
            node = 0
            for segment in range(8):
                node = add(node)
                for _ in range(9 if segment < 7 else 0):
                    add(node, train=False)
    else:
        level = [0]
        for width in (8,) if kind == "grpo" else map(int, kind.split("-")):
            level = [add(node) for node in level for _ in range(width)]
    g = torch.Generator().manual_seed(0)
    count = len(parent)
    sizes = torch.tensor([prompt, *[int(length)] * (count - 1)])
    total = int(sizes.sum())
    unsure = torch.rand(total, generator=g) < kept
    inner = torch.isin(torch.arange(count), torch.tensor(parent))
    finish = torch.where(inner, SEGMENT, STOP).to(torch.int8)
    finish[0] = PROMPT
    forest = Forest(
        token_ids=torch.randint(2, vocabulary, (total,), generator=g, dtype=torch.int32),
        rollout_logprobs=torch.where(unsure, -10.0, -0.01),
        cu_tokens=torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]),
        parent=torch.tensor(parent, dtype=torch.int32),
        rewards=torch.full((count,), torch.nan),
        in_value=torch.tensor(parent) >= 0,
        trained=torch.tensor(trained),
        finish=finish,
        weight=torch.ones(count, dtype=torch.int32),
        prompt=torch.zeros(count, dtype=torch.int32),
        born=torch.zeros(count, dtype=torch.int32),
        prompts=(Prompt((), None, "none"),),
    )
    return forest, torch.randn(count, generator=g) * forest.trained


def eager_rows(forest: Forest, budget: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Micro-batches of padded rows: ids (B, L), nodes (B,), and where each response starts (B,)."""
    nodes = torch.nonzero(forest.trained)[:, 0]
    nodes = nodes[torch.randperm(nodes.numel(), generator=torch.Generator().manual_seed(1))]
    batches, rows, chosen = [], [], []
    for node in nodes.tolist():
        path = torch.tensor(forest.path_ids(node))
        longest = max([path.numel(), *(row.numel() for row in rows)])
        if rows and longest * (len(rows) + 1) > budget:
            batches.append((rows, chosen))
            rows, chosen = [], []
        rows.append(path)
        chosen.append(node)
    batches.append((rows, chosen))
    own = forest.cu_tokens.diff()
    return [
        (
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            torch.tensor(chosen),
            torch.tensor([row.numel() for row in rows]) - own[chosen],
        )
        for rows, chosen in batches
    ]


def eager_step(model, forest: Forest, credit: Tensor, batches, norm: float) -> None:
    """The paper's loss in plain PyTorch: logits of all positions, every token, then the mask."""
    device = next(model.parameters()).device
    for ids, nodes, starts in batches:
        own = forest.cu_tokens.diff()[nodes]
        place = torch.arange(ids.shape[1])
        response = (place >= starts[:, None]) & (place < (starts + own)[:, None])
        old = torch.zeros(ids.shape)
        old[response] = torch.cat(
            [
                forest.rollout_logprobs[begin : begin + n]
                for begin, n in zip(forest.cu_tokens[nodes], own, strict=True)
            ]
        )
        old, advantages = old[:, 1:].to(device), credit[nodes][:, None].to(device)
        mask = response[:, 1:].to(device) & (old < math.log(THRESHOLD))
        ids = ids.to(device)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        logprobs = torch.log_softmax(logits, -1).gather(-1, ids[:, 1:, None])[..., 0]
        ratio = (logprobs - old).clamp(-10, 10).exp()
        term = torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
        (-(term * mask).sum() / norm).backward()


def fused_step(model, batches: list[Batch]) -> None:
    device = next(model.parameters()).device
    for batch in batches:
        batch = to_device(batch, device)
        policy_loss(model, batch, PolicyLossConfig(prob_threshold=THRESHOLD), 1.0).loss.backward()


@dataclass(frozen=True)
class Case:
    """A shape, ready to be run each way."""

    steps: dict[str, Callable[[], None]]  # forward and backward of the whole step
    tokens: dict[str, int]  # forwarded
    stats: PackStats  # of the packed way


def build_case(shape: str, models: dict, arguments: argparse.Namespace) -> Case:
    forest, credit = build_forest(shape, arguments.prompt, arguments.vocabulary, arguments.kept)
    options = {"prob_threshold": THRESHOLD, "tokens_per_batch": arguments.tokens_per_batch}
    packs = {
        way: pack(forest, of_tokens(forest, credit), **options, packing=packing)
        for way, packing in (("rows", "rows"), ("packed", "tree"))
    }
    stats = packs["packed"][1]
    padded = eager_rows(forest, arguments.tokens_per_batch)
    tokens = {
        "eager rows": sum(ids.numel() for ids, _, _ in padded),
        "rows": packs["rows"][1].packed_tokens,
        "packed": stats.packed_tokens,
    }
    norm = float(stats.kept_tokens)
    steps = {
        "eager rows": lambda: eager_step(models["eager rows"], forest, credit, padded, norm),
        "rows": lambda: fused_step(models["rows"], packs["rows"][0]),
        "packed": lambda: fused_step(models["packed"], packs["packed"][0]),
    }
    return Case(steps, tokens, stats)


def check_gradients(models: dict, case: Case, bound: float) -> dict[str, float]:
    """Relative distance of every way's gradient from that of the eager rows; RuntimeError if one
    is above `bound`.
    """
    found = {}
    for way, step in case.steps.items():
        step()
        found[way] = torch.cat([p.grad.float().flatten() for p in models[way].parameters()])
        models[way].zero_grad(set_to_none=True)
    exact = found[WAYS[0]]
    errors = {way: float((g - exact).norm() / exact.norm()) for way, g in found.items()}
    if max(errors.values()) > bound:
        raise RuntimeError(f"the ways' gradients differ: {errors}")
    return errors


def run_shape(shape: str, models: dict, arguments: argparse.Namespace) -> list[dict]:
    """A row per way."""
    case = build_case(shape, models, arguments)
    stats = case.stats
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, list[float | None]] = {way: [] for way in WAYS}

    def timed(way: str) -> None:
        begin = time.perf_counter()
        case.steps[way]()
        if arguments.device == "cuda":
            torch.cuda.synchronize()
        seconds[way].append(time.perf_counter() - begin)

    for _ in range(3):
        for way in WAYS:
            if sum(seconds[way]) < arguments.seconds:
                peak, _ = peak_memory(lambda way=way: timed(way), arguments.device)
                peaks[way].append(peak)
                models[way].zero_grad(set_to_none=True)
    floor = stats.packed_tokens - stats.repeated_tokens
    return [
        {
            "shape": shape,
            "way": way,
            "tokens": case.tokens[way],
            "token_floor": floor,
            "seconds": statistics.median(seconds[way]),
            "seconds_all": seconds[way],
            "peak_mb": None if None in peaks[way] else max(peaks[way]),
            "kept_tokens": stats.kept_tokens,
        }
        for way in WAYS
    ]


def print_table(rows: list[dict], title: str) -> None:
    table = Table(title=title)
    for column in (
        "shape",
        "way",
        "tokens",
        "/ floor",
        "seconds",
        "peak MB",
        "× eager rows",
        "× rows",
        "of token ratio",
    ):
        table.add_column(column, justify="left" if column in ("shape", "way") else "right")
    for shape in dict.fromkeys(row["shape"] for row in rows):
        eager, plain, packed = (row for row in rows if row["shape"] == shape)
        for row in (eager, plain, packed):
            gain = plain["seconds"] / row["seconds"]
            table.add_row(
                shape,
                row["way"],
                f"{row['tokens']:,}",
                f"{row['tokens'] / row['token_floor']:.2f}",
                f"{row['seconds']:.2f}",
                "-" if row["peak_mb"] is None else f"{row['peak_mb']:.0f}",
                f"{eager['seconds'] / row['seconds']:.2f}",
                f"{gain:.2f}",
                f"{gain / (plain['tokens'] / row['tokens']):.2f}" if row is packed else "",
            )
    Console(width=120).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small shapes, under a minute")
    parser.add_argument("--shapes", nargs="+", help=f"of {' '.join(SHAPES)}, or any lengths")
    parser.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    parser.add_argument("--kept", type=float, default=0.2, help="share of tokens that train")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--tokens-per-batch", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=50.0, help="for each way of each shape")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    shapes = arguments.shapes or (QUICK if arguments.quick else SHAPES)
    with tempfile.TemporaryDirectory() as folder:
        size = {key: getattr(arguments, key) for key in ("hidden", "layers", "vocabulary")}
        parameters = build_policy(
            folder, **size, context=8192, kv_heads=max(arguments.hidden // 192, 1)
        )
        packed_policy = PolicyConfig(path=folder, device=arguments.device, dtype=arguments.dtype)
        rows_policy = dataclasses.replace(packed_policy, packing="rows")
        models = {"rows": load_policy(rows_policy), "packed": load_policy(packed_policy)}
    models["eager rows"] = models["rows"]
    bound = 1e-4 if arguments.dtype == "float32" else 0.1
    errors = check_gradients(models, build_case(CHECKED, models, arguments), bound)
    rows = [row for shape in shapes for row in run_shape(shape, models, arguments)]
    title = (
        f"{parameters / 1e6:.0f}M parameters, V = {arguments.vocabulary}, prompt "
        f"{arguments.prompt}, {arguments.kept:.0%} kept, batches of {arguments.tokens_per_batch}"
    )
    print_table(rows, title)
    where = environment("training code", arguments.device)
    if arguments.json:
        settings = {k: v for k, v in vars(arguments).items() if k != "json"}
        settings |= {"parameters": parameters, "gradient_errors": errors}
        write_json(arguments.json, [row | {"settings": settings} | where for row in rows])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
