"""SPO-tree rollouts in vLLM: what sharing prefixes, alignment, order and streaming are worth.

Ways to grow the same trees or chains (same seeds, node lengths drawn once from (seed, tree, path),
no early stop unless asked for) in one engine:

    naive       every request recomputes its whole prefix
    level       prefixes cached; a level starts when the one above has ended everywhere
    group       prefixes cached; a node branches when all its siblings have ended (the paper's code)
    frontier    prefixes cached; a node branches in the step after it ends, first come first served
    depth       the same, deepest node of the first tree first (what `spo` does)
    aligned     depth, with segments that end one token after the edge of a cache block
    stream      depth, the next iteration's prompts admitted while the last leaves of this one run;
                against "no stream", iterations one after the other; the cache is forgotten after
                each of them, as after an update of the weights

Every figure is a counter of the engine or a clock. The cache is reset before every run, the first
round is discarded, the order of the ways is drawn anew for every round; medians and ranges are
given, and a difference inside the range is called none. The bound on prefilled tokens is exact for
a cache of full blocks: P for the first request of a prompt and ((L - 1) mod block) + 1 for every
other request of length L.

    python benchmarks/rollout_tree.py                       every case, about an hour, with --json
    python benchmarks/rollout_tree.py --case 6-6-6 stream   some of them
    python benchmarks/rollout_tree.py --case sweep          one setting at a time
    python benchmarks/rollout_tree.py --quick
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from occupancy import DrawnLengths, Trace, cost_per_token, write_plot
from policy import build_policy
from rich.console import Console
from rollout_tables import STREAMS, median, table, verdicts

from spo.engines.make import make_engine
from spo.grow.chain import ChainShape, fixed_partition
from spo.grow.rollout import Rollout, RolloutOptions
from spo.grow.shapes import Shape, TreeShape
from spo.grow.stream import Stream
from spo.learn.checkpoint import versions
from spo.records import Prompt
from spo.tasks.grading import Grader

WAYS = ("naive", "level", "group", "frontier", "depth", "aligned")
LARGE = {"hidden": 512, "layers": 8, "vocabulary": 16384}  # 30M parameters: prefill matters
SMALL = {"hidden": 192, "layers": 4, "vocabulary": 512}  # as many as the embedded policy
FILL = {"spread": 0.5, "trees": 4, "ways": []}  # streams: samples end up to half their length early
CASES: dict[str, dict] = {  # what differs from the defaults of the command line
    "6-6-6": LARGE,
    "stream": SMALL | FILL | {"widths": [4, 2, 2], "iterations": 8},
    "chain": LARGE | {"chain": [8, 9], "segment": 64, "ways": WAYS[:-1]},
    "4-4-4": LARGE | {"widths": [4, 4, 4]},
    "8-8-8": LARGE
    | {"widths": [8, 8, 8], "segment": 64, "repeats": 3, "ways": ["naive", "group", "depth"]},
    "stream 8": SMALL | FILL | {"widths": [8], "segment": 384, "iterations": 8},
    "stream 8, spread 0.9": SMALL
    | FILL
    | {"widths": [8], "segment": 384, "spread": 0.9, "iterations": 8},
    "stream 16, spread 0.9": SMALL
    | FILL
    | {"widths": [16], "segment": 384, "spread": 0.9, "iterations": 8, "repeats": 3},
    "stream 6-6-6": SMALL | FILL | {"segment": 32, "iterations": 4, "repeats": 2},
}
SWEEP = SMALL | {"widths": [4, 4, 4], "segment": 32, "trees": 2, "repeats": 2}
SWEEP |= {"ways": ["naive", "level", "group", "depth"]}
SWEEPS: dict[str, tuple] = {  # setting -> values, the others as in SWEEP
    "trees": (1, 2, 8, 16),
    "max_num_seqs": (16, 256),
    "cache_mib": (8, 16),
    "segment": (64, 128),
    "block_size": (64, 128),
    "spread": (0.5, 0.9),
}


class FirstCome:
    """An engine that is not told which request to prefer."""

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def submit(self, request) -> None:
        self._engine.submit(dataclasses.replace(request, priority=0))


def run_once(way: str, engine, arguments, prompts: list[Prompt], seed: int) -> dict:
    """Grow the trees one way; counters and clock of this run alone."""
    engine.reset_prefix_cache()
    engine.reuse_prefixes = way != "naive"
    streamed = way in STREAMS
    shape = shape_of(arguments, engine.block_size if way == "aligned" else 1)
    barrier = way if way in ("level", "group") else "none"
    # Every way draws the same seeds; a stream needs its own prompts for every iteration.
    options = RolloutOptions(stop_token_ids=(), seed=seed, barrier=barrier)
    served = FirstCome(engine) if way == "frontier" else engine
    if arguments.spread:
        served = DrawnLengths(served, arguments.spread, lambda seed: random.Random(seed).random())
    trace = Trace(served)
    count = arguments.trees * (arguments.iterations if streamed else 1)
    done: list[float] = []
    totals: dict[str, float] = {}
    bound = loop = idle = 0
    start = time.perf_counter()
    with Grader() as grader:
        rollout = Rollout(trace, shape, grader, lambda ids: "", options)
        stream = Stream(prompts[:count], arguments.trees, rollout, STREAMS.get(way, 0))
        while True:
            for _ in stream.trees():
                done.append(time.perf_counter() - start)
            grown = next(stream, None)
            if grown is None:
                break
            stats = grown[1]
            bound += stats.prefill_bound
            loop, idle = loop + stats.loop_seconds, idle + stats.idle_seconds
            for key, value in stats.engine.items():
                totals[key] = totals.get(key, 0) + value
            if streamed:  # as after an update of the weights
                engine.reset_prefix_cache()
    wall = time.perf_counter() - start
    return {
        "way": way,
        "seconds": wall,
        "first_tree": done[0],
        "median_tree": statistics.median(done),
        "trees_per_s": len(done) / wall,
        "tokens_per_s": totals["generated"] / wall,
        "generated": totals["generated"],
        "prefill": totals["prefill"],
        "prefill_bound": bound,
        "prefill_per_bound": totals["prefill"] / bound,
        "recomputed": totals["prefill"] - bound,
        "cached": totals["cached"],
        "hit_rate": totals["cached"] / (totals["cached"] + totals["prefill"]),
        "preempted": totals["preempted"],
        "running_share": trace.mean() / arguments.max_num_seqs,
        "running_p10": trace.percentile(10) / arguments.max_num_seqs,
        "above_90": trace.share_above(0.9 * arguments.max_num_seqs),
        "steps": totals["steps"],
        "tokens_per_step": totals["forwarded"] / totals["steps"],
        "kv_peak": trace.kv_peak,
        "loop_ms_per_step": 1e3 * loop / totals["steps"],
        "loop_share": loop / totals["step_seconds"],
        "idle_seconds": idle,
        "occupancy": trace.thinned(),
    }


def shape_of(arguments, align: int = 1) -> Shape:
    """Trees, or chains of as many segments, each of whose boundaries is probed."""
    total = arguments.segment * len(arguments.widths)
    if arguments.chain:
        group, probes = arguments.chain
        return ChainShape(group, probes, fixed_partition(arguments.segment), total)
    segments = (arguments.segment,) * (len(arguments.widths) - 1)
    return TreeShape(tuple(arguments.widths), segments, total, align)


def predicted_gain(cost: dict[str, float], runs: list[dict]) -> float:
    """Wall of re-prefilling over wall of caching, from the costs per token of the same run."""
    decode = cost["decode_s"] * median(runs, "depth", "generated")
    naive, cached = (cost["prefill_s"] * median(runs, w, "prefill") for w in ("naive", "depth"))
    return (decode + naive) / (decode + cached)


def measure(arguments, console: Console) -> dict:
    """All rounds of one case; its record."""
    rng = random.Random(0)
    low, high = arguments.prompt[0], arguments.prompt[-1]
    prompts = [
        Prompt(
            tuple(rng.randrange(2, arguments.vocabulary) for _ in range(rng.randint(low, high))),
            "",
            "arithmetic",  # nothing is graded: every response runs into its limit
        )
        for _ in range(arguments.trees * max(arguments.iterations, 1))
    ]
    context = high + shape_of(arguments).max_new_tokens
    runs, cost = [], None
    with tempfile.TemporaryDirectory() as folder:
        policy = {name: getattr(arguments, name) for name in LARGE}
        parameters = build_policy(folder, context=context, **policy)
        engine = make_engine(
            "vllm",
            folder,
            max_num_seqs=arguments.max_num_seqs,
            max_model_len=context,
            block_size=arguments.block_size,
            kv_cache_bytes=arguments.cache_mib << 20,
        )
        ways = [*arguments.ways, *(STREAMS if arguments.iterations else ())]
        for repeat in range(-1, arguments.repeats):  # the first round warms up
            order = list(ways) if repeat >= 0 else ways[-1:]
            random.Random(repeat).shuffle(order)
            for way in order:
                result = run_once(way, engine, arguments, prompts, seed=repeat)
                if repeat:  # one trace is drawn
                    del result["occupancy"]
                if repeat >= 0:
                    runs.append({"repeat": repeat, **result})
        engine.reuse_prefixes = True
        if {"naive", "depth"} <= set(ways):
            rows = round(median(runs, "depth", "running_share") * arguments.max_num_seqs)
            cost = cost_per_token(engine, prompts[0].prompt_ids, rows, context)
        engine.close()
    settings = {k: v for k, v in vars(arguments).items() if k not in ("json", "plot", "quick")}
    record = {"settings": settings | {"parameters": parameters}, "ways": ways, "runs": runs}
    if cost is not None:
        record |= {"cost": cost, "predicted_gain": predicted_gain(cost, runs)}
    record |= {"versions": versions()}
    shape = f"chains {arguments.chain}" if arguments.chain else "-".join(map(str, arguments.widths))
    title = (
        f"{arguments.trees} trees {shape}, prompts {low}-{high}, segments of "
        f"{arguments.segment}, {parameters / 1e6:.0f}M parameters, {arguments.repeats} repeats"
    )
    console.print(table(title, runs, ways))
    if cost is not None:
        console.print(
            f"cost per token {1e3 * cost['prefill_s']:.3f} ms prefilled, "
            f"{1e3 * cost['decode_s']:.3f} ms decoded: predicted gain over naive "
            f"{record['predicted_gain']:.2f}"
        )
    console.print("\n".join(verdicts(runs, ways)))
    return record


def main(argv: list[str] | None = None) -> int:
    console = Console(highlight=False)
    console.width = max(console.width, 150)
    names = parse(argv, {}).case
    swept = {f"{key} {v}": SWEEP | {key: v} for key, values in SWEEPS.items() for v in values}
    points = {name: CASES[name] for name in names if name in CASES}
    points |= swept if "sweep" in names else {}
    for name, settings in points.items():
        arguments = parse(argv, settings)
        console.print(f"[bold]{name}[/bold]")
        try:
            record = measure(arguments, console) | {"swept": name in swept}
        except ValueError as error:
            print(f"rollout_tree: skipped: {error}", file=sys.stderr)
            return 1
        if arguments.json:  # cases measured apart from each other stand in one file
            found = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(found | {name: record}) + "\n")
        if arguments.plot:
            path = arguments.plot / f"occupancy-{name.replace(', ', '-').replace(' ', '-')}.svg"
            write_plot(path, record["runs"], record["ways"], arguments.max_num_seqs)
    return 0


def parse(argv: list[str] | None, settings: dict) -> argparse.Namespace:
    """The command line, on top of a case's settings."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [*CASES, "sweep"]
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=names, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="small shapes, under three minutes")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=WAYS)
    parser.add_argument("--widths", type=int, nargs="+", default=[6, 6, 6])
    parser.add_argument("--chain", type=int, nargs=2, metavar=("GROUP", "PROBES"))
    parser.add_argument("--prompt", type=int, nargs="+", default=[100, 160], help="lowest, highest")
    parser.add_argument("--segment", type=int, default=128, help="tokens per segment")
    parser.add_argument("--spread", type=float, default=0.0, help="samples end up to this early")
    parser.add_argument("--trees", type=int, default=1, help="per iteration")
    parser.add_argument("--iterations", type=int, default=0, help="of the streams; 0: none")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--cache-mib", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--json", type=Path, help="results, by case; others in the file stay")
    parser.add_argument("--plot", type=Path, help="folder for drawings of occupancy over time")
    parser.set_defaults(**settings)
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.case = ["6-6-6"]
        vars(arguments).update(SMALL)
        arguments.widths, arguments.segment = [3, 3, 3], 48
        arguments.iterations, arguments.repeats, arguments.max_num_seqs = 2, 1, 16
    if arguments.ways and "depth" not in arguments.ways:
        parser.error("--ways: depth is what the others are compared with; name it too")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
