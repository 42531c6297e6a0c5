"""How well each method estimates an advantage: its error against the truth, at equal cost.

    python -m benchmarks.evidence.estimators [--only TASK …] [--quick] [--json FILE] [--svg FILE]

What is compared. A target is a stretch of one sampled response, from state s to state s'. Its true
advantage V(s') - V(s) comes from thousands of probes at both states. A method estimates it many
times over: each time it grows a new tree under the prompt, whose first response runs through the
target and is sampled anew behind s', and its credit rule says what the target's tokens get.
All methods generate about as many tokens for a prompt, probes included: the tree's widths are
given, the others grow as many responses as that pays for (at least 2). Targets are

    token     one token that the policy was unsure of (p < 0.9): what the policy gradient needs.
              Every method cuts as its recipe does; a segment's advantage stands for all its tokens.
    segment   a segment of the tree. The chain and VinePPO cut at the same places here, so that only
              the estimators differ, not where they cut.

GRPO is r - mean, not divided by the deviation; so are all others. Over the estimates of a target,
mse = variance + bias^2, each freed of the Monte-Carlo error of the truth and of the mean; over the
targets the figures are means. "zero" is the error of knowing nothing, the mean square of the truth.
A method that trains more tokens of what it generates averages its noise better: `noise` is the
variance * generated tokens / trained tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import common
from benchmarks.evidence import runs
from benchmarks.evidence.through import Estimates, Sampler, Target, estimate
from benchmarks.provenance import environment
from spo.config.recipe import Recipe
from spo.credit.values import Values
from spo.engines.make import engine_of
from spo.grow.chain import ChainShape, Partition, cutpoint_partition, step_partition, text_of
from spo.grow.rollout import path_seed
from spo.grow.shapes import Shape, TreeShape, star
from spo.grow.steps import line_ends
from spo.models.tokenizer import load_tokenizer
from spo.tasks import prompts_of

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

KINDS = ("token", "segment")
NUM_PROBES, THRESHOLD, INTERVAL = 4, 0.9, 5  # as in spo/recipes/spo-chain.yaml
PILOT = 16  # responses that say whether a problem is neither hopeless nor solved

Record = dict[str, Any]


@dataclass(frozen=True)
class Growing:
    """How to grow a group, and the methods that judge what has grown: name -> advantage rule."""

    shape: Callable[[int], Shape]
    rules: dict[str, Values]
    sized: bool = True  # whether the group size sets the cost; a tree has its widths


def starts(config: Recipe, size: int) -> list[int]:
    """Where the tree's segments begin in a response of `size` tokens."""
    return [0, *(int(n) for n in np.cumsum(config.shape.segment_tokens) if n < size)]


def growings(config: Recipe, kind: str, words) -> list[Growing]:
    """Every method, on the task of an SPO-tree recipe; `words` is the policy's tokenizer."""
    room = config.sampling.max_new_tokens

    def same(token_ids: np.ndarray, logprobs: np.ndarray) -> list[int]:
        return starts(config, len(token_ids))

    def chain(name: str, partition: Partition, probe_prompt: bool = False) -> Growing:
        cut = same if kind == "segment" else partition
        return Growing(
            lambda n: ChainShape(n, NUM_PROBES, cut, room, probe_prompt=probe_prompt),
            {name: Values()},
        )

    tree = TreeShape(config.shape.widths, config.shape.segment_tokens, room)
    mean, others = Values(), Values(baseline="loo")
    return [
        Growing(lambda n: star(n, room), {"GRPO": mean, "RLOO": others}),
        chain("VinePPO", step_partition(text_of(words), line_ends), probe_prompt=True),
        chain("SPO-chain", cutpoint_partition(THRESHOLD, INTERVAL)),
        Growing(lambda n: tree, {"SPO-tree": mean, "SPO-tree, loo": others}, sized=False),
    ]


