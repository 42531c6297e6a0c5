"""`train`: the loop and its optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spo.config.ranges import (
    Count,
    NotNegative,
    NotNegativeInt,
    Positive,
    PositiveInt,
    Seed,
    Share,
)


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    iterations: PositiveInt = 100
    """Rollouts, each followed by training."""
    max_generated_tokens: PositiveInt | None = None
    """Stop after the iteration in which this many tokens have been generated."""
    prompts: Count = 16
    """Prompts per iteration."""
    stream_depth: NotNegativeInt = 0
    """Admit prompts of this many iterations ahead whenever the engine has empty places, so that it
    stays full while the last responses of this one run. Tokens are then up to this many weight
    versions old, and two runs with one seed need not be equal."""
    epochs: Count = 1
    """Passes over an iteration's nodes."""
    restart: bool = False
    """Train every iteration from the start policy anew, while its rollouts come from the policy
    that the last iteration made (RestEM)."""
    minibatches: Count = 4
    """Optimiser steps per epoch; prompts are dealt out among them."""
    tokens_per_batch: PositiveInt = 8192
    """Most packed tokens of one forward."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: ddp keeps whole weights on every rank, fsdp shards them (FSDP2)."""
    learning_rate: Positive = 1e-6
    """Peak learning rate of AdamW."""
    warmup_share: Share = 0.03
    """Share of the optimiser steps over which the rate rises linearly."""
    decay: Literal["linear", "constant"] = "linear"
    """What the rate does after the warm-up."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled decay."""
    max_grad_norm: Positive = 1.0
    """Gradients are scaled down to this norm."""
    replay_nodes: NotNegativeInt = 0
    """Most nodes per prompt that train in an iteration, older ones included; 0 trains every node
    at once and keeps none."""
    replay_samples: PositiveInt | None = None
    """Most nodes that train in an iteration, of all prompts together; the others stay in the
    buffer."""
    replay_age: PositiveInt = 8
    """Nodes of this many iterations ago are dropped from the buffer."""
    max_skipped: NotNegativeInt = 3
    """Stop after this many steps in a row whose loss or gradient is not finite."""
    probe_tolerance: NotNegative = 0.05
    """Largest difference between the trainer's and the engine's logprobs of a fixed prompt after a
    weight update; above it the run stops."""
    checkpoint_every: PositiveInt = 1
    """Iterations between checkpoints."""
    seed: Seed = 0
    """Of prompts, sampling and the order of training."""

    def __post_init__(self) -> None:
        if self.restart and self.parallel == "fsdp":
            raise ValueError("train.restart works with train.parallel=ddp, not with fsdp")
        if self.replay_samples is not None and not self.replay_nodes:
            raise ValueError(
                "train.replay_samples needs train.replay_nodes, which is 0: nothing is kept"
            )
