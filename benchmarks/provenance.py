"""Where a figure comes from: machine, versions, commit, and a hash of the sources it measures."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import RESULTS, ROOT

BUILD = ("CMakeLists.txt", "setup.py")
KERNELS = (*BUILD, "csrc/*.h", "csrc/*.cpp", "csrc/cpu/*.h", "csrc/cpu/*.cpp", "spo_kernels/*.py")
ROLLOUT = ("spo/records.py", "spo/engines/*.py", "spo/grow/*.py")
# What a result measures -> the files that decide it, as patterns below the repository.
SOURCES: dict[str, tuple[str, ...]] = {
    "kernels": KERNELS,
    "CUDA kernels": (*KERNELS, "csrc/cuda/*.cu", "csrc/cuda/*.cuh", "spo_kernels/triton/*.py"),
    "training code": (*KERNELS, "spo/records.py", "spo/learn/*.py"),
    "rollout code": ROLLOUT,
    "trainer": (*KERNELS, "spo/**/*.py", "spo/recipes/*.yaml", "spo/assets/policy/*"),
}
# The kinds of CPU that the kernels tell apart, best first: a flag of /proc/cpuinfo -> name.
KINDS = {
    "amx_bf16": "amx",
    "avx512_bf16": "avx512_bf16",
    "avx512f": "avx512",
    "avx2": "avx2",
}


def environment(measures: str, device: str = "cpu") -> dict[str, str | int]:
    """What stands beside every figure. `measures` is a key of SOURCES."""
    import torch

    return {
        "device": device_name(device),
        "device_kind": kind_of(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "spo_kernels": version("spo-kernels").split(" ", 1)[1],
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "measures": measures,
        "sources": digest(measures),
    }


def version(package: str) -> str:
    """Name and version; a checkout that was built in place has none."""
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package} (not installed)"


def _cpuinfo(field: str) -> str:
    """A line of the first processor's entry; "" where the system does not say."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith(field):
            return line.split(":", 1)[1].strip()
    return ""


def device_name(device: str = "cpu") -> str:
    """The model of the GPU or of the processor."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def kind_of(device: str = "cpu") -> str:
    """What decides which kernels run: a GPU's name, or the best vector unit of the CPU.

    Times are compared between machines of one kind only.
    """
    if device == "cuda":
        return device_name("cuda")
    flags = _cpuinfo("flags").split()
    return next((name for flag, name in KINDS.items() if flag in flags), platform.machine())


def folder(device: str = "cpu") -> Path:
    """Where results of this machine's kind belong, below benchmarks/results/."""
    kind = kind_of(device)
    return RESULTS / (f"cpu-{kind}" if device == "cpu" else kind.replace(" ", "-").lower())


@functools.cache
def digest(measures: str, root: Path = ROOT) -> str:
    """Hash of the sources' names and contents: 12 hexadecimal digits."""
    files = {p for pattern in SOURCES[measures] for p in root.glob(pattern) if p.is_file()}
    total = hashlib.sha256()
    for path in sorted(files):
        if "__pycache__" not in path.parts:
            total.update(f"{path.relative_to(root).as_posix()}\0".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:12]


def mark(record: Mapping[str, Any], measures: str) -> str:
    """What a table says of a result whose sources have changed since; "" where they have not."""
    if record.get("sources") == digest(measures):
        return ""
    return f"measured before the {measures} of {commit(*SOURCES[measures])}"


def where(records: Sequence[Mapping[str, Any]], measures: str = "") -> str:
    """Machine, commits and dates of some results, and the marks of those that are old.

    Records say themselves what they measure, but for old ones: there `measures` does.
    """
    first = records[0]
    known = first["device_kind"] in ("", first["device"])  # a GPU's kind is its name
    kind = "" if known else f" ({first['device_kind']})"
    threads = (
        f", {first['threads']} thread{'s' * (first['threads'] > 1)}" if "threads" in first else ""
    )
    torch = f", torch {first['torch']}" if "torch" in first else ""
    made = [f"{first['device']}{kind}{threads}{torch}"]
    commits = list(dict.fromkeys(r["commit"] for r in records))
    made += [f"commit{'s' * (len(commits) > 1)} {', '.join(commits)}"]
    made += [" and ".join(sorted({r["date"] for r in records}))]
    marks = dict.fromkeys(mark(r, measures or r["measures"]) for r in records)
    return "; ".join([", ".join(made), *filter(None, marks)])


@functools.cache
def commit(*patterns: str) -> str:
    """Short hash of the newest commit that changed files of these patterns, or of HEAD.

    "+" behind it: tracked files differ from it now. "unknown" without git.
    """
    chosen = [f":(glob){pattern}" for pattern in patterns]
    try:
        newest = _git("log", "-1", "--format=%h", "--", *chosen)
        changes = _git("status", "--porcelain", "-uno", "--", *chosen)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return (newest or "unknown") + ("+" if changes else "")


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
