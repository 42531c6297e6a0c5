"""tree_values on a million nodes, against a level loop in PyTorch.

    python benchmarks/bench_tree.py [--json FILE]
    pytest benchmarks/bench_tree.py --benchmark-only

Byte model: 4 + 4 + 1 read and 4 written, 13 bytes a node.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from common import Row, measure, print_table, write_json
from torch import Tensor

from spo_kernels import tree_values
from spo_kernels.dispatch import unavailable

NODES = 1_000_000
BYTES_PER_NODE = 13
RIVAL = "PyTorch level loop"


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


def implementations(nodes: tuple[Tensor, Tensor, Tensor]) -> dict[str, Callable[[], Tensor]]:
    """Every way to the values of these nodes that can run here."""
    levels = find_levels(nodes[0])
    calls = {
        RIVAL: lambda: level_loop(*nodes),
        "PyTorch level loop, levels given": lambda: level_loop(*nodes, levels),
        "spo_kernels reference (fp64)": lambda: tree_values(*nodes, backend="reference"),
    }
    if reason := unavailable("tree", "cpu"):
        print(f"spo_kernels cpu is left out: {reason}")
    else:
        calls["spo_kernels cpu"] = lambda: tree_values(*nodes, backend="cpu")
    return calls


def check(nodes: tuple[Tensor, Tensor, Tensor], calls: dict[str, Callable[[], Tensor]]) -> None:
    """No number before every implementation agrees with fp64."""
    parent, rewards, in_value = nodes
    exact = tree_values(parent, rewards.double(), in_value)
    for name, call in calls.items():
        torch.testing.assert_close(
            call().double(), exact, rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


@functools.cache
def prepared(shape: str) -> tuple[int, dict[str, Callable[[], Tensor]]]:
    """Number of nodes and the checked implementations for one shape."""
    nodes = SHAPES[shape](NODES)
    calls = implementations(nodes)
    check(nodes, calls)
    return nodes[0].numel(), calls


def run(seconds: float) -> list[Row]:
    rows = []
    for shape in SHAPES:
        size, calls = prepared(shape)
        timings = measure(calls, seconds=seconds)
        for name, t in timings.items():
            gb_per_s = BYTES_PER_NODE * size / t.ms * 1e-6
            speedup = timings[RIVAL].ms / t.ms
            rows.append(Row("tree_values", shape, name, t.ms, t.p20, t.p80, gb_per_s, speedup))
    return rows


def pytest_generate_tests(metafunc) -> None:
    cases = [(shape, name) for shape in SHAPES for name in prepared(shape)[1]]
    metafunc.parametrize("shape, name", cases)


def test_tree_values(benchmark, shape: str, name: str) -> None:
    benchmark.group = f"tree_values, {shape}"
    benchmark(prepared(shape)[1][name])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="FILE", help="also write the rows there")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each implementation")
    args = parser.parse_args()
    rows = run(args.seconds)
    print_table(f"tree_values, {NODES:,} nodes", rows)
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
