"""Values, sibling statistics and advantages over a forest in Triton, as csrc/cuda/tree.cu has them.

A stable sort by parent makes child lists, and one lane sums the children of a node in their order,
in fp64. Values climb: a lane starts at every node without counted children and goes on to the
parent if it is the last of the counted siblings to arrive. Which lane that is varies, but the sums
do not. Malformed parents become roots, so every address is valid; a flag tells of them at the end.
"""

# The parameters that kernels declare as tl.constexpr are given plain Python values.
# What a jitted function returns has no type that Python knows.
# pyright: reportArgumentType=false, reportOperatorIssue=false
from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from spo_kernels.triton.configs import PER_ITEM, child_sums


@triton.jit
def parents_of(parent, node, nodes):
    """(parents, -1 where there is none, whether the forest is malformed there) of a block."""
    up = tl.load(parent + node, mask=node < nodes, other=-1)
    wrong = (up < -1) | (up >= node)
    return tl.where(wrong, -1, up), wrong


@triton.jit
def raise_flag(flag, wrong):
    """Set the flag if any lane is wrong: all who write it write 1."""
    tl.store(flag + tl.zeros_like(wrong.to(tl.int32)), 1, mask=wrong)


@triton.jit(do_not_specialize=["nodes"])
def sort_keys_kernel(parent, in_value, nodes, keys, malformed, BLOCK: tl.constexpr):
    """Key of a counted child: its parent; of other nodes: `nodes`, so that they come last."""
    node = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = node < nodes
    up, wrong = parents_of(parent, node, nodes)
    raise_flag(malformed, wrong)
    counted = (up >= 0) & (tl.load(in_value + node, mask=inside, other=0) != 0)
    tl.store(keys + node, tl.where(counted, up, nodes).to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["nodes"])
def find_children_kernel(sorted_keys, nodes, begin, end, BLOCK: tl.constexpr):
    """Range of every node's children among the sorted nodes; zero, as it came, if it has none."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(sorted_keys + i, mask=i < nodes, other=nodes)
    before = tl.load(sorted_keys + i - 1, mask=(i > 0) & (i < nodes), other=-1)
    after = tl.load(sorted_keys + i + 1, mask=i + 1 < nodes, other=-1)
    child = key < nodes
    tl.store(begin + key, i.to(tl.int32), mask=child & (key != before))
    tl.store(end + key, (i + 1).to(tl.int32), mask=child & (key != after))


@triton.jit
def sum_children(
    children,
    begin,  # (BLOCK,) range in `children`
    end,
    values,  # fp32, or fp64 that other programs write
    mean,  # (BLOCK,) fp64
    SQUARED: tl.constexpr,  # sum (value - mean)^2 instead of the value
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,  # children that are loaded at a time
):
    """Sum over the children of every lane's node, in fp64, in an order that is always the same."""
    column = tl.arange(0, WIDTH)[None, :]
    sums = tl.zeros((BLOCK,), tl.float64)
    first = begin
    while tl.max((first < end).to(tl.int32), 0) > 0:
        place = first[:, None] + column
        inside = place < end[:, None]
        child = tl.load(children + place, mask=inside, other=0)
        # From the L2 cache: an L1 line may be older than a value that another program wrote.
        value = tl.load(values + child, mask=inside, other=0.0, cache_modifier=".cg")
        value = value.to(tl.float64)
        if SQUARED:
            value = tl.where(inside, value - mean[:, None], 0.0)
            value = value * value
        sums += tl.sum(value, 1)
        first += WIDTH
    return sums