def find_targets(
    sampler: Sampler, config: Recipe, number: int, seed: int
) -> dict[str, list[Target]]:
    """`number` targets of each kind, on a response to each of as many problems that the policy
    solves sometimes: at least 3 times of 16, at most 13.
    """
    found: dict[str, list[Target]] = {kind: [] for kind in KINDS}
    rng, limit = random.Random(seed), math.log(THRESHOLD)
    for index, prompt in enumerate(prompts_of(config, "test", sampler.tokenizer, seed)):
        pilot = sampler.samples(prompt, (), PILOT, path_seed(seed, 0, index, ()))
        solved = sum(sampler.reward(prompt, s.token_ids, s.finish) for s in pilot)
        response = rng.choice(pilot)
        unsure = [i for i, logprob in enumerate(response.logprobs) if logprob < limit]
        if not 3 <= solved <= PILOT - 3 or not unsure:
            continue
        place, size = rng.choice(unsure), len(response.token_ids)
        bounds = [*starts(config, size), size]
        level = len(found["segment"]) % (len(bounds) - 1)  # all levels alike
        found["token"].append(Target(prompt, response, place, place + 1))
        found["segment"].append(Target(prompt, response, bounds[level], bounds[level + 1]))
        if len(found["token"]) == number:
            break
    return found


def true_advantage(sampler: Sampler, target: Target, probes: int, seed: int) -> tuple[float, float]:
    """V(s') - V(s), and the variance of that figure."""
    (before, v0), (after, v1) = (
        sampler.value(target, end, probes, seed + probes * i)
        for i, end in enumerate((target.start, target.end))
    )
    return after - before, v0 + v1


def group_sizes(
    sampler: Sampler, methods: Sequence[Growing], targets: Sequence[Target], seed: int
) -> list[int]:
    """Responses per prompt at which every method generates about what the tree does."""

    def cost(growing: Growing, group: int) -> float:
        rules = list(growing.rules.values())[:1]
        (runs,) = estimate(sampler, growing.shape(group), rules, targets, 2, seed)
        return sum(run.generated for run in runs) / len(runs)

    budget = next(cost(growing, 0) for growing in methods if not growing.sized)
    sizes = []
    for growing in methods:
        if not growing.sized:
            sizes.append(0)
            continue
        few = cost(growing, 2)
        group = max(3, round(2 * budget / few))  # probes of the prompt and shared segments: not yet
        each = (cost(growing, group) - few) / (group - 2)
        sizes.append(max(2, round(2 + (budget - few) / each)))
    return sizes


def figures(
    runs: Sequence[Estimates],
    truths: Sequence[tuple[float, float]],  # of each target: advantage, variance
) -> Record:
    """A method's figures over its targets."""
    size = runs[0].advantages.size
    true, doubt = np.array(truths).T
    variance = np.array([run.advantages.var(ddof=1) for run in runs])
    error = np.array([run.advantages.mean() for run in runs]) - true
    bias2 = error**2 - variance / size - doubt
    mse = variance + bias2
    generated, trained = (np.mean([getattr(r, n) for r in runs]) for n in ("generated", "trained"))
    return {
        "generated": float(generated),
        "trained": float(trained),
        "mse": float(mse.mean()),
        "mse_stderr": float(mse.std(ddof=1) / len(runs) ** 0.5),
        "variance": float(variance.mean()),
        "bias2": float(bias2.mean()),
        "mean_error": float(error.mean()),
        "noise": float(variance.mean() * generated / trained),
        "zero": float((true**2 - doubt).mean()),
    }


def measure(
    sampler: Sampler, config: Recipe, kind: str, targets: list[Target], probes: int, repeats: int
) -> list[Record]:
    """What each method does on the targets of one kind."""
    words = sampler.tokenizer
    methods = growings(config, kind, words)
    truths = [
        true_advantage(sampler, t, probes, path_seed(1, i, 0, ())) for i, t in enumerate(targets)
    ]
    sizes = group_sizes(sampler, methods, targets[:4], seed=2)
    records = []
    for growing, group in zip(methods, sizes, strict=True):
        shape, rules = growing.shape(group), list(growing.rules.values())
        runs = estimate(sampler, shape, rules, targets, repeats, seed=3)
        for name, of_rule in zip(growing.rules, runs, strict=True):
            size = str(group or "-".join(map(str, config.shape.widths)))
            head = {"kind": kind, "method": name, "group": size}
            counts = {"targets": len(targets), "estimates": repeats, "probes": probes}
            records.append(head | counts | figures(of_rule, truths))
    return records


