"""The masked policy loss, forward and backward, from logits and from hidden states.

    python -m benchmarks.kernels.policy_loss [--device cuda] [--quick] [--json FILE] [--csv FILE]

Rivals are those of rivals.py, byte model and floors those of heads.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from benchmarks import common
from benchmarks.kernels import heads
from benchmarks.kernels.rivals import Problem, policy_loss
from spo_kernels import linear_masked_ppo_loss, masked_ppo_loss


def ours(p: Problem, backend: str | None = None) -> Tensor:
    op = masked_ppo_loss if len(p.inputs) == 1 else linear_masked_ppo_loss
    return op(*p.inputs, p.ids, p.old, p.advantages, backend=backend).loss


run = functools.partial(heads.run, "policy_loss", policy_loss, ours)


def main(argv: Sequence[str] | None = None) -> None:
    common.main(__doc__, heads.cases, run, argv)


if __name__ == "__main__":
    main()
