"""Training runs as experiments: resumable, one JSON line each, compared at equal generated tokens.

A run is known by its resolved recipe. Finished ones are skipped, one that was interrupted goes on
from its checkpoint, and a recipe that has changed since is run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from benchmarks import ROOT
from benchmarks.figures.results import EVIDENCE
from benchmarks.provenance import environment
from spo.config.recipe import Recipe, load_recipe
from spo.engines.make import engine_of
from spo.learn.checkpoint import versions
from spo.loop import train
from spo.metrics import read_metrics

RECIPES, RESULTS = ROOT / "spo" / "recipes", EVIDENCE
FIGURES = ROOT / "docs" / "methods"
HELD_OUT = 1000  # the seed of learning-rate searches; never among those that are reported
UNLIMITED = 1_000_000  # iterations: the budget ends a run
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 97.5 %, 1 to 9 d.o.f.
# Both policies were qwen2 and are seed_oss: other files, the same weights and logits.
RENAMED = {"5c2175d8be0c8db3": "f65af81dc5047ccc", "1652c16e6b60037d": "c088b234368f8b77"}

Record = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """What a task changes in the recipes, which are written for `arithmetic`."""

    overrides: tuple[str, ...]
    of_recipe: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # file name -> overrides
    length: int = 1  # how much longer responses are: an iteration has as many times fewer prompts


POLICIES = ROOT / "benchmarks" / "policies"
TASKS = {
    "arithmetic": Task(("task=arithmetic", "engine.max_model_len=96")),
    "countdown": Task(("task=countdown", "engine.max_model_len=96")),
    # 10 operations, any line may merge: `python tools/warmup.py --plan long-arithmetic --seed 1`
    "long-arithmetic": Task(
        (
            "task=arithmetic",
            f"policy.path={POLICIES / 'long-arithmetic'}",
            "data.options={operations: 10}",
            "sampling.max_new_tokens=96",
            "engine.max_model_len=128",
            "eval.every=1",
        ),
        {
            "spo-tree.yaml": ("shape.segment_tokens=[20,20]",),
            "grpo-staged.yaml": ("sampling.stages=[[0.3,54],[0.6,60]]",),
        },
        length=2,
    ),
}


@dataclass(frozen=True)
class Arm:
    """One line of a comparison: a recipe and what differs from it."""

    name: str
    recipe: str  # file name in spo/recipes/
    overrides: tuple[str, ...] = ()
    learning_rates: tuple[float, ...] = ()  # what --tune tries


def options(description: str, names: Sequence[str]) -> argparse.ArgumentParser:
    """The command line that the experiments share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seeds", type=int, default=5, help="runs per arm")
    parser.add_argument("--budget", type=int, default=150_000, help="generated tokens of a run")
    parser.add_argument("--problems", type=int, default=250, help="test problems")
    parser.add_argument("--task", choices=TASKS, default="arithmetic")
    parser.add_argument("--engine", choices=("hf", "vllm"), default="hf")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="one short run each, thrown away")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--figures", type=Path, default=FIGURES)
    parser.add_argument("--work", type=Path, default=ROOT / "runs", help="where runs are kept")
    return parser


def shorten(arguments: argparse.Namespace) -> argparse.Namespace:
    """The arguments as --quick wants them."""
    if arguments.quick:
        arguments.seeds, arguments.budget, arguments.problems = 1, 4_000, 20
    return arguments


def config_of(arm: Arm, seed: int, arguments: argparse.Namespace, *more: str) -> Recipe:
    """The resolved recipe of one run."""
    task, recipe = TASKS[arguments.task], RECIPES / arm.recipe
    common = [
        f"train.prompts={load_recipe(recipe).train.prompts // task.length}",
        f"engine.name={arguments.engine}",
        "engine.max_num_seqs=256",
        f"train.iterations={UNLIMITED}",
        f"train.max_generated_tokens={arguments.budget}",
        "train.checkpoint_every=5",
        f"train.seed={seed}",
        f"eval.problems={arguments.problems}",
        "eval.every=3",
        *task.overrides,
        *task.of_recipe.get(arm.recipe, ()),
    ]
    quick = ["train.prompts=4", "eval.every=1"] if arguments.quick else []
    return load_recipe(recipe, [*common, *arm.overrides, *quick, *more])


def digest(config: Recipe) -> str:
    """What identifies a run: all that its recipe sets to other than the default, but for folders,
    and the content of its start policy.

    So a setting that the package gains later, off by default, does not void the finished runs.
    """
    content = config.policy.content()
    policy = dataclasses.replace(config.policy, path=RENAMED.get(content, content))
    config = dataclasses.replace(config, out=None, policy=policy)
    tree = _changes(config, Recipe()) | {"kinds": [config.shape_kind, config.credit_type]}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _changes(config: Any, default: Any) -> Any:
    if not dataclasses.is_dataclass(config):
        return config
    if type(default) is not type(config):
        default = type(config)()  # another kind of shape, rule or loss
    names = [f.name for f in dataclasses.fields(config)]
    pairs = {name: (getattr(config, name), getattr(default, name)) for name in names}
    return {name: _changes(*pair) for name, pair in pairs.items() if pair[0] != pair[1]}


