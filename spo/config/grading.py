"""`grading`: the processes that say what responses are worth."""

from __future__ import annotations

from dataclasses import dataclass

from spo.config.ranges import Count


@dataclass(frozen=True)
class GradingConfig:
    """Processes that can be killed; docs/graders.md describes them."""

    workers: Count | None = None
    """How many of them, on each rank; by default one for each of its cores, from 2 to 8."""