@triton.jit(do_not_specialize=["nodes"])
def climb_kernel(
    keys,  # parent of a counted child, else `nodes`
    rewards,
    nodes,
    children,
    begin,
    end,
    arrived,  # zeroed; counted children whose value is ready
    exact,  # the values in fp64
    values,
    malformed,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    node = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(begin + node, mask=node < nodes, other=0)
    last = tl.load(end + node, mask=node < nodes, other=1)
    climbs = first == last
    value = tl.load(rewards + node, mask=climbs, other=0.0).to(tl.float64)
    while tl.max(climbs.to(tl.int32), 0) > 0:  # never waits for another program
        tl.store(values + node, value.to(tl.float32), mask=climbs)
        up = tl.load(keys + node, mask=climbs, other=nodes)
        climbs = up < nodes
        tl.store(exact + node, value, mask=climbs)
        # Stores, count and loads of one node may fall to different threads of the program: the
        # barriers order them, and acq_rel carries that order to the other programs.
        tl.debug_barrier()
        earlier = tl.atomic_add(arrived + up, 1, mask=climbs, sem="acq_rel")
        tl.debug_barrier()
        first = tl.load(begin + up, mask=climbs, other=0)
        last = tl.load(end + up, mask=climbs, other=0)
        climbs = climbs & (earlier + 1 == last - first)
        node = tl.where(climbs, up.to(tl.int64), node)
        reward = tl.load(rewards + node, mask=climbs, other=float("nan"))
        raise_flag(malformed, reward == reward)
        first = tl.where(climbs, first, 0)
        last = tl.where(climbs, last, 0)
        sums = sum_children(children, first, last, exact, value, False, BLOCK, WIDTH)
        value = sums / tl.where(climbs, last - first, 1)


@triton.jit(do_not_specialize=["nodes"])
def moments_kernel(
    values,
    nodes,
    children,
    begin,
    end,
    counts,
    sums,  # fp64; None: not wanted
    variances,  # fp32 or fp64
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Two sweeps over the children, so that equal values give a variance of exactly zero."""
    node = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = node < nodes
    first = tl.load(begin + node, mask=inside, other=0)
    last = tl.load(end + node, mask=inside, other=0)
    count = last - first
    mean = tl.zeros((BLOCK,), tl.float64)
    total = sum_children(children, first, last, values, mean, False, BLOCK, WIDTH)
    divisor = tl.maximum(count, 1).to(tl.float64)
    mean = total / divisor
    squares = sum_children(children, first, last, values, mean, True, BLOCK, WIDTH)
    variance = tl.where(count > 0, squares / divisor, float("nan"))
    tl.store(counts + node, count, mask=inside)
    if sums is not None:
        tl.store(sums + node, total, mask=inside)
    tl.store(variances + node, variance.to(variances.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["nodes"])
def advantages_kernel(
    parent,
    values,
    in_value,
    nodes,
    counts,  # of the counted children, as the next two; None if neither option needs them
    sums,
    variances,
    eps,  # (1,) fp64: a scalar would be rounded to fp32
    advantages,
    malformed,
    LEAVE_ONE_OUT: tl.constexpr,
    SCALE_BY_STD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    node = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = node < nodes
    up, wrong = parents_of(parent, node, nodes)
    raise_flag(malformed, wrong)
    below = up >= 0
    value = tl.load(values + node, mask=inside, other=0.0).to(tl.float64)
    if LEAVE_ONE_OUT:
        counted = tl.load(in_value + node, mask=inside, other=1) != 0
        raise_flag(malformed, below & (counted == 0))
        others = tl.load(counts + up, mask=below, other=1) - 1
        total = tl.load(sums + up, mask=below, other=0.0)
        mean = (total - value) / tl.maximum(others, 1).to(tl.float64)
        baseline = tl.where(others > 0, mean, value)
    else:
        baseline = tl.load(values + up, mask=below, other=0.0).to(tl.float64)
    advantage = value - baseline
    if SCALE_BY_STD:
        variance = tl.load(variances + up, mask=below, other=1.0)
        advantage = advantage / (tl.sqrt(variance) + tl.load(eps))
    advantage = tl.where(below, advantage, 0.0)
    tl.store(advantages + node, advantage.to(tl.float32), mask=inside)


@dataclass(frozen=True)
class _Forest:
    """Child lists of a forest, and the flag that kernels raise if the input is malformed."""

    keys: Tensor  # (S,) int32, parent of a counted child, else S
    lists: tuple[Tensor, Tensor, Tensor]  # children (S,) int64, begin and end (S,) int32
    arrived: Tensor  # (S,) int32, zero
    malformed: Tensor  # (1,) int32; its reading is the only wait for the device


def _grid(nodes: int, constants: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(nodes, constants["BLOCK"]),)


def _forest(
    nodes: int,
    parent: Tensor,  # (S,) int32
    in_value: Tensor,  # (S,) bool
) -> _Forest:
    grid = _grid(nodes, PER_ITEM)
    zeroed = parent.new_zeros(3 * nodes + 1)
    begin, end, arrived = zeroed[:-1].view(3, nodes).unbind()
    malformed = zeroed[-1:]
    keys = torch.empty_like(parent)
    sort_keys_kernel[grid](parent, in_value, nodes, keys, malformed, **PER_ITEM)
    sorted_keys, children = torch.sort(keys, stable=True)
    find_children_kernel[grid](sorted_keys, nodes, begin, end, **PER_ITEM)
    return _Forest(keys, (children, begin, end), arrived, malformed)


def tree(
    *,
    nodes: int,
    parent: Tensor,  # (S,) int32
    rewards: Tensor,  # (S,) fp32
    in_value: Tensor,  # (S,) bool
    values: Tensor,  # (S,) fp32
) -> bool:
    """Fill values: `tree_cpu` on `TreeArgs`. False if the input is malformed."""
    if nodes == 0:
        return True
    with torch.cuda.device_of(parent):
        forest = _forest(nodes, parent, in_value)
        constants = child_sums()
        climb_kernel[_grid(nodes, constants)](
            forest.keys,
            rewards,
            nodes,
            *forest.lists,
            forest.arrived,
            torch.empty_like(rewards, dtype=torch.float64),
            values,
            forest.malformed,
            **constants,
        )
        return forest.malformed.item() == 0


def tree_stats(
    *,
    nodes: int,
    parent: Tensor,  # (S,) int32
    values: Tensor,  # (S,) fp32
    in_value: Tensor,  # (S,) bool
    counts: Tensor,  # (S,) int32
    variances: Tensor,  # (S,) fp32
) -> bool:
    """Fill counts and variances: `tree_stats_cpu`. False if the input is malformed."""
    if nodes == 0:
        return True
    with torch.cuda.device_of(parent):
        forest = _forest(nodes, parent, in_value)
        constants = child_sums()
        moments_kernel[_grid(nodes, constants)](
            values, nodes, *forest.lists, counts, None, variances, **constants
        )
        return forest.malformed.item() == 0


def tree_advantages(
    *,
    nodes: int,
    parent: Tensor,  # (S,) int32
    values: Tensor,  # (S,) fp32
    in_value: Tensor,  # (S,) bool
    leave_one_out: bool,
    scale_by_std: bool,
    eps: float,
    advantages: Tensor,  # (S,) fp32
) -> bool:
    """Fill advantages: `tree_advantages_cpu`. False if the input is malformed."""
    if nodes == 0:
        return True
    with torch.cuda.device_of(parent):
        counts = sums = variances = None
        malformed = parent.new_zeros(1)
        if leave_one_out or scale_by_std:
            forest = _forest(nodes, parent, in_value)
            malformed, constants = forest.malformed, child_sums()
            counts = torch.empty_like(parent)
            sums, variances = values.new_empty(2, nodes, dtype=torch.float64).unbind()
            moments_kernel[_grid(nodes, constants)](
                values, nodes, *forest.lists, counts, sums, variances, **constants
            )
        advantages_kernel[_grid(nodes, PER_ITEM)](
            parent,
            values,
            in_value,
            nodes,
            counts,
            sums,
            variances,
            values.new_full((1,), eps, dtype=torch.float64),
            advantages,
            malformed,
            LEAVE_ONE_OUT=leave_one_out,
            SCALE_BY_STD=scale_by_std,
            **PER_ITEM,
        )
        return malformed.item() == 0
