"""The comparisons with other libraries run in their environments: `make rivals test-rivals`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` and `spo_kernels`
collect_ignore_glob = [] if os.environ.get("SPO_RIVALS") else ["test_*.py"]
