"""Forest -> values and advantages. The last file that knows the method."""

from __future__ import annotations

import torch
from torch import Tensor

from spo.config import AdvantageConfig
from spo.records import Forest
from spo_kernels import tree_advantages, tree_values

ZERO_ADVANTAGE = 1e-6  # a node trains only above this


def assign(forest: Forest, rule: AdvantageConfig) -> tuple[Tensor, Tensor]:
    """Values (S,) fp32 and advantages (S,) fp32 of every node; untrained nodes get 0.

    SPO-tree: V(node) - V(parent), plain means bottom-up. SPO-chain and VinePPO: the same, with the
    probes as the counted children and `rule.root_value` at the prompt. GRPO: baseline parent, scale
    std on a star. RLOO: baseline loo on a star.

    Raises ValueError if a trained node's advantage is not finite.
    """
    values = tree_values(forest.parent, forest.rewards, forest.in_value)
    values = _fill_roots(forest, values, rule.root_value)
    advantages = tree_advantages(
        forest.parent, values, forest.in_value, baseline=rule.baseline, scale=rule.scale
    )
    if rule.root_value == "none":
        roots = (forest.parent < 0) & values.isnan()
        first = forest.parent.clamp(min=0).long()
        advantages = torch.where((forest.parent >= 0) & roots[first], 0.0, advantages)
    advantages = torch.where(forest.trained, advantages, 0.0)
    if not advantages.isfinite().all():
        node = int((~advantages.isfinite()).nonzero()[0])
        raise ValueError(f"advantages: node {node} is trained but has no value or parent value")
    if rule.whiten == "batch":
        chosen = forest.trained & (advantages.abs() > ZERO_ADVANTAGE)
        if chosen.sum() > 1:
            std, mean = torch.std_mean(advantages[chosen], correction=0)
            advantages = torch.where(chosen, (advantages - mean) / (std + 1e-8), 0.0)
    return values, advantages


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


def summarize(forest: Forest, values: Tensor, advantages: Tensor) -> dict[str, float]:
    """Figures to report with every batch."""
    trained = forest.trained
    roots = forest.parent < 0
    seen = values[roots & values.isfinite()]
    graded = forest.rewards[forest.rewards.isfinite()]
    trajectories = int((forest.is_leaf & trained).sum())
    return {
        "value_n": float(seen.numel()),
        "value_mean": float(seen.mean()),
        "value_stderr": float(seen.std(correction=0) / max(seen.numel(), 1) ** 0.5),
        "reward_mean": float(graded.mean()),
        "zero_advantage_share": float((advantages[trained].abs() <= ZERO_ADVANTAGE).float().mean()),
        "mean_abs_advantage": float(advantages[trained].abs().mean()),
        "segments_per_trajectory": float(trained.sum()) / max(trajectories, 1),
    }
