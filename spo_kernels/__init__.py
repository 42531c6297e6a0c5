"""Fused kernels for policy optimisation: probability-masked PPO losses, logprobs, trees, GAE."""

from importlib import metadata as _metadata

from spo_kernels.dispatch import backends
from spo_kernels.extras import TokenExtras
from spo_kernels.fused_policy_loss import FusedPolicyLoss
from spo_kernels.gae import gae
from spo_kernels.head_weight import head_weight
from spo_kernels.linear_logprobs import linear_token_logprobs
from spo_kernels.linear_policy_loss import linear_masked_ppo_loss
from spo_kernels.logprobs import token_logprobs
from spo_kernels.memory import empty_cache
from spo_kernels.objective import PolicyLoss, policy_mask, policy_objective
from spo_kernels.policy_loss import masked_ppo_loss
from spo_kernels.segments import cutpoint_segments, segment_advantages
from spo_kernels.tree import tree_advantages, tree_stats, tree_values

try:
    __version__ = _metadata.version("spo-kernels")
except _metadata.PackageNotFoundError:
    __version__ = "unknown: spo-kernels is not installed as a distribution"

__all__ = [
    "FusedPolicyLoss",
    "PolicyLoss",
    "TokenExtras",
    "__version__",
    "backends",
    "cutpoint_segments",
    "empty_cache",
    "gae",
    "head_weight",
    "linear_masked_ppo_loss",
    "linear_token_logprobs",
    "masked_ppo_loss",
    "policy_mask",
    "policy_objective",
    "segment_advantages",
    "token_logprobs",
    "tree_advantages",
    "tree_stats",
    "tree_values",
]
