"""Measure the committed figures again, on this machine, and write the pages anew.

    make figures                                   # all but those of hours
    make figures ONLY="policy_loss rollout_tree"
    make figures ONLY=methods                      # hours: methods, ablations, estimators, rollouts

Results go to benchmarks/results/<device>/, where a CPU's device is its kind (cpu-amx, cpu-avx2, …).
A figure is compared with the one that was committed for the same kind, and with no other. Run it on
a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import ROOT
from benchmarks.figures import pages, results
from benchmarks.provenance import environment, folder


def module(name: str, *options: str) -> list[str]:
    return [sys.executable, "-m", f"benchmarks.{name}", *options]


ROLLOUT = [sys.executable, "benchmarks/rollout_tree.py"]
SCRIPT = shutil.which("spo", path=str(Path(sys.executable).parent)) or "spo"
# Name of the result -> command, which gets `--json FILE`.
SHORT = {
    **{name: module(f"kernels.{name}") for name in results.BENCHMARKS},
    "train_step": module("train_step"),
    "shared_prefix": module(
        "shared_prefix",
        "--hidden",
        "192",
        "--layers",
        "4",
        "--vocabulary",
        "512",
        "--kv-heads",
        "3",
    ),
    "rollout_tree": [*ROLLOUT, "--plot", "docs/rollout"],
    "rollout_tree_hf": [*ROLLOUT, "--engine", "hf"],
    "demo": [SCRIPT, "compare", "demo-tree", "demo-grpo"],
}
LONG = {  # hours; the last three keep their own ledgers in results/evidence/
    "rollouts": [*ROLLOUT, "--full", "--plot", "docs/rollout"],
    "methods": module("end_to_end"),
    "ablations": module("evidence.ablations"),
    "estimators": module("evidence.estimators"),
}
# Results that stand in the file of another.
FILES = {"rollouts": "rollout_tree", "rollout_tree_hf": "rollout_tree"}
LEDGERS = ("methods", "ablations")


def changes(before: object, after: object) -> list[str]:
    """Times of ours over those committed for the same kind of CPU."""

    def times(rows: object) -> dict[tuple[str, str], float]:
        found = {}
        for row in rows if isinstance(rows, list) else ():
            if row.get("role") == "ours" or row.get("way") == "packed":
                found[row["device_kind"], row["shape"]] = row.get("ms") or row["seconds"]
        return found

    old = times(before)
    return [
        f"{key[1]}: {value / old[key]:.2f} of the time committed for {key[0]}"
        for key, value in times(after).items()
        if key in old
    ]


def run(name: str) -> None:
    """Measure one figure and put it where it belongs; the committed one stays if that fails."""
    command = (SHORT | LONG)[name]
    if name in LEDGERS:
        subprocess.run(command, cwd=ROOT, check=True)
        return
    place = results.EVIDENCE if name == "estimators" else folder()
    path = place / f"{FILES.get(name, name)}.json"
    # What was measured stays here if a later part fails.
    new = ROOT / "build" / "figures" / path.name
    new.parent.mkdir(parents=True, exist_ok=True)
    new.unlink(missing_ok=True)
    if path.exists() and path.stem in ("rollout_tree", "estimators"):
        shutil.copy(path, new)  # these keep what they do not measure
    subprocess.run([*command, "--json", str(new)], cwd=ROOT, check=True)
    record = json.loads(new.read_text())
    if name == "demo":  # `spo compare` knows nothing of benchmarks
        new.write_text(json.dumps(record | environment("trainer"), indent=1) + "\n")
    if path.exists():
        print("\n".join(changes(json.loads(path.read_text()), record)), flush=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(new, path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join([*SHORT, *LONG]))
    names = parser.parse_args(argv).names
    if unknown := set(names) - set(SHORT | LONG):
        parser.error(f"NAME: expected some of {', '.join(SHORT | LONG)}, found {min(unknown)}")
    failed = []
    for name in names or SHORT:
        print(f"measuring {name}", flush=True)
        try:
            run(name)
        except subprocess.CalledProcessError as error:
            failed.append(name)
            print(f"{name}: {error}; its committed figures stay, see build/figures", flush=True)
    pages.main()
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
