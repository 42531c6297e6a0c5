"""What every benchmark shares: timing, the environment in each row, the table, the JSON file."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Timing:
    """Wall-clock milliseconds of one call."""

    ms: float  # median
    p20: float
    p80: float


@dataclass(frozen=True)
class Row:
    """One line of a benchmark: an implementation on a shape."""

    op: str
    shape: str
    implementation: str
    ms: float  # median
    ms_p20: float
    ms_p80: float
    gb_per_s: float  # bytes of the op's model, not of the implementation, over the median
    speedup: float  # median of the PyTorch rival over this median


def measure(
    calls: dict[str, Callable[[], object]],
    *,
    seconds: float = 2.0,  # for each call
    warmup: int = 2,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time the calls in turn, one round after the other, so that a busy spell hits all alike.

    A call that has had its seconds (and at least five rounds) drops out.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(warmup):
            call()
    waiting = set(calls)
    while waiting:
        for name in [n for n in calls if n in waiting]:
            samples[name].append(_once(calls[name], device))
            if len(samples[name]) >= 5 and sum(samples[name]) >= 1e3 * seconds:
                waiting.remove(name)
    return {name: _summary(ms) for name, ms in samples.items()}


def _once(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def _summary(ms: list[float]) -> Timing:
    fifths = statistics.quantiles(ms, n=5, method="inclusive")
    return Timing(statistics.median(ms), fifths[0], fifths[3])


def environment(device: str = "cpu") -> dict[str, str | int]:
    """Versions, device, threads and commit: what a number means nothing without."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "spo_kernels": importlib.metadata.version("spo-kernels"),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def device_name(device: str = "cpu") -> str:
    """The model of the GPU or of the processor."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Short hash of the checkout, "+" if tracked files differ from it; "unknown" without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "--short", "HEAD"], text=True)
        changes = subprocess.check_output([*git, "status", "--porcelain", "-uno"], text=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+" if changes else "")


def print_table(title: str, rows: list[Row], device: str = "cpu") -> None:
    """One table a shape, with the environment under it."""
    console = Console()
    for shape in dict.fromkeys(row.shape for row in rows):
        table = Table(title=f"{title}: {shape}")
        table.add_column("implementation", no_wrap=True)
        for column in ("ms", "p20-p80", "GB/s", "x PyTorch"):
            table.add_column(column, justify="right", no_wrap=True)
        for row in (r for r in rows if r.shape == shape):
            table.add_row(
                row.implementation,
                f"{row.ms:.2f}",
                f"{row.ms_p20:.2f}-{row.ms_p80:.2f}",
                f"{row.gb_per_s:.2f}",
                f"{row.speedup:.1f}",
            )
        console.print(table)
    where = ", ".join(f"{name} {value}" for name, value in environment(device).items())
    console.print(where, highlight=False)


def write_json(path: str | Path, rows: list[Row], device: str = "cpu") -> None:
    """Write the rows, each with the environment it was measured in."""
    where = environment(device)
    records = [dataclasses.asdict(row) | where for row in rows]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(records, indent=1) + "\n")