class Ledger:
    """The finished runs of an experiment, one JSON line each."""

    def __init__(self, path: Path):
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.records = {record["run"]: record for record in map(json.loads, lines)}

    def add(self, record: Record) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records[record["run"]] = record


def finished(
    arm: Arm, ledger: Ledger, arguments: argparse.Namespace, *overrides: str
) -> list[Record]:
    """An arm's finished runs, in the order of the seeds."""
    configs = (config_of(arm, seed, arguments, *overrides) for seed in range(arguments.seeds))
    names = map(digest, configs)
    return [ledger.records[name] for name in names if name in ledger.records]


def run_all(
    jobs: Iterable[tuple[Arm, Recipe]],
    ledger: Ledger,
    arguments: argparse.Namespace,
    console: Console,
) -> list[Record]:
    """The records of the jobs, in order; runs what the ledger does not hold yet, on one engine."""
    logging.set_verbosity_error()  # transformers' bars and reports, once per model and run
    logging.disable_progress_bar()
    records, engine = [], None
    try:
        for arm, config in jobs:
            name = digest(config)
            if name not in ledger.records:
                engine = engine or engine_of(config)
                folder = arguments.work / name
                train(dataclasses.replace(config, out=str(folder)), resume=True, engine=engine)
                ledger.add(record_of(arm, arguments.task, config, folder))
                shutil.rmtree(folder)
            records.append(ledger.records[name])
            last = records[-1]["evals"][-1]
            console.print(
                f"{arm.name:>16} seed {config.train.seed}  lr {config.train.learning_rate:g}  "
                f"{last['generated_tokens'] / 1000:.0f}k tokens  {last['seconds']:.0f} s  "
                f"greedy {last['greedy']:.3f}  sampled {last['sampled']:.3f}"
            )
    finally:
        if engine is not None:
            engine.close()
    return records


def record_of(arm: Arm, task: str, config: Recipe, folder: Path) -> Record:
    """What is kept of a finished run."""
    lines = read_metrics(folder / "metrics.jsonl")
    trained = [line for line in lines if line["stage"] == "train"]
    return {
        "run": digest(config),
        "arm": arm.name,
        "recipe": config.name,
        "overrides": list(arm.overrides),
        "task": task,
        "seed": config.train.seed,
        "budget": config.train.max_generated_tokens,
        "learning_rate": config.train.learning_rate,
        "engine": config.engine.name,
        "evals": [line for line in lines if line["stage"] == "eval"],
        "iterations": len(trained),
        "kept_share": float(np.mean([line["kept_share"] for line in trained])),
        "skipped_steps": trained[-1]["skipped_steps"],
        "versions": versions(),
    } | environment("trainer")


def curve(record: Record, x: str, y: str) -> tuple[list[float], list[float]]:
    """One run's evaluations: `x` is generated_tokens or seconds, `y` greedy or sampled."""
    return [line[x] for line in record["evals"]], [line[y] for line in record["evals"]]


def band(
    records: Sequence[Record], x: str, y: str, points: int = 60
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Grid, mean over seeds, and half the 95 % Student interval (0 for one seed).

    Runs are interpolated between evaluations, up to where the shortest ends.
    """
    curves = [curve(record, x, y) for record in records]
    grid = np.linspace(0, min(xs[-1] for xs, _ in curves), points)
    values = np.stack([np.interp(grid, xs, ys) for xs, ys in curves])
    return grid, values.mean(0), half_width(values)


def half_width(values: np.ndarray) -> np.ndarray:
    """Half the 95 % interval of the mean over the first axis."""
    n = len(values)
    if n == 1:
        return np.zeros(values.shape[1:])
    quantile = STUDENT[n - 2] if n - 2 < len(STUDENT) else 1.96
    return quantile * values.std(0, ddof=1) / n**0.5


def area(record: Record, y: str = "sampled") -> float:
    """Mean accuracy over the generated tokens: one number for fast and for far."""
    xs, ys = curve(record, "generated_tokens", y)
    return float(np.diff(xs) @ (np.array(ys[1:]) + ys[:-1]) / 2 / xs[-1])


def table(title: str, arms: dict[str, list[Record]]) -> Table:
    """Accuracy at the end of the budget, mean over seeds and 95 % interval."""
    out = Table(title=title, caption="± is half the 95 % interval over seeds")
    for column in ("method", "seeds", "greedy", "sampled", "sampled, mean over the run", "seconds"):
        out.add_column(column, justify="left" if column == "method" else "right")
    for name, records in arms.items():
        cells = []
        for values in (
            [r["evals"][-1]["greedy"] for r in records],
            [r["evals"][-1]["sampled"] for r in records],
            [area(r) for r in records],
        ):
            error = f" ± {float(half_width(np.array(values))):.3f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.3f}{error}")
        seconds = np.mean([r["evals"][-1]["seconds"] for r in records])
        out.add_row(name, str(len(records)), *cells, f"{seconds:.0f}")
    return out
