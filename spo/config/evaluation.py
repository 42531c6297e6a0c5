"""`eval`: how the policy is tested."""

from __future__ import annotations

from dataclasses import dataclass

from spo.config.ranges import Count, NotNegativeInt


@dataclass(frozen=True)
class EvalConfig:
    """Pass@1 on the task's test split."""

    every: NotNegativeInt = 10
    """Iterations between evaluations; 0 evaluates only at the start and at the end."""
    problems: Count = 200
    """Number of test problems."""
    sampled: bool = True
    """Also draw one sample per problem at the training temperature."""
