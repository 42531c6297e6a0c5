"""Forest -> values and advantages. The last file that knows the method."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from spo.config.recipe import AdvantageConfig
from spo.records import Forest
from spo_kernels import tree_advantages, tree_stats, tree_values

ZERO_ADVANTAGE = 1e-6  # a node trains only above this


def assign(forest: Forest, rule: AdvantageConfig) -> tuple[Tensor, Tensor]:
    """Values (S,) fp32 and advantages (S,) fp32 of every node; untrained nodes get 0.

    SPO-tree: V(node) - V(parent), plain means bottom-up. SPO-chain and VinePPO: the same, with the
    probes as the counted children and `rule.root_value` at the prompt. GRPO: baseline parent, scale
    std on a star. RLOO: baseline loo on a star.

    `rule.node_weight` path multiplies a node's advantage by the share of its path, which weighs its
    tokens alike: the loss is linear in the size of an advantage. Z counts tokens as before.

    RestEM and DPO: `keep_correct` and `mark_pairs`. PPO: spo.learn.critic replaces these.

    Raises ValueError if a trained node's advantage is not finite.
    """
    values = tree_values(forest.parent, forest.rewards, forest.in_value)
    values = _fill_roots(forest, values, rule.root_value)
    # A node that was left out (a failed grading) has no part in any group of siblings.
    parent = torch.where(forest.in_value | forest.trained, forest.parent, -1)
    advantages = tree_advantages(
        parent, values, forest.in_value, baseline=rule.baseline, scale=rule.scale
    )
    # A chain's prompt without a value: its first segments do not train, all others do.
    above = forest.parent.clamp(min=0).long()
    unknown = (forest.parent[above] < 0) & values[above].isnan() & values.isfinite()
    advantages = torch.where(forest.trained & ~unknown, advantages, 0.0)
    if not advantages.isfinite().all():
        node = int((~advantages.isfinite()).nonzero()[0])
        raise ValueError(f"advantages: node {node} is trained but has no value or parent value")
    if rule.estimator == "correct":
        return values, keep_correct(forest, rule.max_correct)
    if rule.estimator == "pairs":
        return values, mark_pairs(forest)
    if rule.whiten == "batch":
        advantages = whiten(advantages, forest.trained & (advantages.abs() > ZERO_ADVANTAGE))
    if rule.node_weight == "path":
        advantages = advantages * _path_weights(forest, values)
    return values, advantages


def whiten(advantages: Tensor, chosen: Tensor) -> Tensor:
    """Those chosen with mean 0 and deviation 1, the others 0; one alone stays as it is."""
    if chosen.sum() < 2:
        return advantages
    std, mean = torch.std_mean(advantages[chosen], correction=0)
    return torch.where(chosen, (advantages - mean) / (std + 1e-8), 0.0)


def keep_correct(forest: Forest, most: int) -> Tensor:
    """(S,) fp32, 1 on the first `most` right responses of every prompt (RestEM)."""
    right, _ = _answers(forest)
    kept = torch.zeros(forest.num_nodes)
    kept[right[_rank_in_group(forest.prompt[right]) < most]] = 1.0
    return kept


def mark_pairs(forest: Forest) -> Tensor:
    """(S,) fp32, 1 on right and -1 on wrong responses, equally many of each under a prompt (DPO).

    The first of both, so that every response stands in one pair at most.
    """
    marks = torch.zeros(forest.num_nodes)
    answers = _answers(forest)
    counts = [torch.bincount(forest.prompt[a], minlength=len(forest.prompts)) for a in answers]
    pairs = torch.minimum(*counts)
    for nodes, mark in zip(answers, (1.0, -1.0), strict=True):
        trees = forest.prompt[nodes]
        marks[nodes[_rank_in_group(trees) < pairs[trees.long()]]] = mark
    return marks


def _answers(forest: Forest) -> tuple[Tensor, Tensor]:
    """Trained leaves that earned a reward, and those that did not."""
    graded = forest.trained & forest.is_leaf & forest.rewards.isfinite()
    return tuple(
        torch.nonzero(graded & earned)[:, 0] for earned in (forest.rewards > 0, forest.rewards <= 0)
    )


def _rank_in_group(groups: Tensor) -> Tensor:
    """Place of every entry among those of its group; `groups` is sorted."""
    counts = groups.unique_consecutive(return_counts=True)[1]
    return torch.arange(groups.numel()) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def _fill_roots(forest: Forest, values: Tensor, root_value: str) -> Tensor:
    """Values with those roots filled that have no counted child (chains)."""
    if root_value != "group":
        return values
    ends = forest.is_leaf & forest.trained & forest.rewards.isfinite()
    weight = torch.where(ends, forest.weight, 0).double()
    trees = forest.prompt.long()
    count = torch.zeros(len(forest.prompts), dtype=torch.float64)
    total = count.clone()
    count.index_add_(0, trees, weight)
    total.index_add_(0, trees, weight * forest.rewards.nan_to_num().double())
    group = (total / count).float()  # NaN where no trajectory survived
    return torch.where((forest.parent < 0) & values.isnan(), group[trees], values)


def _path_weights(forest: Forest, values: Tensor) -> Tensor:
    """(S,) fp32, product over the path from the root of 1 / number of siblings (itself included).

    So weighted, the nodes of a level are a sample of the policy's own states: each counts as often
    as the policy comes by it, however many branches were grown there.
    """
    parent = forest.parent.long()
    counts, _ = tree_stats(forest.parent, values, forest.in_value)
    share = torch.where(parent >= 0, 1 / counts[parent.clamp(min=0)].clamp(min=1), 1.0)
    weights = share
    for found, ancestor in _ancestors(parent):
        weights = torch.where(found, weights * share[ancestor], weights)
    return weights


def _ancestors(parent: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For every node its parent, then its parent's parent, …: (whether there is one, which)."""
    ancestor = parent
    while bool((found := ancestor >= 0).any()):
        step = ancestor.clamp(min=0)
        yield found, step
        ancestor = torch.where(found, parent[step], -1)


def summarize(forest: Forest, values: Tensor, advantages: Tensor) -> dict[str, float]:
    """Figures to report with every batch; `advantages` are (S,), or (T,) per token."""
    trained = forest.trained
    if advantages.numel() != forest.num_nodes:
        trained = trained.repeat_interleave(forest.cu_tokens.diff())
    roots = forest.parent < 0
    seen = values[roots & values.isfinite()]
    graded = forest.rewards[forest.rewards.isfinite()]
    segments = forest.trained.long()
    for found, ancestor in _ancestors(forest.parent.long()):
        segments = segments + torch.where(found, forest.trained[ancestor], False)
    trajectories = torch.where(forest.is_leaf & forest.trained, forest.weight, 0)
    return {
        "value_n": float(seen.numel()),
        "value_mean": float(seen.mean()),
        "value_stderr": float(seen.std(correction=0) / max(seen.numel(), 1) ** 0.5),
        "reward_mean": float(graded.mean()),
        "zero_advantage_share": float((advantages[trained].abs() <= ZERO_ADVANTAGE).float().mean()),
        "mean_abs_advantage": float(advantages[trained].abs().mean()),
        "segments_per_trajectory": float((segments * trajectories).sum())
        / max(float(trajectories.sum()), 1),
    }
