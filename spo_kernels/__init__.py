"""Fused kernels for policy optimisation: probability-masked PPO losses, logprobs, trees, GAE."""

from spo_kernels.dispatch import backends

__all__ = [
    "backends",
]
