"""`eval`: how the policy is tested."""

from __future__ import annotations

from dataclasses import dataclass

from spo.config.ranges import Count, NotNegativeInt


@dataclass(frozen=True)
class EvalConfig:
    """Pass@1 on the task's test split."""

    every: NotNegativeInt = 10
    """Iterations between evaluations; 0 evaluates at the start and the end only."""
    problems: Count = 200
    """Test problems."""
    sampled: bool = True
    """Also draw one sample per problem at the training temperature."""
