"""`sampling`: how training samples are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spo.config.ranges import NotNegativeInt, Positive, PositiveInt, Share


@dataclass(frozen=True)
class SamplingConfig:
    """How training samples are drawn."""

    temperature: Positive = 1.0
    """Temperature of sampling and of every logprob in the loss."""
    top_p: float = 1.0
    """Only 1 is allowed: a truncated distribution biases the ratio by the mass it drops."""
    top_k: int = 0
    """Only 0 (off) is allowed, for the same reason."""
    min_p: float = 0.0
    """Only 0 (off) is allowed, for the same reason."""
    max_new_tokens: PositiveInt = 64
    """Maximum length of a response, in tokens."""
    stop_token_ids: tuple[NotNegativeInt, ...] = ()
    """Ids that end a response, besides the tokenizer's end token and those that the model's
    generation_config.json names."""
    stop: tuple[str, ...] = ()
    """Texts that end a response, such as "</answer>". The token that completes one is the last of
    the response, so its text keeps the stop text."""
    stages: tuple[tuple[Share, PositiveInt], ...] = ()
    """Shorter limits at first, for a context that grows: (share of the run, tokens) pairs. Until
    that share of `train.iterations` or `train.max_generated_tokens` is done, responses have at most
    that many tokens. Prompts that `train.stream_depth` admits early keep the limit of then."""
    truncated: Literal["zero", "drop", "penalty", "reward"] = "zero"
    """What a response cut by the limit earns. zero: 0. penalty: -1. drop: it is left out (of a
    chain only the segment that was cut, because probes value the others). reward: what the recipe's
    `reward` says, one of whose functions asks for `truncated`."""

    def __post_init__(self) -> None:
        for name, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)):
            if (found := getattr(self, name)) != off:
                raise ValueError(
                    f"sampling.{name}: expected {off} for training, as a truncated distribution "
                    f"biases the ratio, found {found:g}; eval.{name} truncates in evaluations"
                )
        if "" in self.stop:
            raise ValueError(f"sampling.stop: expected texts, found an empty one in {self.stop}")
        starts = [0.0, *(share for share, _ in self.stages), 1.0]
        tokens = [0, *(tokens for _, tokens in self.stages), self.max_new_tokens + 1]
        if any(a >= b for row in (starts, tokens) for a, b in zip(row, row[1:], strict=False)):
            raise ValueError(
                "sampling.stages: expected shares between 0 and 1 and limits up to "
                f"max_new_tokens={self.max_new_tokens}, both rising, found {self.stages}"
            )
