"""Fused kernels for policy optimisation: probability-masked PPO losses, logprobs, trees, GAE."""

from spo_kernels.dispatch import backends
from spo_kernels.gae import gae
from spo_kernels.segments import cutpoint_segments, segment_advantages
from spo_kernels.tree import tree_advantages, tree_stats, tree_values

__all__ = [
    "backends",
    "cutpoint_segments",
    "gae",
    "segment_advantages",
    "tree_advantages",
    "tree_stats",
    "tree_values",
]
