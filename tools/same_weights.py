"""Whether a change keeps what was learned: the same recipes at two commits, weights hash by hash.

    python tools/same_weights.py BASE [--only NAME ...] [--iterations N]

Checks BASE out beside this tree, runs every recipe of both that the embedded policy and engine can
run, and compares hashes of all trained tensors (policy and critic).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parents[1]


def recipes(tree: Path) -> dict[str, Path]:
    """Name -> file, of the recipes that need nothing but the package."""
    folder = tree / "spo" / "recipes"
    folder = folder if folder.is_dir() else tree / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def digest(run: Path) -> str:
    """One hash of every tensor of the run's checkpoint, by name, type and content."""
    found = hashlib.sha256()
    (checkpoint,) = (run / "checkpoints").glob("iter-*")
    for part in ("policy", "critic"):
        exact = checkpoint / "weights.safetensors"  # of the policy, where its folder has fewer bits
        files = [exact] if part == "policy" and exact.exists() else []
        for file in files or sorted((checkpoint / part).glob("*.safetensors")):
            for name, tensor in sorted(load_file(file).items()):
                data = tensor.contiguous().view(-1).view(torch.uint8)
                found.update(f"{part} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(data.numpy().tobytes())
    return found.hexdigest()[:16]


def train(tree: Path, recipe: Path, iterations: int, out: Path) -> str:
    """The digest after so many iterations, or the last line of what the run said."""
    command = [sys.executable, "-m", "spo.cli", "train", str(recipe)]
    command += ["engine.name=hf", f"train.iterations={iterations}", "eval.problems=20"]
    command += ["train.max_generated_tokens=null", "train.checkpoint_every=1", f"out={out}"]
    environment = os.environ | {"PYTHONPATH": str(tree), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip() or "no message").splitlines()[-1]
    return digest(out)


def build(tree: Path) -> None:
    """The native extension of a tree, in place."""
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=tree, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", help="commit to compare with")
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="recipes, by file name")
    parser.add_argument("--keep", type=Path, help="JSON with the base's hashes: read, else written")
    arguments = parser.parse_args()
    known = {}
    if arguments.keep and arguments.keep.exists():
        known = json.loads(arguments.keep.read_text())
    different = 0
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        subprocess.run(
            ["git", "worktree", "add", "-q", "--detach", base, arguments.base], cwd=HERE, check=True
        )
        try:
            old, new = recipes(base), recipes(HERE)
            if set(old) - set(known):
                build(base)
            for name in sorted(old):
                if arguments.only and name not in arguments.only:
                    continue
                if name not in known:
                    known[name] = train(
                        base, old[name], arguments.iterations, Path(scratch) / "old" / name
                    )
                    if arguments.keep:
                        arguments.keep.write_text(json.dumps(known, indent=1))
                now = "no such recipe"
                if name in new:
                    now = train(HERE, new[name], arguments.iterations, Path(scratch) / "new" / name)
                same = now == known[name]
                different += not same
                print(f"{name:16} {known[name]}  {now}  {'equal' if same else 'DIFFERENT'}")
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", base], cwd=HERE, check=True)
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