def print_table(records: Sequence[Record]) -> None:
    """The records of one task and kind."""
    first = records[0]
    table = Table(
        title=f"{first['task']}, {first['kind']}: {first['targets']} targets, {first['estimates']} "
        f"estimates of each; zero {first['zero']:.4f}"
    )
    table.add_column("method", no_wrap=True)
    for column in ("group", "generated", "trained", "mse", "±", "variance", "bias^2", "noise"):
        table.add_column(column, justify="right", no_wrap=True)
    for r in records:
        small = (r[key] for key in ("mse", "mse_stderr", "variance", "bias2", "noise"))
        counts = (f"{r['generated']:.0f}", f"{r['trained']:.0f}")
        table.add_row(r["method"], r["group"], *counts, *(f"{value:.4f}" for value in small))
    Console(width=110).print(table)


def draw(records: Sequence[Record], path: Path) -> None:
    """Mean squared error of every method, split into variance and squared bias."""
    from benchmarks.figures.plot import ACCENT, INK, STYLE

    tasks = list(dict.fromkeys(record["task"] for record in records))
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            len(KINDS), len(tasks), figsize=(4.2 * len(tasks), 5.6), squeeze=False
        )
        for (row, kind), (column, task) in itertools.product(enumerate(KINDS), enumerate(tasks)):
            ax = axes[row, column]
            found = [r for r in records if (r["task"], r["kind"]) == (task, kind)][::-1]
            names = [r["method"] for r in found]
            variance, bias2 = ([max(r[key], 0) for r in found] for key in ("variance", "bias2"))
            errors = {"xerr": [r["mse_stderr"] for r in found], "ecolor": INK, "capsize": 2}
            ax.barh(names, variance, color=ACCENT, label="variance")
            ax.barh(names, bias2, left=variance, color="#fdba74", label="squared bias", **errors)
            ax.axvline(found[0]["zero"], color=INK, linestyle="--", label="advantage 0")
            ax.set_title(f"{task}, {kind}", fontsize=9)
            ax.grid(axis="y", visible=False)
        for ax in axes[-1]:
            ax.set_xlabel("mean squared error of an advantage")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower left", ncols=3, frameon=False)
        figure.tight_layout(rect=(0, 0.05, 1, 1))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="TASK", choices=runs.TASKS, help="(all)")
    parser.add_argument("--quick", action="store_true", help="few targets: does it run at all?")
    parser.add_argument("--targets", type=int, help="of each kind and task (24)")
    parser.add_argument("--estimates", type=int, help="of each target by each method (20)")
    parser.add_argument("--probes", type=int, help="of each state, for the truth (2000)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--svg", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    targets = arguments.targets or (2 if arguments.quick else 24)
    repeats = arguments.estimates or (3 if arguments.quick else 20)
    probes = arguments.probes or (50 if arguments.quick else 2000)
    start, generated = time.monotonic(), 0
    where, records = environment("trainer"), []
    chosen = arguments.only or list(runs.TASKS)
    if arguments.json and arguments.json.exists():  # the other tasks' records stay
        found = json.loads(arguments.json.read_text())
        records = [record for record in found if record["task"] not in chosen]
    for task in chosen:
        settings = runs.options("", [""]).parse_args([f"--task={task}"])
        config = runs.config_of(runs.Arm("SPO-tree", "spo-tree.yaml"), 0, settings)
        with contextlib.closing(engine_of(config)) as engine:
            tokenizer = load_tokenizer(config.policy)
            sampler = Sampler(engine, tokenizer, config.sampling.max_new_tokens)
            found = find_targets(sampler, config, targets, seed=0)
            for kind in KINDS:
                rows = measure(sampler, config, kind, found[kind], probes, repeats)
                rows = [{"task": task} | row | where for row in rows]
                print_table(rows)
                records += rows
                if arguments.json:
                    common.write_json(arguments.json, records)
            generated += sampler.generated
    if arguments.svg:
        draw(records, arguments.svg)
    seconds = time.monotonic() - start
    print(f"{generated} tokens in {seconds:.0f} s; {where['device']}, {where['commit']}")


if __name__ == "__main__":
    main()
