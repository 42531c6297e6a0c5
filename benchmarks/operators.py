"""Where the time of an iteration goes, operator by operator: training, and the embedded engine.

One iteration of GRPO on the embedded policy, its rollout by the engine `hf`. It is timed as it is,
and then with a clock around every operator that PyTorch calls and every kernel of this package.
What the operators do not take lies between them: Python, autograd and the dispatcher.

    python -m benchmarks.operators [--dtypes float32] [--rounds 5] [--json FILE]

    products    matrix products and attention
    kernels     spo_kernels' own, without the products of its head
    memory      all others: they move data
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch.utils._python_dispatch import TorchDispatchMode

import spo
from benchmarks.common import write_json
from benchmarks.provenance import environment
from spo.config.recipe import Recipe, load_recipe
from spo.engines.make import engine_of
from spo.learn.checkpoint import State
from spo.learn.distributed import Ranks
from spo.learn.learner import Learner
from spo_kernels import dispatch

RUN_NATIVE = dispatch.run_native
TYPES = ("float32", "bfloat16")
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear")


class Operators(TorchDispatchMode):
    """Calls and seconds of what runs within it, by operator."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        begin = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and not func.is_view:
            self.add(func.overloadpacket.__name__, begin)
        return out

    def add(self, name: str, begin: float) -> None:
        entry = self.found[name]
        entry[0] += 1
        entry[1] += time.perf_counter() - begin

    def run_native(self, *arguments: Any) -> Any:
        """`spo_kernels.dispatch.run_native`, timed."""
        begin = time.perf_counter()
        out = RUN_NATIVE(*arguments)
        self.add("spo_kernels", begin)
        return out

    @property
    def seconds(self) -> float:
        return sum(spent for _, spent in self.found.values())


def kind_of(name: str) -> str:
    if name == "spo_kernels":
        return "kernels"
    return "products" if name in PRODUCTS or "attention" in name else "memory"


def run(recipe: Recipe, rounds: int) -> Iterator[dict]:
    """Figures of the engine's share of an iteration, then of training on what it sampled."""
    engine = engine_of(recipe)
    seconds, forest, tokens = [], None, 0
    for _ in range(rounds + 1):
        before = engine.counters()
        forest, _ = spo.rollout(recipe, engine=engine)
        after = engine.counters()
        seconds.append(after["step_seconds"] - before["step_seconds"])
        tokens = int(after["forwarded"] - before["forwarded"])
    operators = counted(lambda: spo.rollout(recipe, engine=engine), 3)
    yield report("embedded engine", tokens, seconds[1:], operators)
    learner, seconds = Learner(recipe, Ranks()), []
    assert forest is not None
    credit = recipe.credit.assign(forest, learner)
    figures: dict[str, float] = {}
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        figures = learner.train(forest, credit, State(), 0)
        seconds.append(time.perf_counter() - begin)
    operators = counted(lambda: learner.train(forest, credit, State(), 0), 3)
    yield report("training", int(figures["packed_tokens"]), seconds[1:], operators)


def counted(call: Callable[[], Any], rounds: int) -> Operators:
    """The operators of a call; of several rounds the one whose sum is the median."""
    found = []
    for _ in range(rounds):
        operators = Operators()
        dispatch.run_native = operators.run_native
        try:
            with operators:
                call()
        finally:
            dispatch.run_native = RUN_NATIVE
        found.append(operators)
    return sorted(found, key=lambda x: x.seconds)[len(found) // 2]


def report(title: str, tokens: int, seconds: list[float], operators: Operators) -> dict:
    """Print a phase's operators; its figures."""
    names = dict(sorted(operators.found.items(), key=lambda item: -item[1][1]))
    kinds = dict.fromkeys(("products", "kernels", "memory"), 0.0)
    for name, (_, spent) in names.items():
        kinds[kind_of(name)] += spent
    floor, whole = sum(kinds.values()), statistics.median(seconds)
    table = Table(
        title=f"{title}: {tokens:,} tokens, {whole:.3f} s, {whole / floor:.2f} x operators"
    )
    for column in ("operator", "kind", "calls", "ms", "of the phase"):
        table.add_column(column, justify="left" if column in ("operator", "kind") else "right")
    for name, (count, spent) in list(names.items())[:16]:
        share = f"{spent / whole:.1%}"
        table.add_row(name, kind_of(name), str(count), f"{1e3 * spent:.1f}", share)
    table.add_section()
    for kind, spent in (*kinds.items(), ("between them", whole - floor)):
        table.add_row(kind, "", "", f"{1e3 * spent:.1f}", f"{spent / whole:.1%}")
    Console(width=110).print(table)
    return {
        "phase": title,
        "tokens": tokens,
        "seconds": whole,
        "seconds_all": seconds,
        "kinds": kinds,
        "ratio": whole / floor,
        "operators": names,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtypes", nargs="+", choices=TYPES, default=TYPES)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows, where = [], environment("training code")
    with tempfile.TemporaryDirectory() as out:
        for dtype in arguments.dtypes:
            settings = [f"policy.dtype={dtype}", f"engine.dtype={dtype}", "engine.name=hf"]
            recipe = load_recipe("grpo", [*settings, "train.probe_tolerance=0.5", f"out={out}"])
            for row in run(recipe, arguments.rounds):
                rows.append(row | {"dtype": dtype} | where)
                if arguments.json:
                    write_json(arguments.json, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
