"""What every benchmark shares: timing, table, JSON, CSV, command line."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.peak import peak_memory
from benchmarks.provenance import environment, version

UNCACHED = 1 << 29  # bytes, more than any cache


@dataclass(frozen=True)
class Timing:
    """Wall-clock milliseconds of one call."""

    ms: float  # median
    p20: float
    p80: float


@dataclass(frozen=True)
class Call:
    """One implementation on one shape, ready to be timed."""

    run: Callable[[], Any]  # returns the op's results, tensors
    role: str  # base: PyTorch eager; ours; fair: comparable to ours; rival: others; floor
    package: str = "torch"  # whose version stands in the row
    error: float | None = None  # largest error of a result over that result's largest magnitude


@dataclass(frozen=True)
class Row:
    """One line of a benchmark: an implementation on a shape."""

    op: str
    shape: str
    implementation: str
    role: str
    version: str
    ms: float  # median
    ms_p20: float
    ms_p80: float
    gb_per_s: float | None  # bytes of the op's model, not of the implementation, over the median
    tflop_per_s: float | None  # work of the op's model over the median
    floor_share: float | None  # the floor's median over this median
    speedup: float | None  # median of PyTorch eager over this median
    fair_speedup: float | None  # median of the fastest fair rival or eager over this median
    peak_mb: float | None  # memory at its highest above what stood before the call
    result_mb: float  # size of the results, which every implementation has to hold
    error: float | None


@dataclass(frozen=True)
class Shape:
    """A case of an op: its name, the columns that describe it, and the model of its work."""

    op: str
    name: str
    axes: dict[str, Any]
    bytes: float | None = None
    flop: float | None = None


def measure(
    calls: dict[str, Callable[[], object]],
    *,
    seconds: float = 2.0,  # for each call
    warmup: int = 2,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time the calls in turn, one round after the other, so that a busy spell hits all alike.

    A call that has had its seconds in five rounds or more, or five times that in three, drops out.
    On a GPU a turn is as many calls as take 20 ms, and one wait at its end: as in a training step,
    the host runs ahead, so that its Python is hidden behind kernels where it can be.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    times = dict.fromkeys(calls, 1)
    for name, call in calls.items():
        for _ in range(warmup):
            call()
        if device == "cuda":
            times[name] = max(1, math.ceil(20 / _turn(call, device, 1)))
    waiting = set(calls)
    while waiting:
        for name in [n for n in calls if n in waiting]:
            samples[name].append(_turn(calls[name], device, times[name]))
            rounds, spent = len(samples[name]), sum(samples[name]) * times[name] / 1e3
            if (rounds >= 5 and spent >= seconds) or (rounds >= 3 and spent >= 5 * seconds):
                waiting.remove(name)
    return {name: _summary(ms) for name, ms in samples.items()}


def _turn(call: Callable[[], object], device: str, times: int) -> float:
    """Milliseconds of one of `times` calls in a row."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start) / times


def _summary(ms: list[float]) -> Timing:
    fifths = statistics.quantiles(ms, n=5, method="inclusive")
    return Timing(statistics.median(ms), fifths[0], fifths[3])


def compare(shape: Shape, calls: dict[str, Call], *, seconds: float, device: str) -> list[Row]:
    """Time the calls and take their peak memory; a row for each, the floor's among them."""
    ways = {name: call.run for name, call in calls.items()}
    timings = measure(ways, seconds=seconds, warmup=1, device=device)  # the check ran them once

    def fastest(*roles: str) -> float | None:
        return min((timings[n].ms for n, c in calls.items() if c.role in roles), default=None)

    base, fair, floor = fastest("base"), fastest("base", "fair"), fastest("floor")
    rows = []
    for name, call in calls.items():
        t = timings[name]
        peak, size = (None, 0.0) if call.role == "floor" else peak_memory(call.run, device)
        rows.append(
            Row(
                op=shape.op,
                shape=shape.name,
                implementation=name,
                role=call.role,
                version=version(call.package),
                ms=t.ms,
                ms_p20=t.p20,
                ms_p80=t.p80,
                gb_per_s=shape.bytes and shape.bytes / t.ms / 1e6,
                tflop_per_s=shape.flop and shape.flop / t.ms / 1e9,
                floor_share=floor and floor / t.ms,
                speedup=base and base / t.ms,
                fair_speedup=fair and fair / t.ms,
                peak_mb=peak,
                result_mb=size,
                error=call.error,
            )
        )
    return rows


