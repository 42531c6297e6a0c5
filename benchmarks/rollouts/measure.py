"""One case of the rollout benchmark: every way to grow its trees, in rounds, on one engine."""

from __future__ import annotations

import argparse
import dataclasses
import random
import statistics
import tempfile
import time
from collections.abc import Callable

from benchmarks.policy import build_policy
from benchmarks.provenance import environment
from benchmarks.rollouts.cases import LARGE, STREAMS, prompts_of, shape_of
from benchmarks.rollouts.occupancy import DrawnLengths, Trace, cost_per_token, forget
from spo.engines.make import make_engine
from spo.grow.rollout import Rollout, RolloutOptions
from spo.grow.stream import Stream
from spo.learn.checkpoint import versions
from spo.records import Prompt, Sampling
from spo.tasks.grading import Grader

Watch = Callable[[dict, int], None]  # a run that has just been measured, and its round


class FirstCome:
    """An engine that is not told which request to prefer."""

    def __init__(self, engine):
        self._engine = engine

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def submit(self, request) -> None:
        self._engine.submit(dataclasses.replace(request, priority=0))


def run_once(way: str, engine, case: argparse.Namespace, prompts: list[Prompt], seed: int) -> dict:
    """Grow the trees one way; counters and clock of this run alone."""
    forget(engine)
    engine.reuse_prefixes = way != "naive"
    streamed = way in STREAMS
    shape = shape_of(case, engine.block_size if way == "aligned" else 1)
    barrier = way if way in ("level", "group") else "none"
    # Every way draws the same seeds; a stream needs its own prompts for every iteration.
    options = RolloutOptions(Sampling(seed), barrier=barrier)
    served = FirstCome(engine) if way == "frontier" else engine
    if case.spread:
        served = DrawnLengths(served, case.spread, lambda seed: random.Random(seed).random())
    trace = Trace(served)
    count = case.trees * (case.iterations if streamed else 1)
    done: list[float] = []
    totals: dict[str, float] = {}
    bound = loop = idle = 0
    start = time.perf_counter()
    with Grader() as grader:
        rollout = Rollout(trace, shape, grader, lambda ids: "", options)
        stream = Stream(prompts[:count], case.trees, rollout, STREAMS.get(way, 0))
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
                forget(engine)
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
        "running_share": trace.mean() / case.max_num_seqs,
        "running_p10": trace.percentile(10) / case.max_num_seqs,
        "above_90": trace.share_above(0.9 * case.max_num_seqs),
        "steps": totals["steps"],
        "tokens_per_step": totals["forwarded"] / totals["steps"],
        "kv_peak": trace.kv_peak,
        "loop_ms_per_step": 1e3 * loop / totals["steps"],
        "loop_share": loop / totals["step_seconds"],
        "idle_seconds": idle,
        "occupancy": trace.thinned(),
    }


def predicted_gain(cost: dict[str, float], runs: list[dict]) -> float:
    """Wall of re-prefilling over wall of caching, from the costs per token of the same run."""

    def median(way: str, key: str) -> float:
        return statistics.median(run[key] for run in runs if run["way"] == way)

    decode = cost["decode_s"] * median("depth", "generated")
    naive, cached = (cost["prefill_s"] * median(way, "prefill") for way in ("naive", "depth"))
    return (decode + naive) / (decode + cached)


def options_of(name: str, case: argparse.Namespace, context: int) -> dict:
    """What the engine called `name` is built with."""
    options = {"max_num_seqs": case.max_num_seqs, "max_model_len": context}
    if name == "vllm":
        options |= {"block_size": case.block_size, "kv_cache_bytes": case.cache_mib << 20}
    return options


def rounds_of(case: argparse.Namespace, engine, prompts: list[Prompt], watch: Watch) -> list[dict]:
    """All runs: one that warms up and is thrown away, then the ways in an order drawn anew for
    every round.

    No round starts that would end after `case.until`, and in the first round no run does, but for
    the very first.
    """
    ways = ways_of(case)
    runs, round_s, run_s = [], 0.0, 0.0
    run_once(ways[-1], engine, case, prompts, seed=-1)
    for repeat in range(case.repeats):
        begin = time.monotonic()
        if repeat and begin + round_s > case.until:
            break
        order = list(ways)
        random.Random(repeat).shuffle(order)
        if not repeat:  # what the others are compared with, should the time be over soon
            order.sort(key=lambda way: way not in ("naive", "depth"))
        for way in order:
            start = time.monotonic()
            if runs and repeat == 0 and start + run_s > case.until:
                break
            result = run_once(way, engine, case, prompts, seed=repeat)
            if repeat:  # one trace is drawn
                del result["occupancy"]
            runs.append({"repeat": repeat, **result})
            watch(result, repeat)
            run_s = max(run_s, time.monotonic() - start)
        round_s = max(round_s, time.monotonic() - begin)
    return runs


def ways_of(case: argparse.Namespace) -> list[str]:
    return [*case.ways, *(STREAMS if case.iterations else ())]


def measure(case: argparse.Namespace, name: str, watch: Watch, ready: Callable[[dict], None]):
    """The record of a case on the engine called `name`; `ready` is told the settings first."""
    prompts = prompts_of(case)
    context = case.prompt[-1] + shape_of(case).max_new_tokens
    cost = None
    with tempfile.TemporaryDirectory() as folder:
        policy = {key: getattr(case, key) for key in LARGE}
        parameters = build_policy(folder, context=context, **policy)
        settings = vars(case) | {"parameters": parameters, "engine": name}
        ready(settings)
        engine = make_engine(name, folder, **options_of(name, case, context))
        runs = rounds_of(case, engine, prompts, watch)
        engine.reuse_prefixes = True
        if {"naive", "depth"} <= {run["way"] for run in runs}:
            shares = [run["running_share"] for run in runs if run["way"] == "depth"]
            rows = round(statistics.median(shares) * case.max_num_seqs)
            cost = cost_per_token(engine, prompts[0].prompt_ids, rows, context)
        engine.close()
    del settings["until"]
    record = {"settings": settings, "ways": ways_of(case), "runs": runs}
    if cost is not None:
        record |= {"cost": cost, "predicted_gain": predicted_gain(cost, runs)}
    return record | environment("rollout code") | {"versions": versions()}
