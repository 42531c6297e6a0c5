"""The committed results: benchmarks/results/<device>/<benchmark>.json, or a suite.json there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import RESULTS

BENCHMARKS = ("policy_loss", "logprobs", "segments", "tree", "gae")
EVIDENCE = RESULTS / "evidence"

Record = dict[str, Any]  # a row of common.py


def devices(root: Path = RESULTS) -> list[str]:
    """Devices with results, CPUs first, the newest kind of result of each first."""
    names = [f.name for f in root.iterdir() if f.is_dir() and f.name != EVIDENCE.name]
    return sorted(names, key=lambda name: (not name.startswith("cpu"), name))


def read(device: str, name: str, root: Path = RESULTS) -> Any:
    """The content of a committed JSON file; None if a device has none."""
    path = root / device / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def on_every_device(name: str, table: Callable[[Any], str]) -> str:
    """`table` of the result called `name`, for each device that has one."""
    found = (read(device, name) for device in devices())
    return "\n\n".join(table(content) for content in found if content)


def newest(name: str, root: Path = RESULTS, gpu: bool = False) -> tuple[str, Any]:
    """Device and content of the newest result called `name`, of a CPU or of a GPU."""
    names = [device for device in devices(root) if device.startswith("cpu") != gpu]
    found = [(device, read(device, name, root)) for device in names]

    def date(pair: tuple[str, Any]) -> str:
        rows = pair[1] if isinstance(pair[1], list) else list(pair[1].values())
        dates = [row["date"] for row in (pair[1], *rows) if isinstance(row, dict) and "date" in row]
        return max(dates)

    return max(((d, content) for d, content in found if content), key=date)


def load(device: str, benchmark: str, root: Path = RESULTS) -> list[Record]:
    """The rows of `kernels/<benchmark>.py` on a device; none if it was not measured there."""
    path, suite = root / device / f"{benchmark}.json", root / device / "suite.json"
    if path.exists():
        return json.loads(path.read_text())
    if suite.exists():
        steps = json.loads(suite.read_text())["steps"]
        return steps.get(benchmark, {}).get("rows", [])
    return []


def shapes(records: list[Record]) -> dict[tuple[str, str], list[Record]]:
    """The rows of each (op, shape), in the order in which they were measured."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["op"], record["shape"]), []).append(record)
    return groups


def best(records: list[Record], *roles: str) -> Record | None:
    """The fastest row of those roles (see common.Call)."""
    return min((r for r in records if r["role"] in roles), key=lambda r: r["ms"], default=None)
