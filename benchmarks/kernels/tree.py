"""tree_values on a million nodes, against a level loop in PyTorch.

    python -m benchmarks.kernels.tree [--device cuda] [--quick] [--json FILE] [--csv FILE]

Byte model: 4 + 4 + 1 read and 4 written, 13 bytes a node; the floor is a copy of as many bytes.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Call, Row, Shape, against_copy, check_close
from spo_kernels import tree_values

NODES = 1_000_000
BYTES = 13
OURS = "spo_kernels"


def six_six_six(num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Complete 6-6-6 trees of 259 nodes, breadth first; every node counts."""
    parent = (torch.arange(259) - 1).div(6, rounding_mode="floor")
    return _forest(parent, torch.ones(259, dtype=torch.bool), num_nodes)


def chains(num_nodes: int, depth: int = 250) -> tuple[Tensor, Tensor, Tensor]:
    """Trunks of `depth` segments, each boundary with 3 probes; the trunk does not count."""
    index = torch.arange(4 * depth + 1)  # trunk nodes are 0, 4, 8, ...
    parent = ((index - 1).div(4, rounding_mode="floor") * 4).clamp(min=-1)
    return _forest(parent, index % 4 != 0, num_nodes)


def _forest(tree: Tensor, in_value: Tensor, num_nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(parent, rewards, in_value) of at least `num_nodes` nodes: copies of one tree."""
    copies = -(-num_nodes // tree.numel())
    offsets = torch.arange(copies)[:, None] * tree.numel()
    parent = torch.where(tree >= 0, tree + offsets, -1).flatten()
    in_value = in_value.repeat(copies)
    inner = torch.zeros(parent.numel(), dtype=torch.bool)
    inner[parent[in_value & (parent >= 0)]] = True
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randint(0, 2, (parent.numel(),), generator=generator).float()
    return parent.int(), rewards.masked_fill(inner, torch.nan), in_value


SHAPES = {"6-6-6 trees": six_six_six, "chains, 250 deep, 3 probes": chains}


def find_levels(parent: Tensor) -> tuple[Tensor, ...]:
    """Node indices of every depth, roots first, by pointer doubling."""
    depth, ancestor = (parent >= 0).int(), parent.long()
    while bool((ancestor >= 0).any()):
        found, step = ancestor >= 0, ancestor.clamp(min=0)
        depth += torch.where(found, depth[step], 0)
        ancestor = torch.where(found, ancestor[step], -1)
    return torch.argsort(depth, stable=True).split(torch.bincount(depth).tolist())


def level_loop(
    parent: Tensor, rewards: Tensor, in_value: Tensor, levels: tuple[Tensor, ...] | None = None
) -> Tensor:
    """One `index_add_` a level, in fp32; the levels are found first unless they are given."""
    up = parent.long()
    sums = torch.zeros_like(rewards)
    counts = torch.zeros_like(rewards)
    counted = in_value & (parent >= 0)
    counts.index_add_(0, up.clamp(min=0), counted.float())
    values = rewards.clone()
    for nodes in reversed(find_levels(parent) if levels is None else levels):
        count = counts[nodes]
        value = torch.where(count > 0, sums[nodes] / count, rewards[nodes])
        values[nodes] = value
        keep = counted[nodes]
        sums.index_add_(0, up[nodes[keep]], value[keep])
    return values


@dataclass(frozen=True)
class Case:
    """A forest of at least `nodes` nodes."""

    shape: str
    nodes: int

    @property
    def name(self) -> str:
        return f"{self.shape}, {self.nodes:,} nodes"

    @functools.cached_property
    def forest(self) -> tuple[Tensor, Tensor, Tensor]:
        return SHAPES[self.shape](self.nodes)

    @property
    def axes(self) -> dict[str, int]:
        return {"nodes": self.forest[0].numel()}


def cases(device: str, quick: bool) -> list[Case]:
    return [Case(shape, 3000 if quick else NODES) for shape in SHAPES]


def implementations(case: Case, device: str) -> dict[str, Call]:
    """Every checked way to the nodes' values."""
    nodes = tuple(x.to(device) for x in case.forest)
    levels = find_levels(nodes[0])
    calls = {
        "PyTorch level loop": Call(lambda: level_loop(*nodes), "base"),
        "PyTorch level loop, levels given": Call(lambda: level_loop(*nodes, levels), "fair"),
        "spo_kernels, reference (fp64)": Call(
            lambda: tree_values(*nodes, backend="reference"), "rival", "spo-kernels"
        ),
        OURS: Call(lambda: tree_values(*nodes), "ours", "spo-kernels"),
    }
    parent, rewards, in_value = nodes
    check_close(calls, (tree_values(parent, rewards.double(), in_value),))
    return calls


def run(case: Case, args: argparse.Namespace) -> tuple[Shape, list[Row]]:
    calls = implementations(case, args.device)
    return against_copy("tree_values", case, BYTES * case.axes["nodes"], calls, args)


def main(argv: Sequence[str] | None = None) -> None:
    common.main(__doc__, cases, run, argv)


if __name__ == "__main__":
    main()
