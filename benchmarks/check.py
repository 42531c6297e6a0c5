"""Is this working tree slower than another commit? `make bench-check` fails where it is.

    make bench-check                    # against the commit that this branch left main at
    make bench-check BASE=HEAD~5

The other commit is built beside this one, below build/. Both run the four workloads of workloads.py
in processes that take turns, so that a busy spell of the machine hits both. A workload is slower
where the median of its ratios is above 1.15, in a first series and in a longer second one. The
machine should do nothing else.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT
from benchmarks.workloads import WORKLOADS

LIMIT = 1.15
ROUNDS = 30


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()


def default_base() -> str:
    """Where this branch left main; on main itself what its changes stand on."""
    for main in ("origin/main", "main"):
        try:
            base = git("merge-base", "HEAD", main)
        except subprocess.CalledProcessError:
            continue
        if base != git("rev-parse", "HEAD"):
            return base
    return "HEAD" if git("status", "--porcelain", "-uno") else "HEAD~1"


def build(commit: str) -> Path:
    """The tree of a commit with its extension, from an earlier run where there was one."""
    try:
        short = git("rev-parse", "--short", "--verify", f"{commit}^{{commit}}")
    except (OSError, subprocess.CalledProcessError):
        raise RuntimeError(f"BASE: expected a commit of this repository, found {commit}") from None
    folder = ROOT / "build" / f"bench-check-{short}"
    if not list((folder / "spo_kernels").glob("_C*.so")):
        archive = subprocess.check_output(["git", "-C", str(ROOT), "archive", commit])
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
        print(f"building {commit} in {folder.relative_to(ROOT)}", flush=True)
        built = subprocess.run(
            [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
            cwd=folder,
            env=os.environ | {"SPO_CUDA_ARCHS": "80"},  # not measured here: the fewest
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if built.returncode:
            raise RuntimeError(f"{commit} does not build here:\n{built.stdout[-3000:]}")
    return folder


class Side:
    """A process that runs the workloads, found below `workloads`, on the packages below `root`."""

    def __init__(self, root: Path, names: Sequence[str], workloads: Path):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.workloads"],
            env=os.environ | {"PYTHONPATH": str(root)},
            cwd=workloads,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.root = root
        if self._ask(json.dumps(list(names))) != "ready":
            raise RuntimeError(f"{root}: the workloads do not run (see above)")

    def _ask(self, line: str) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def run(self, name: str) -> float:
        """Milliseconds of one run."""
        answer = self._ask(name)
        if not answer:
            raise RuntimeError(f"{self.root}: {name} failed (see above)")
        return float(answer)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


Times = dict[str, list[tuple[float, float]]]  # workload -> (base, this) of every round


def measure(base: Path, this: Path, names: Sequence[str], rounds: int) -> Times:
    """Rounds of all workloads, in which the sides take turns in being first."""
    sides: list[Side] = []
    scratch = tempfile.TemporaryDirectory()
    (Path(scratch.name) / "benchmarks").symlink_to(ROOT / "benchmarks")  # one for both
    try:
        for root in (base, this):
            sides.append(Side(root, names, Path(scratch.name)))
        times: Times = {name: [] for name in names}
        for index in range(rounds):
            for name in names:
                found = {}
                for side in sides if index % 2 else sides[::-1]:
                    found[side] = side.run(name)
                times[name].append((found[sides[0]], found[sides[1]]))
        return times
    finally:
        for side in sides:
            side.close()
        scratch.cleanup()


def ratio(pairs: Sequence[tuple[float, float]]) -> float:
    """This side's time over the base's: the median over pairs of rounds, one in either order.

    Who runs second finds warmer caches, so single rounds have two values.
    """
    both = [pairs[i : i + 2] for i in range(0, len(pairs), 2)]
    return statistics.median(
        sum(this for _, this in two) / sum(base for base, _ in two) for two in both
    )


def slower(times: Times) -> list[str]:
    return [name for name, pairs in times.items() if ratio(pairs) > LIMIT]


def compare(base: Path, this: Path, names: Sequence[str] = (), rounds: int = ROUNDS) -> list[str]:
    """Print the table of two built trees; the workloads that `this` is slower at."""
    times = measure(base, this, names or list(WORKLOADS), rounds)
    if suspects := slower(times):  # a first series can meet a busy spell
        times |= measure(base, this, suspects, 2 * rounds)
    found = slower(times)
    print(f"{'':<18}{'base ms':>10}{'this ms':>10}{'ratio':>8}  rounds")
    for name, pairs in times.items():
        before, now = (statistics.median(side) for side in zip(*pairs, strict=True))
        word = f"  SLOWER by more than {LIMIT - 1:.0%}" if name in found else ""
        print(f"{name:<18}{before:>10.2f}{now:>10.2f}{ratio(pairs):>8.2f}  {len(pairs)}{word}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", help="a commit")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1:
        parser.error(f"--rounds: expected at least 1, found {arguments.rounds}")
    try:
        base = arguments.base or default_base()
        return int(bool(compare(build(base), ROOT, rounds=arguments.rounds)))
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        print(f"bench-check: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
