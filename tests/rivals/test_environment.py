"""An environment of `make rivals` finds the kernels of this repository from any folder."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_kernels_are_found_from_any_folder(tmp_path):
    code = "import benchmarks, spo_kernels; print(spo_kernels.__file__)"
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert Path(done.stdout.strip()) == ROOT / "spo_kernels" / "__init__.py"
