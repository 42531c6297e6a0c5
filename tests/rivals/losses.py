"""All rows of docs/losses.md, and the page itself: python tests/rivals/losses.py writes it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import rows_liger  # noqa: E402
import rows_others  # noqa: E402
import rows_trl  # noqa: E402
import rows_verl  # noqa: E402
from rows import NAMES, Row  # noqa: E402

ROWS: list[Row] = [*rows_trl.ROWS, *rows_liger.ROWS, *rows_verl.ROWS, *rows_others.ROWS]
# The distributions that must be installed; prime-rl is in no registry.
PACKAGES = {
    "TRL 1.16": "trl",
    "Liger 0.8.5": "liger-kernel",
    "verl 0.9.1": "verl",
    "OpenRLHF 0.11.2": "openrlhf",
    "torchtune 0.6.1": "torchtune",
    "prime-rl": None,
}
