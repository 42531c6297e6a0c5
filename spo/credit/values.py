"""Differences of Monte-Carlo values: SPO-tree, SPO-chain, VinePPO, GRPO and RLOO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from spo.config.credit import Models, Rule
from spo.config.shape import ShapeConfig
from spo.credit.nodes import ZERO_CREDIT, ancestors, figures, of_tokens, whiten
from spo.records import Credit, Forest
from spo_kernels import tree_advantages, tree_stats, tree_values


@dataclass(frozen=True)
class Values(Rule):
    """V(node) - V(parent), with plain means from the leaves up; the same for all tokens of a node.

    SPO-tree, SPO-chain and VinePPO: the defaults (in chains the probes are the counted children).
    GRPO: scale std on a star. RLOO: baseline loo on a star.
    """

    replayable: ClassVar[bool] = True
    compares: ClassVar[bool] = True

    baseline: Literal["parent", "loo"] = "parent"
    """parent: V(node) - V(parent). loo: V(node) minus the mean of the other siblings (trees and
    stars)."""
    scale: Literal["none", "std"] = "none"
    """std: divide by the siblings' population standard deviation + 1e-8 (trees and stars)."""
    root_value: Literal["group", "none"] = "group"
    """Value of a prompt without probes (chains). group: the mean reward of its responses. none: no
    value; the first segment then has advantage 0."""
    node_weight: Literal["token", "path"] = "token"
    """token: all tokens have the same weight, so a tree's last level outweighs the first. path: a
    node's advantage is divided by the numbers of siblings along its path (trees and stars)."""
    whiten: Literal["off", "batch"] = "off"
    """batch: shift and scale the trained nodes' advantages to mean 0 and standard deviation 1."""

    def check(self, shape: ShapeConfig) -> None:
        for key, value in (("baseline", "loo"), ("scale", "std"), ("node_weight", "path")):
            if getattr(self, key) == value and not shape.siblings:
                raise ValueError(
                    f"credit.{key}={value}: expected a tree or a star, as it compares siblings of "
                    "one kind, found a chain"
                )

    def assign(self, forest: Forest, models: Models | None = None) -> Credit:
        values = self.values(forest)
        advantages = self.advantages(forest, values)
        reported = figures(forest, values, advantages[forest.trained])
        return Credit(of_tokens(forest, advantages), reported)

    def values(self, forest: Forest) -> Tensor:
        """(S,) fp32, the value of every node; NaN if it has none."""
        values = tree_values(forest.parent, forest.rewards, forest.in_value)
        return _fill_roots(forest, values) if self.root_value == "group" else values

    def advantages(self, forest: Forest, values: Tensor) -> Tensor:
        """(S,) fp32, the advantage of every node; 0 if it is not trained.

        `node_weight` path multiplies a node's advantage by the weight of its path. This weights the
        node's tokens, because the loss is linear in the advantage. Z counts tokens as before.
        Raises ValueError if a trained node's advantage is not finite.
        """
        # A node that was left out (a failed grading) belongs to no group of siblings.
        parent = torch.where(forest.in_value | forest.trained, forest.parent, -1)
        advantages = tree_advantages(
            parent, values, forest.in_value, baseline=self.baseline, scale=self.scale
        )
        # A chain's prompt without a value: its first segments do not train, all others do.
        above = forest.parent.clamp(min=0).long()
        unknown = (forest.parent[above] < 0) & values[above].isnan() & values.isfinite()
        advantages = torch.where(forest.trained & ~unknown, advantages, 0.0)
        if not advantages.isfinite().all():
            node = int((~advantages.isfinite()).nonzero()[0])
            raise ValueError(
                f"advantages: expected a value, trained node {node} or its parent has no value"
            )
        if self.whiten == "batch":
            advantages = whiten(advantages, forest.trained & (advantages.abs() > ZERO_CREDIT))
        if self.node_weight == "path":
            advantages = advantages * _path_weights(forest, values)
        return advantages


def _fill_roots(forest: Forest, values: Tensor) -> Tensor:
    """Values, with the mean reward of the trained responses on roots without a value (chains)."""
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

    With these weights a level is a sample of the policy's own states: each node counts as often as
    the policy visits it, however many branches were grown there.
    """
    parent = forest.parent.long()
    counts, _ = tree_stats(forest.parent, values, forest.in_value)
    share = torch.where(parent >= 0, 1 / counts[parent.clamp(min=0)].clamp(min=1), 1.0)
    weights = share
    for exists, ancestor in ancestors(parent):
        weights = torch.where(exists, weights * share[ancestor], weights)
    return weights
