"""Runs on two processes, and how far apart two runs are."""

import os
import subprocess
import sys
from pathlib import Path


def torchrun(*command):
    """Run on two processes of one thread each."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, *map(str, command)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]


def distance(a, b):
    """Over all weights; AdamW turns the last bit of a gradient near 0 into whole steps, so that no
    bound holds for every single weight."""
    assert a.keys() == b.keys()
    return sum(float((a[name] - b[name]).norm()) ** 2 for name in a) ** 0.5
