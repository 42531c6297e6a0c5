"""What `import spo_kernels` brings with it."""

import re
import subprocess
import sys
from importlib import metadata

import spo_kernels

IMPORTS = """
import sys
import torch, numpy
before = set(sys.modules)
import spo_kernels
print(*sorted(set(sys.modules) - before))
"""


def test_import_brings_nothing_but_torch_and_numpy():
    """No Triton, no compiler stack, no trainer: they cost seconds or may not be installed."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True, timeout=120
    )
    brought = done.stdout.split()
    assert "spo_kernels.policy_loss" in brought
    foreign = {name for name in brought if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name for name in foreign if not name.startswith("spo_kernels")} == set()
    assert not [name for name in brought if name.startswith("spo_kernels.triton")]


def test_version_is_that_of_the_distribution():
    try:
        expected = metadata.version("spo-kernels")
    except metadata.PackageNotFoundError:
        expected = None
    if expected is None:
        assert spo_kernels.__version__.startswith("unknown")
    else:
        assert spo_kernels.__version__ == expected and re.match(r"\d+\.\d+", expected)


WITHOUT_DISTRIBUTION = """
from importlib import metadata
def version(name):
    raise metadata.PackageNotFoundError(name)
metadata.version = version
import spo_kernels
assert spo_kernels.__version__ == "unknown: spo-kernels is not installed as a distribution"
"""


def test_version_without_a_distribution():
    subprocess.run([sys.executable, "-c", WITHOUT_DISTRIBUTION], check=True, timeout=120)