def against_copy(
    op: str, case: Any, size: float, calls: dict[str, Call], args: argparse.Namespace
) -> tuple[Shape, list[Row]]:
    """`compare` on a case of an op that moves `size` bytes, with a copy of as many as the floor."""
    shape = Shape(op, case.name, case.axes, bytes=size)
    calls = calls | {"floor: copy": copy_of(size, args.device)}
    return shape, compare(shape, calls, seconds=args.seconds, device=args.device)


def copy_of(size: float, device: str, uncached: bool = False) -> Call:
    """The floor of an op that moves `size` bytes: a copy that moves as many.

    `uncached`: every call copies other bytes, as the op reads data that no cache holds.
    """
    count = max(1, int(size) // 8)  # 4 bytes read, 4 written
    pieces = max(1, UNCACHED // (4 * count)) if uncached else 1
    source = torch.ones(pieces, count, device=device)
    target = torch.ones_like(source)
    turn = itertools.cycle(zip(source, target, strict=True))

    def copy() -> None:
        read, written = next(turn)
        written.copy_(read)

    return Call(copy, "floor")


def check_close(calls: dict[str, Call], exact: Sequence[torch.Tensor]) -> None:
    """No number before every implementation agrees with fp64: `exact`, its results in order."""
    for name, call in calls.items():
        results = call.run()
        results = results if isinstance(results, tuple) else (results,)
        for found, wanted in zip(results, exact, strict=True):
            torch.testing.assert_close(
                found.to(wanted.dtype),
                wanted,
                rtol=1e-5,
                atol=1e-5,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def print_table(rows: Sequence[Row]) -> None:
    """The rows of one shape."""
    work = "GB/s" if rows[0].gb_per_s is not None else "TFLOP/s"
    table = Table(title=f"{rows[0].op}: {rows[0].shape}")
    table.add_column("implementation", no_wrap=True)
    for column in ("ms", "p20-p80", work, "of floor", "peak MB", "error", "x eager", "x fair"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.implementation,
            f"{row.ms:.3g}",
            f"{row.ms_p20:.3g}-{row.ms_p80:.3g}",
            _cell(row.tflop_per_s if row.gb_per_s is None else row.gb_per_s, ".3g"),
            _cell(row.floor_share, ".0%"),
            _cell(row.peak_mb, ".1f"),
            _cell(row.error, ".1e"),
            _cell(row.speedup, ".2f"),
            _cell(row.fair_speedup, ".2f"),
        )
    console = Console()
    console.width = max(console.width, 150)
    console.print(table)


def write_json(path: str | Path, records: list[dict[str, Any]]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(records, indent=1) + "\n")


def write_csv(path: str | Path, records: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for record in records for key in record))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(records)


def main(
    description: str,
    cases: Callable[[str, bool], Sequence[Any]],  # device, quick -> what is measured one by one
    run: Callable[[Any, argparse.Namespace], tuple[Shape, list[Row]]],
    argv: Sequence[str] | None = None,
) -> None:
    """The command line of a benchmark. Files are written after every case, so none is lost."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--seconds", type=float, help="for each implementation (2)")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no case after that")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their name")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of the rivals")
    parser.add_argument("--limit", type=float, default=20, help="seconds of a rival's first call")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--csv", metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.seconds is None:
        arguments.seconds = 0.01 if arguments.quick else 2.0
    measures = "CUDA kernels" if arguments.device == "cuda" else "kernels"
    where, start, records = environment(measures, arguments.device), time.monotonic(), []
    for case in cases(arguments.device, arguments.quick):
        if arguments.only not in case.name:
            continue
        if time.monotonic() - start > 60 * arguments.minutes:
            print(f"{case.name}: skipped: {arguments.minutes:g} minutes are over", flush=True)
            continue
        shape, rows = run(case, arguments)
        print_table(rows)
        records += [dataclasses.asdict(row) | shape.axes | where for row in rows]
        for path, write in ((arguments.json, write_json), (arguments.csv, write_csv)):
            if path:
                write(path, records)
    print(", ".join(f"{name} {value}" for name, value in where.items()), flush=True)
