"""Build, test and measure everything on one machine, in one command and one JSON file.

    python benchmarks/suite.py --device cuda --minutes 8 --json suite.json

Needs Python, torch, rich, pytest, hypothesis, cmake, ninja, pybind11 and, for a GPU, nvcc and
Triton; no network. pytest-xdist makes the tests faster. What is missing is skipped with a reason.
Every step has its share of the minutes, and the file is written after each. One that fails or is
cut off stops no other, but for the build. With `--device cpu` every step runs too that needs no
GPU: on the CPU's kernels, Triton's interpreter, and without compute-sanitizer. That is a rehearsal;
two cores need `--minutes 15` for it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TAIL = 6000  # characters of a step's output that are kept
NOTED = (
    "skipped: ",
    "failed: ",
    "left out",
)  # lines of a benchmark that are kept wherever they are
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "liger-kernel",
    "trl",
    "verl",
    "cut-cross-entropy",
    "setuptools",
    "pybind11",
    "cmake",
    "ninja",
)


@dataclass(frozen=True)
class Step:
    """A command and its share of eight minutes."""

    name: str
    command: Sequence[
        str
    ]  # "{extension}" stands for the built extension, "{device}" for the device
    minutes: float
    tool: str = ""  # skipped where this program is not installed
    device: str = ""  # skipped on others
    measures: bool = False  # a benchmark: takes --device, --json and the like
    variables: Mapping[str, str] = field(default_factory=dict)  # of its environment


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def benchmark(name: str, minutes: float) -> Step:
    return Step(name, python("-m", f"benchmarks.kernels.{name}"), minutes, measures=True)


TESTS, TRITON = "tests/spo_kernels", "tests/spo_kernels/test_triton.py"


def tests(
    name: str, minutes: float, path: str, device: str = "", left_out: str = "", **variables: str
) -> Step:
    """The kernels' tests, of which each process of pytest-xdist takes some."""
    options = ["-q", "-m", "not slow", "--durations=5", "-p", "no:cacheprovider"]
    options += ["-k", f"not {left_out}"] if left_out else []
    if importlib.util.find_spec("xdist"):
        options += ["-n", str(min(8, os.cpu_count() or 1))]
    command = python("-m", "pytest", path, *options)
    return Step(name, command, minutes, device=device, variables=variables)


def sanitized(tool: str, minutes: float, *sizes: int) -> Step:
    """A tool of compute-sanitizer over all CUDA kernels; on the CPU, the kernels alone."""
    command = python("-m", "benchmarks.sanitize", "--device", "{device}")
    # Memory from the caching allocator is one block to the tool: an overrun would be silent.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Ours alone: racecheck also reports PyTorch's reductions.
    checker = ("compute-sanitizer", "--error-exitcode", "1", "--kernel-name", "kns=spo")
    checker += ("--tool", tool)
    command += ("--sizes", *map(str, sizes)) if sizes else ()
    command += ("--no-head",) if tool == "racecheck" else ()
    return Step(tool, (*checker, *command), minutes, checker[0], variables=variables)


SHOWN = {"COLUMNS": "150", "PYTHONUNBUFFERED": "1"}  # what was printed before a step is cut off
BACKENDS = "import json, spo_kernels; print(json.dumps(spo_kernels.backends(), indent=1))"
STEPS = (
    Step("gpu", ("nvidia-smi", "-q", "-d", "CLOCK,POWER,ECC"), 0.1, "nvidia-smi", "cuda"),
    Step("nvcc", ("nvcc", "--version"), 0.1, "nvcc"),
    Step("build", python("setup.py", "build_ext", "--inplace"), 1.5),
    Step("backends", python("-c", BACKENDS), 0.3),
    Step("registers", ("cuobjdump", "-res-usage", "{extension}"), 0.1, "cuobjdump", "cuda"),
    # `on_triton` runs Triton in a process of its own, which has its own step.
    tests("tests", 1.0, TESTS, left_out="on_triton", SPO_TEST_BACKEND="{device}"),
    tests("tests on Triton", 1.5, TESTS, "cuda", "on_triton", SPO_TEST_BACKEND="triton"),
    tests("Triton interpreted", 1.5, TRITON, "cpu", TRITON_INTERPRET="1"),
    sanitized("memcheck", 0.5),
    sanitized("racecheck", 0.4, 1031, 151937),
    sanitized("synccheck", 0.3, 1031, 151937),
    benchmark("ceilings", 0.5),
    benchmark("policy_loss", 1.7),
    benchmark("logprobs", 0.8),
    benchmark("tree", 0.3),
    benchmark("segments", 0.3),
    benchmark("gae", 0.3),
)


