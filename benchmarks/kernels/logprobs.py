"""Logprobs of given tokens, forward and backward, from logits and from hidden states.

    python -m benchmarks.kernels.logprobs [--device cuda] [--quick] [--json FILE] [--csv FILE]

The loss is a weighted sum of the logprobs that the mask asks for. Rivals are those of rivals.py,
byte model and floors those of heads.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from torch import Tensor

from benchmarks import common
from benchmarks.kernels import heads
from benchmarks.kernels.rivals import Problem, weighted_sum
from spo_kernels import linear_token_logprobs, token_logprobs


def ours(p: Problem, backend: str | None = None) -> Tensor:
    op = token_logprobs if len(p.inputs) == 1 else linear_token_logprobs
    return weighted_sum(op(*p.inputs, p.ids, loss_mask=p.mask, backend=backend), p)


def cases(device: str, quick: bool) -> list[heads.Case]:
    """All rows and a tenth of them: a plain trainer, and one whose responses are short."""
    return [case for case in heads.cases(device, quick) if quick or case.kept in (1, 0.1)]


run = functools.partial(heads.run, "logprobs", weighted_sum, ours)


def main(argv: Sequence[str] | None = None) -> None:
    common.main(__doc__, cases, run, argv)


if __name__ == "__main__":
    main()
