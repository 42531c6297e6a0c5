"""All rows of docs/losses.md, and the page itself: python tests/rivals/losses.py writes it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import rows_dpo  # noqa: E402
import rows_liger  # noqa: E402
import rows_others  # noqa: E402
import rows_trl  # noqa: E402
import rows_verl  # noqa: E402
from rows import NAMES, Row  # noqa: E402

ROWS: list[Row] = [
    *rows_trl.ROWS,
    *rows_dpo.ROWS,
    *rows_liger.ROWS,
    *rows_verl.ROWS,
    *rows_others.ROWS,
]
# The distributions that must be installed; prime-rl is in no registry.
PACKAGES = {
    "TRL 1.16": "trl",
    "Liger 0.8.5": "liger-kernel",
    "verl 0.9.1": "verl",
    "OpenRLHF 0.11.2": "openrlhf",
    "torchtune 0.6.1": "torchtune",
    "prime-rl": None,
}
NOTES = {
    "TRL 1.16": "Options of `GRPOConfig`, unless a trainer is named. Without `loss_type`: dapo. Of "
    "pairs, the first half of the batch is chosen, the second rejected.",
    "Liger 0.8.5": "Options of `LigerFusedLinearGRPOLoss`, unless a class is named. Of pairs, the "
    "first half of the batch is chosen, the second rejected.",
    "verl 0.9.1": "A name in quotation marks is a `loss_mode`; without one: vanilla. "
    "`loss_agg_mode` is token-mean where none is named, seq-mean-token-mean for gspo, sapo and "
    "`entropy_coeff`. `sequences` counts those that train a token.",
    "OpenRLHF 0.11.2": "Options of `PolicyLoss`, unless a class is named; `kl_estimator` is that "
    "of its KL loss, with a coefficient of 0.1. `sequences` counts those that train a token.",
    "torchtune 0.6.1": "",
    "prime-rl": "In no registry: compared with its formula, and with numbers worked by hand.",
}


def render() -> str:
    """docs/losses.md."""
    head = (Path(__file__).parent / "losses.md").read_text()
    lines = [head.replace("{names}", "\n".join(f"| `{k}` | {v} |" for k, v in NAMES.items()))]
    written: dict[str, Row] = {}
    for library in PACKAGES:
        own = [row for row in ROWS if row.library == library]
        lines += [f"## {library}\n"] + ([f"{NOTES[library]}\n"] if NOTES[library] else [])
        again = [row for row in own if row.code in written]
        if again:
            lines += ["| option | write the code of |", "|---|---|"]
            for row in again:
                first = written[row.code]
                lines.append(f"| `{row.option}` | {first.library} `{first.option}` |")
            lines.append("")
        for row in own:
            if row not in again:
                written.setdefault(row.code, row)
                lines.append(f"`{row.option}`:\n\n```python\n{row.code}\n```\n")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "losses.md").write_text(render())
