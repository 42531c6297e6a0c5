"""The paper's ablations on an embedded task: one panel each, same generated tokens, several seeds.

    python -m benchmarks.evidence.ablations [--seeds N] [--budget TOKENS] [--task T]

Can be interrupted at any time: finished runs are kept, and arms that two ablations share, or
`end_to_end.py` has run, run once.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from benchmarks.evidence import curves, runs
from benchmarks.evidence.runs import Arm


def chain(name: str, *overrides: str) -> Arm:
    return Arm(name, "spo-chain.yaml", overrides)


def tree(name: str, *overrides: str) -> Arm:
    return Arm(name, "spo-tree.yaml", overrides)


def widths(k: int, prompts: int) -> Arm:
    """k-k-k on as many prompts as keep the tokens of an iteration about equal."""
    return tree(f"{k}-{k}-{k}", f"shape.widths=[{k},{k},{k}]", f"train.prompts={prompts}")


ABLATIONS: dict[str, tuple[Arm, ...]] = {
    "interval": tuple(chain(f"interval {n}", f"shape.interval={n}") for n in (2, 5, 100)),
    "partition": (
        chain("cutpoint"),
        chain("fixed", "shape.partition=fixed", "shape.segment_tokens=8"),
        chain("steps", "shape.partition=steps"),
    ),
    "mask": (
        chain("SPO-chain"),
        chain("SPO-chain, no mask", "loss.prob_threshold=null"),
        Arm("GRPO + mask", "grpo.yaml", ("loss.prob_threshold=0.9",)),
        Arm("GRPO", "grpo.yaml"),
    ),
    "widths": (widths(4, 24), widths(6, 8), widths(8, 4)),
    "scale": (tree("none"), tree("std", "credit.scale=std")),
    "baseline": (tree("parent"), tree("leave one out", "credit.baseline=loo")),
    "whitening": (tree("off"), tree("batch", "credit.whiten=batch")),
    "node weight": (tree("token"), tree("path", "credit.node_weight=path")),
}


def main(argv: list[str] | None = None) -> None:
    parser = runs.options(__doc__.splitlines()[0], list(ABLATIONS))
    arguments = runs.shorten(parser.parse_args(argv))
    chosen = {k: v for k, v in ABLATIONS.items() if not arguments.only or k in arguments.only}
    console = Console(highlight=False, width=110)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.quick:  # its numbers mean nothing
            arguments.results = arguments.figures = arguments.work = Path(scratch)
        ledger = runs.Ledger(arguments.results / "runs.jsonl")
        jobs = [
            (arm, runs.config_of(arm, seed, arguments))
            for seed in range(arguments.seeds)
            for arms in chosen.values()
            for arm in arms
        ]
        runs.run_all(jobs, ledger, arguments, console)
        panels = {}
        for title, arms in chosen.items():
            panels[title] = {arm.name: runs.finished(arm, ledger, arguments) for arm in arms}
            console.print(runs.table(f"{title}, {arguments.task}", panels[title]))
        path = arguments.figures / f"ablations-{arguments.task}.svg"
        curves.draw(panels, ("generated_tokens",), path, title="Ablations")
        console.print(f"figure: {path}")


if __name__ == "__main__":
    main()
