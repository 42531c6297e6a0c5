"""The tables of docs/paper.md, from the committed runs of the experiments.

A run counts where its recipe is the one that the scripts would run today with their defaults.
"""

from __future__ import annotations

import json

import numpy as np

from benchmarks.end_to_end import METHODS, best_rate
from benchmarks.evidence import runs
from benchmarks.evidence.ablations import ABLATIONS
from benchmarks.evidence.runs import Record
from benchmarks.provenance import where

MAX_SEEDS = len(runs.STUDENT) + 1
MEASURES = {
    "greedy": lambda record: record["evals"][-1]["greedy"],
    "sampled": lambda record: record["evals"][-1]["sampled"],
    "mean over the run": runs.area,
}


def row(name: str, records: list[Record], base: list[Record], more: str = "") -> str:
    """Means over seeds with half the 95 % interval; the difference from `base` seed by seed."""
    cells = [spread([measure(r) for r in records]) for measure in MEASURES.values()]
    of_seed = {r["seed"]: runs.area(r) for r in base}
    pairs = [runs.area(r) - of_seed[r["seed"]] for r in records if r["seed"] in of_seed]
    cells.append(spread(pairs, sign="+") if pairs and records is not base else "")
    seconds = np.mean([r["evals"][-1]["seconds"] for r in records])
    return f"| {name} |{more} {len(records)} | {' | '.join(cells)} | {seconds:.0f} |"


def spread(values: list[float], sign: str = "") -> str:
    half = float(runs.half_width(np.array(values)))
    return f"{np.mean(values):{sign}.3f} ± {half:.3f}"


def table(head: list[str], rows: list[str]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])


def measured(records: list[Record]) -> str:
    return f"\n\nMeasured on {where(records, 'trainer')}."


def methods(task: str) -> str:
    """Every method at its best rate, all seeds that have run; differences from SPO-tree."""
    arguments = runs.options("", [""]).parse_args([f"--task={task}", f"--seeds={MAX_SEEDS}"])
    ledger = runs.Ledger(runs.RESULTS / "runs.jsonl")
    searched = runs.Ledger(runs.RESULTS / "learning_rates.jsonl")
    found = {}
    for arm in METHODS:
        records = runs.finished(arm, ledger, arguments, *best_rate(arm, searched, task))
        if records:
            found[arm.name] = records
    head = ["method", "rate", "seeds", *MEASURES, "against SPO-tree", "s"]
    rows = []
    for name, records in found.items():
        rate = f" {records[0]['learning_rate']:g} |"
        rows.append(row(name, records, found.get("SPO-tree", []), rate))
    return table(head, rows) + measured([r for records in found.values() for r in records])


def ablations() -> str:
    """Every arm against the first of its panel."""
    arguments = runs.options("", [""]).parse_args([])
    ledger = runs.Ledger(runs.RESULTS / "runs.jsonl")
    head = ["ablation", "seeds", *MEASURES, "against the first", "s"]
    rows, every = [], []
    for title, arms in ABLATIONS.items():
        base: list[Record] = []
        for arm in arms:
            records = runs.finished(arm, ledger, arguments)
            base, every = base or records, every + records
            if records:
                rows.append(row(f"{title}: {arm.name}", records, base))
    return table(head, rows) + measured(every)


def estimators() -> str:
    """Error of each method's advantages, from `estimators.py --json`."""
    records = json.loads((runs.RESULTS / "estimators.json").read_text())
    head = [
        "task, target",
        "method",
        "tokens per prompt",
        "mse",
        "variance",
        "bias²",
        "noise",
        "zero",
    ]
    rows = [
        f"| {r['task']}, {r['kind']} | {r['method']} | {r['generated']:.0f} "
        f"| {r['mse']:.4f} ± {r['mse_stderr']:.4f} | {r['variance']:.4f} | {r['bias2']:.4f} "
        f"| {r['noise']:.4f} | {r['zero']:.4f} |"
        for r in records
    ]
    return table(head, rows) + measured(records)
