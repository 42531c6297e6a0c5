"""Forests of token segments: Monte-Carlo values from the leaves up, and advantages from them.

A forest is a parent index per node: parents come before children, -1 marks a root. The same
functions serve SPO-tree, SPO-chain, VinePPO, GRPO and RLOO, which differ only in the shape of the
forest (arXiv 2505.23564). Sums and divisions run in fp64 and are rounded once. Nothing here is
differentiable: results never carry a gradient. While a CUDA graph is captured, malformed forests
cannot raise: the CUDA kernels then give NaN, and counts of -1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spo_kernels.arguments import FLOATS, check_vector
from spo_kernels.dispatch import choose, launch
from spo_kernels.library import define


def tree_values_ref(
    parent: Tensor,  # (S,) int32, -1 for a root; parents come before children
    rewards: Tensor,  # (S,) fp32 | fp64, NaN where the node is not a leaf
    in_value: Tensor,  # (S,) bool
) -> Tensor:  # (S,) dtype of rewards
    """`tree_values` in PyTorch: one `index_add_` per level, deepest level first."""
    _check_parent(parent)
    up = parent.long()
    counted = in_value & (up >= 0)
    counts = torch.bincount(up[counted], minlength=up.numel())
    inner = counts > 0
    _check_rewards(rewards, inner)
    values = rewards.to(torch.float64, copy=True)
    sums = torch.zeros_like(values)
    for nodes in reversed(_levels(up)):
        means = nodes[inner[nodes]]
        values[means] = sums[means] / counts[means]
        children = nodes[counted[nodes]]
        sums.index_add_(0, up[children], values[children])
    return values.to(rewards.dtype)


def tree_stats_ref(
    parent: Tensor,  # (S,) int32, -1 for a root; parents come before children
    values: Tensor,  # (S,) fp32 | fp64
    in_value: Tensor,  # (S,) bool
) -> tuple[Tensor, Tensor]:  # counts (S,) int32, variances (S,) dtype of values
    """`tree_stats` in PyTorch."""
    _check_parent(parent)
    counts, _, variances = _child_moments(parent.long(), values.double(), in_value)
    return counts.int(), variances.to(values.dtype)


def tree_advantages_ref(
    parent: Tensor,  # (S,) int32, -1 for a root; parents come before children
    values: Tensor,  # (S,) fp32 | fp64
    in_value: Tensor,  # (S,) bool
    *,
    baseline: str = "parent",
    scale: str = "none",
    eps: float = 1e-8,
) -> Tensor:  # (S,) dtype of values
    """`tree_advantages` in PyTorch."""
    _check_parent(parent)
    up, exact = parent.long().clamp(min=0), values.double()
    base, deviation = exact[up], None
    if baseline == "loo" or scale == "std":
        counts, sums, variances = _child_moments(parent.long(), exact, in_value)
        if baseline == "loo":
            _check_counted(parent, in_value)
            others = counts[up] - 1
            base = torch.where(others > 0, (sums[up] - exact) / others, exact)
        if scale == "std":
            deviation = variances[up].sqrt()
    advantages = exact - base
    if deviation is not None:
        advantages = advantages / (deviation + eps)
    return torch.where(parent >= 0, advantages, 0.0).to(values.dtype)


def _child_moments(
    parent: Tensor,  # (S,) int64
    values: Tensor,  # (S,) fp64
    in_value: Tensor,  # (S,) bool
) -> tuple[Tensor, Tensor, Tensor]:  # counts (S,) int64, sums (S,) fp64, variances (S,) fp64
    """Count, sum and population variance of the counted children of every node."""
    children = (in_value & (parent >= 0)).nonzero().squeeze(1)
    up, child_values = parent[children], values[children]
    counts = torch.bincount(up, minlength=parent.numel())
    sums = torch.zeros_like(values).index_add_(0, up, child_values)
    # From the deviations, not from the squares: equal values must give exactly zero.
    squares = (child_values - (sums / counts)[up]).square()
    variances = torch.zeros_like(values).index_add_(0, up, squares) / counts
    return counts, sums, variances


def _levels(
    parent: Tensor,  # (S,) int64
) -> tuple[Tensor, ...]:  # node indices (int64) of every depth, roots first
    # Pointer doubling: log2(depth) rounds, where following one parent at a time takes `depth`.
    depth, ancestor = (parent >= 0).long(), parent
    while bool((ancestor >= 0).any()):
        found, step = ancestor >= 0, ancestor.clamp(min=0)
        depth = depth + torch.where(found, depth[step], 0)
        ancestor = torch.where(found, ancestor[step], -1)
    return torch.argsort(depth, stable=True).split(torch.bincount(depth).tolist())


def _check_parent(parent: Tensor) -> None:
    index = torch.arange(parent.numel(), device=parent.device)
    wrong = ((parent < -1) | (parent >= index)).nonzero().flatten().tolist()
    if wrong:
        node, found = wrong[0], int(parent[wrong[0]])
        raise ValueError(
            f"parent[{node}]: expected -1 or the index of an earlier node, found {found}"
        )


def _check_rewards(rewards: Tensor, inner: Tensor) -> None:
    wrong = (inner & ~rewards.isnan()).nonzero().flatten().tolist()
    if wrong:
        node, found = wrong[0], float(rewards[wrong[0]])
        raise ValueError(
            f"rewards[{node}]: expected NaN, as node {node} has counted children, found {found}"
        )


def _check_counted(parent: Tensor, in_value: Tensor) -> None:
    wrong = (~in_value & (parent >= 0)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"in_value[{wrong[0]}]: expected True, as baseline='loo' compares a node with its "
            "counted siblings, found False"
        )


@define("tree_values(Tensor parent, Tensor rewards, Tensor in_value, str backend) -> Tensor")
def _tree_values(parent: Tensor, rewards: Tensor, in_value: Tensor, backend: str) -> Tensor:
    if backend == "reference":
        return tree_values_ref(parent, rewards, in_value)
    parent, rewards, in_value = parent.contiguous(), rewards.contiguous(), in_value.contiguous()
    values = torch.empty_like(rewards)
    ok = launch(
        "tree",
        backend,
        "TreeArgs",
        nodes=parent.numel(),
        parent=parent,
        rewards=rewards,
        in_value=in_value,
        values=values,
    )
    if not ok:  # malformed: the reference raises the error
        return tree_values_ref(parent, rewards, in_value)
    return values


@_tree_values.register_fake
def _(parent, rewards, in_value, backend):
    return torch.empty_like(rewards, memory_format=torch.contiguous_format)


@define(
    "tree_stats(Tensor parent, Tensor values, Tensor in_value, str backend)"
    " -> (Tensor counts, Tensor variances)"
)
def _tree_stats(
    parent: Tensor, values: Tensor, in_value: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return tree_stats_ref(parent, values, in_value)
    parent, values, in_value = parent.contiguous(), values.contiguous(), in_value.contiguous()
    counts, variances = torch.empty_like(parent), torch.empty_like(values)
    ok = launch(
        "tree_stats",
        backend,
        "TreeStatsArgs",
        nodes=parent.numel(),
        parent=parent,
        values=values,
        in_value=in_value,
        counts=counts,
        variances=variances,
    )
    if not ok:  # malformed: the reference raises the error
        return tree_stats_ref(parent, values, in_value)
    return counts, variances


@_tree_stats.register_fake
def _(parent, values, in_value, backend):
    return parent.new_empty(parent.shape), values.new_empty(values.shape)


@define(
    "tree_advantages(Tensor parent, Tensor values, Tensor in_value, str baseline, str scale, "
    "float eps, str backend) -> Tensor"
)
def _tree_advantages(
    parent: Tensor,
    values: Tensor,
    in_value: Tensor,
    baseline: str,
    scale: str,
    eps: float,
    backend: str,
) -> Tensor:
    if backend == "reference":
        return tree_advantages_ref(
            parent, values, in_value, baseline=baseline, scale=scale, eps=eps
        )
    parent, values, in_value = parent.contiguous(), values.contiguous(), in_value.contiguous()
    advantages = torch.empty_like(values)
    ok = launch(
        "tree_advantages",
        backend,
        "TreeAdvantagesArgs",
        nodes=parent.numel(),
        parent=parent,
        values=values,
        in_value=in_value,
        leave_one_out=baseline == "loo",
        scale_by_std=scale == "std",
        eps=eps,
        advantages=advantages,
    )
    if not ok:  # malformed: the reference raises the error
        return tree_advantages_ref(
            parent, values, in_value, baseline=baseline, scale=scale, eps=eps
        )
    return advantages


@_tree_advantages.register_fake
def _(parent, values, in_value, baseline, scale, eps, backend):
    return values.new_empty(values.shape)


def tree_values(
    parent: Tensor,  # (S,) int32, index of the parent, -1 for a root; parents come before children
    rewards: Tensor,  # (S,) fp32 | fp64, NaN where the node is not a leaf
    in_value: Tensor,  # (S,) bool, counts towards its parent's value
    *,
    backend: str | None = None,
) -> Tensor:  # (S,) dtype of rewards
    """Monte-Carlo value of every node: a leaf's reward, else the mean of its counted children.

    Equivalent to: V[n] = mean(V[c] for c in children(n) if in_value[c]), or V[n] = rewards[n] if
    no child is counted. The mean is plain: an early leaf has the same weight as a whole subtree.

    A node with neither a reward nor a counted child is NaN. A counted child that is NaN is never
    skipped: it makes its parent NaN, and so on upwards. Raises TypeError for wrong dtypes;
    ValueError if a parent does not come before its child, or if a node has both a reward and
    counted children.
    """
    check_vector("rewards", rewards, FLOATS)
    _check_nodes(parent, in_value, rewards)
    backend = choose("tree", rewards, backend)
    return torch.ops.spo_kernels.tree_values(parent, rewards.detach(), in_value, backend)


def tree_stats(
    parent: Tensor,  # (S,) int32, -1 for a root; parents come before children
    values: Tensor,  # (S,) fp32 | fp64, of `tree_values`
    in_value: Tensor,  # (S,) bool, counts towards its parent's value
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:  # counts (S,) int32, variances (S,) dtype of values
    """Number of counted children of every node, and the population variance of their values.

    The variance is NaN where the count is 0. sqrt(variance / count) is the standard error of V[n],
    too low for few children. Raises ValueError if a parent does not come before its child.
    """
    check_vector("values", values, FLOATS)
    _check_nodes(parent, in_value, values)
    backend = choose("tree", values, backend)
    return torch.ops.spo_kernels.tree_stats(parent, values.detach(), in_value, backend)


def tree_advantages(
    parent: Tensor,  # (S,) int32, -1 for a root; parents come before children
    values: Tensor,  # (S,) fp32 | fp64, of `tree_values`
    in_value: Tensor,  # (S,) bool, counts towards its parent's value
    *,
    baseline: str = "parent",
    scale: str = "none",
    eps: float = 1e-8,
    backend: str | None = None,
) -> Tensor:  # (S,) dtype of values
    """Advantage of every node over its parent or its siblings; 0 on roots.

    baseline="parent": A[n] = values[n] - values[parent[n]], as in the paper. The parent's value is
    read from `values`, so the caller may set that of a root. baseline="loo": values[n] minus the
    mean of the other counted children of parent[n]; 0 for an only child. scale="std" divides by
    `eps` plus the population standard deviation of the counted children of parent[n]. On a star,
    "parent" with "std" is GRPO, and "loo" is RLOO.

    A NaN value makes the advantages that read it NaN, and "std" gives NaN if no sibling is counted;
    the caller must refuse them. Raises ValueError if a parent does not come before its child, or
    if "loo" finds a node below a root that is not counted itself.
    """
    check_vector("values", values, FLOATS)
    _check_nodes(parent, in_value, values)
    if baseline not in ("parent", "loo"):
        raise ValueError(f"baseline: expected 'parent' or 'loo', found {baseline!r}")
    if scale not in ("none", "std"):
        raise ValueError(f"scale: expected 'none' or 'std', found {scale!r}")
    if not eps >= 0:
        raise ValueError(f"eps: expected 0 or more, found {eps}")
    backend = choose("tree", values, backend)
    return torch.ops.spo_kernels.tree_advantages(
        parent, values.detach(), in_value, baseline, scale, eps, backend
    )


def _check_nodes(parent: Tensor, in_value: Tensor, like: Tensor) -> None:
    size = like.numel()
    check_vector("parent", parent, (torch.int32,), like=like, size=size)
    check_vector("in_value", in_value, (torch.bool,), like=like, size=size)