def environment() -> dict[str, Any]:
    """The machine and what is installed on it."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {
        "packages": found,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def reason_to_skip(step: Step, device: str, skip: Sequence[str]) -> str:
    if step.name in skip:
        return "asked for"
    if step.device not in ("", device):
        return f"it needs --device {step.device}"
    if step.tool and shutil.which(step.tool) is None and not rehearsed(step, device):
        return f"{step.tool} is not installed"
    return ""


def rehearsed(step: Step, device: str) -> bool:
    """Whether the step runs on the CPU without its tool."""
    return device == "cpu" and step.tool == "compute-sanitizer"


def run(step: Step, seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run a step for at most `seconds`; its outcome, with the rows of a benchmark."""
    extension = next((ROOT / "spo_kernels").glob("_C*.so"), ROOT / "spo_kernels" / "_C.so")
    names = {"{extension}": str(extension), "{device}": arguments.device}
    command = [names.get(part, part) for part in step.command]
    if rehearsed(step, arguments.device):
        command = command[command.index(sys.executable) :]
    variables = {key: names.get(value, value) for key, value in step.variables.items()}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        if step.measures:
            command += ["--device", arguments.device, "--json", str(rows)]
            command += ["--minutes", f"{0.8 * seconds / 60:.3f}"]
            command += ["--quick"] if arguments.quick else ["--seconds", str(arguments.seconds)]
        outcome = execute(command, seconds, variables)
        if rows.exists():
            outcome["rows"] = json.loads(rows.read_text())
    return outcome


def execute(command: Sequence[str], seconds: float, variables: Mapping[str, str]) -> dict[str, Any]:
    """Run a command and all that it starts, and end them when the time is over."""
    start = time.monotonic()
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), **SHOWN, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    late = False
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = True
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    return {
        "command": list(command),
        "seconds": round(time.monotonic() - start, 1),
        "returncode": process.returncode,
        "cut_off": late,
        "notes": [line for line in output.splitlines() if any(word in line for word in NOTED)],
        "output": output[-TAIL:],
    }


def summary(outcome: dict[str, Any]) -> str:
    if "skipped" in outcome:
        return f"skipped: {outcome['skipped']}"
    code = outcome["returncode"]
    state = "out of time" if outcome["cut_off"] else "ok" if code == 0 else f"failed ({code})"
    rows = f", {len(outcome['rows'])} rows" if "rows" in outcome else ""
    return f"{state}, {outcome['seconds']:.0f} s{rows}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--minutes", type=float, default=8.0, help="for all steps together")
    parser.add_argument("--seconds", type=float, default=0.3, help="for each implementation")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--skip", nargs="*", default=[], choices=[s.name for s in STEPS])
    parser.add_argument("--json", type=Path, default=Path("suite.json"))
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + 60 * arguments.minutes
    total = sum(s.minutes for s in STEPS if not reason_to_skip(s, arguments.device, arguments.skip))
    record: dict[str, Any] = {"environment": environment(), "failed": [], "steps": {}}
    for step in STEPS:
        reason = reason_to_skip(step, arguments.device, arguments.skip)
        if "build" in record["failed"]:
            reason = "the build failed: an older extension would be tested and measured"
        if reason:
            outcome: dict[str, Any] = {"skipped": reason}
        else:
            # What the steps before did not use goes to this one and those behind it.
            left = deadline - time.monotonic()
            outcome = run(step, max(1.0, left * min(1, step.minutes / total)), arguments)
            total -= step.minutes
        record["steps"][step.name] = outcome
        if outcome.get("returncode", 0) != 0:
            record["failed"].append(step.name)
        print(f"{step.name}: {summary(outcome)}", flush=True)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(bool(record["failed"]))


if __name__ == "__main__":
    sys.exit(main())
