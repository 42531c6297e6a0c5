"""Every method on an embedded task: same start, same generated tokens, several seeds.

    python -m benchmarks.end_to_end [--seeds N] [--budget TOKENS] [--task T] [--only NAME ...]
    python -m benchmarks.end_to_end --tune --budget 100000    search each method's rate first, on a
                                              seed that the comparison does not use

Draws accuracy against generated tokens and against wall time. Can be interrupted at any time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.evidence import curves, runs
from benchmarks.evidence.runs import Arm

RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)  # AdamW on the embedded policy; around what the demo takes
METHODS = (
    Arm("SPO-tree", "spo-tree.yaml", learning_rates=RATES),
    Arm("SPO-chain", "spo-chain.yaml", learning_rates=RATES),
    Arm("VinePPO", "vineppo.yaml", learning_rates=RATES),
    Arm("GRPO", "grpo.yaml", learning_rates=RATES),
    Arm("GRPO + mask", "grpo-mask.yaml", learning_rates=RATES),
    Arm("RLOO", "rloo.yaml", learning_rates=RATES),
    Arm("PPO", "ppo.yaml", learning_rates=RATES),
    Arm("RestEM", "restem.yaml", ("eval.every=1",), (1e-4, 2e-4, 4e-4, 8e-4)),
    Arm("DPO", "dpo.yaml", learning_rates=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 4e-4, 8e-4)),
    Arm("DPO-Positive", "dpo-positive.yaml", learning_rates=(1e-5, 2e-5, 5e-5, 1e-4, 2e-4)),
    Arm("GRPO, staged", "grpo-staged.yaml", learning_rates=RATES),
)


def tune(arms, ledger, arguments, console) -> None:
    """Try every arm's rates on the held-out seed; `compare` takes the best of the task."""
    for arm in arms:
        jobs = [
            (arm, runs.config_of(arm, runs.HELD_OUT, arguments, f"train.learning_rate={rate}"))
            for rate in arm.learning_rates
        ]
        records = runs.run_all(jobs, ledger, arguments, console)
        out = Table(title=f"{arm.name}, seed {runs.HELD_OUT}")
        for column in ("learning rate", "mean over the run", "end"):
            out.add_column(column, justify="right")
        for record in records:
            mean, end = runs.area(record), record["evals"][-1]["sampled"]
            out.add_row(f"{record['learning_rate']:g}", f"{mean:.3f}", f"{end:.3f}")
        console.print(out)
        best = max(records, key=runs.area)["learning_rate"]
        edge = best in (min(arm.learning_rates), max(arm.learning_rates))
        console.print(f"{arm.name}: best {best:g}" + (", at the edge of the list" if edge else ""))


def best_rate(arm: Arm, searched: runs.Ledger, task: str) -> tuple[str, ...]:
    """The rate whose search run was best, as an override; none where none was searched."""
    found = [r for r in searched.records.values() if (r["arm"], r["task"]) == (arm.name, task)]
    if not found:
        return ()
    return (f"train.learning_rate={max(found, key=runs.area)['learning_rate']}",)


def compare(arms, ledger, searched, arguments, console) -> None:
    """Run what is missing, print the table, draw the curves."""
    jobs = [
        (arm, runs.config_of(arm, seed, arguments, *best_rate(arm, searched, arguments.task)))
        for seed in range(arguments.seeds)  # seeds outside: all methods have some runs early
        for arm in arms
    ]
    records = runs.run_all(jobs, ledger, arguments, console)
    found = {arm.name: records[i :: len(arms)] for i, arm in enumerate(arms)}
    title = f"{arguments.task}, {arguments.budget:,} generated tokens, {arguments.engine}"
    console.print(runs.table(title, found))
    path = arguments.figures / f"end-to-end-{arguments.task}.svg"
    panels = {f"{arguments.task}, {arguments.seeds} seeds": found}
    curves.draw(panels, ("generated_tokens", "seconds"), path, title="Methods")
    console.print(f"figure: {path}")


def main(argv: list[str] | None = None) -> None:
    parser = runs.options(__doc__.splitlines()[0], [arm.name for arm in METHODS])
    parser.add_argument("--tune", action="store_true", help="search the learning rates")
    arguments = runs.shorten(parser.parse_args(argv))
    arms = [arm for arm in METHODS if not arguments.only or arm.name in arguments.only]
    console = Console(highlight=False, width=110)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.quick:  # its numbers mean nothing
            arguments.results = arguments.figures = arguments.work = Path(scratch)
        searched = runs.Ledger(arguments.results / "learning_rates.jsonl")
        if arguments.tune:
            tune(arms, searched, arguments, console)
        else:
            ledger = runs.Ledger(arguments.results / "runs.jsonl")
            compare(arms, ledger, searched, arguments, console)


if __name__ == "__main__":
    main()
