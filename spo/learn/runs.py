"""The runs of a pack: its nodes, or chains of only children.

A run is a longest span of equal `visible_until`. The tokens of a run see each other causally, and
its descendants, the tokens [end, until), see all of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Run(NamedTuple):
    start: int  # first token
    end: int  # one after its last
    until: int  # one after its last descendant


def find_runs(visible_until: Tensor) -> list[Run]:
    """The runs of a pack in order."""
    until, counts = torch.unique_consecutive(visible_until.cpu(), return_counts=True)
    ends = counts.cumsum(0)
    columns = (ends - counts).tolist(), ends.tolist(), until.tolist()
    return [Run(*row) for row in zip(*columns, strict=True)]


def tree_spans(visible_until: Tensor) -> list[tuple[int, int]]:
    """(start, end) of every tree in the pack."""
    spans = []
    for run in find_runs(visible_until):
        if not spans or run.start == spans[-1][1]:
            spans.append((run.start, run.until))
    return spans
