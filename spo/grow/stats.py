"""What a rollout cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class RolloutStats:
    """What a rollout cost. `engine` holds the engine's own counters, for this rollout only."""

    seconds: float = 0.0  # spent in `Rollout`; the caller's own time is not included
    idle_seconds: float = 0.0  # of these, only waiting for the grader
    trees: int = 0
    dropped_prompts: int = 0
    too_long: int = 0  # prompts left out, as a response may not fit the context
    generated_tokens: int = 0  # those of dropped prompts included
    retried: int = 0
    truncated: int = 0
    invalid_gradings: int = 0
    untried_gradings: int = 0  # of these, answers of a form that had hung before
    invalid_reasons: Counter[str] = field(default_factory=Counter)
    gradings: int = 0
    parts: dict[int, list[float]] = field(default_factory=dict)
    """Term of the reward -> sum of what it says, and how often it applied."""
    judged: list[float] = field(default_factory=list)  # rewards where `success` says what is right
    prefill_bound: int = 0  # prefix tokens that a cache without eviction must still compute
    max_age: int = 0  # weight versions since the forest's oldest token was sampled
    mean_age: float = 0.0  # mean over its tokens
    engine: dict[str, float] = field(default_factory=dict)

    @property
    def prompts(self) -> int:
        """Prompts taken, those that were dropped or left out included."""
        return self.trees + self.dropped_prompts + self.too_long

    @property
    def recomputed(self) -> float:
        """Prefix tokens computed again: after an eviction, a preemption or a weight update."""
        return self.engine["prefill"] - self.prefill_bound

    @property
    def loop_seconds(self) -> float:
        """Time of the loop itself, outside the engine's steps and the wait for the grader."""
        return self.seconds - self.idle_seconds - self.engine["step_seconds"]
