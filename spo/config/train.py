"""`train`: the loop and its optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spo.config.policy import PolicyConfig
from spo.config.ranges import (
    Count,
    NotNegative,
    NotNegativeInt,
    Positive,
    PositiveInt,
    Seed,
    Share,
)

Schedule = Literal["linear", "cosine", "cosine_with_min_lr", "constant", "constant_with_warmup"]


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    iterations: PositiveInt = 100
    """Rollouts, each followed by training."""
    max_generated_tokens: PositiveInt | None = None
    """Stop after the iteration that reaches this number of generated tokens, those of dropped
    prompts included."""
    prompts: Count = 16
    """Prompts per iteration."""
    stream_depth: NotNegativeInt = 0
    """Admit prompts of this many later iterations whenever the engine has a free slot, so that it
    stays full while an iteration's last responses run. Tokens are then up to this many weight
    versions old, and two runs with one seed may differ."""
    refill: PositiveInt | None = None
    """Replace trees of zero variance, in which no two rewards differ, by trees of further prompts,
    until `prompts` trees vary: DAPO's dynamic sampling. No more replacements begin once those of
    the iteration have generated this number of tokens."""
    epochs: Count = 1
    """Passes over an iteration's nodes."""
    restart: bool = False
    """Start every iteration's training from the start policy again; its rollouts come from the
    policy that the previous iteration trained (RestEM)."""
    minibatches: Count = 4
    """Optimiser steps per epoch, at most one per prompt; the prompts are split among them."""
    tokens_per_batch: PositiveInt = 8192
    """Maximum number of packed tokens in one forward; a longer path is one of its own."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: ddp keeps the whole weights on every rank, fsdp shards them (FSDP2)."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """adamw_8bit keeps AdamW's two moments in blocks of 8-bit numbers (bitsandbytes): about 2 bytes
    per weight in place of 8."""
    master_weights: Literal["fp32", "stochastic", "none"] = "fp32"
    """What keeps small steps of weights in policy.dtype=bfloat16, which have three digits. fp32:
    the optimiser holds the other 16 bits of float32 weights, for 2 bytes per weight, and float32
    moments. stochastic: steps are rounded up or down at random, right in the mean. none: they are
    rounded to nearest, and most of them change nothing. These two have bfloat16 moments, half as
    large. docs/precision.md compares them."""
    offload: tuple[Literal["optimizer", "reference"], ...] = ()
    """What waits in the host's memory while it is not used, with policy.device=cuda: the state of
    the optimisers, the reference's weights. The results are the same bits."""
    learning_rate: Positive = 1e-6
    """Peak learning rate of AdamW."""
    warmup_share: Share = 0.03
    """Share of the run over which the rate rises linearly."""
    decay: Schedule = "linear"
    """The learning rate after the warm-up, as transformers names it; linear and cosine end at 0.
    The run ends at `iterations` or at `max_generated_tokens`, whichever is nearer. constant is
    constant_with_warmup."""
    min_lr_rate: Share = 0.0
    """cosine_with_min_lr: share of the peak rate that it ends at."""
    weight_decay: NotNegative = 0.0
    """AdamW's decoupled decay."""
    max_grad_norm: Positive = 1.0
    """Maximum gradient norm; larger gradients are scaled down to it."""
    replay_nodes: NotNegativeInt = 0
    """Maximum number of nodes per prompt that train in an iteration, older ones included. 0 trains
    every node at once and keeps none."""
    replay_samples: PositiveInt | None = None
    """Maximum number of nodes that train in an iteration, over all prompts; the others stay in the
    buffer."""
    replay_age: PositiveInt = 8
    """Nodes that an iteration received this many iterations ago are dropped from the buffer; the
    metric `replay_dropped` counts those that never trained. 1 keeps none."""
    reference_every: NotNegativeInt = 0
    """Iterations after which the policy as it is then becomes the reference; 0 keeps the start
    policy."""
    max_skipped: NotNegativeInt = 3
    """Stop after this many steps in a row whose loss or gradient is not finite, and after this many
    iterations in a row from which no response has a reward; 0 is as 1."""
    probe_tolerance: NotNegative = 0.05
    """Maximum difference between the trainer's and the engine's logprobs of a fixed prompt after a
    weight update; the run stops if it is exceeded."""
    checkpoint_every: PositiveInt = 1
    """Iterations between checkpoints."""
    keep_checkpoints: Count = 1
    """Keep so many of the newest checkpoints."""
    keep_best: str | None = None
    """A figure of the evaluations, such as `greedy` or `aime/sampled`: keep the policy that has the
    highest, in the folder `best`. Of equal ones the earlier is kept."""
    seed: Seed = 0
    """Seed of prompts, sampling and the order of training."""

    def __post_init__(self) -> None:
        if (self.decay == "cosine_with_min_lr") != (self.min_lr_rate > 0):
            raise ValueError(
                "train.min_lr_rate: expected a share above 0 with train.decay=cosine_with_min_lr, "
                f"and 0 with any other, found {self.min_lr_rate:g} with {self.decay}"
            )
        if self.restart and self.parallel == "fsdp":
            raise ValueError("train.restart: expected train.parallel=ddp, found fsdp")
        if self.replay_samples is not None and not self.replay_nodes:
            raise ValueError("train.replay_samples: expected train.replay_nodes above 0, found 0")
        if self.parallel == "fsdp" and (self.offload or self.optimizer == "adamw_8bit"):
            found = f"offload={list(self.offload)}" if self.offload else "optimizer=adamw_8bit"
            raise ValueError(
                f"train.{found}: expected train.parallel=ddp, found fsdp, which shards the "
                "optimiser's state and the reference already"
            )

    def check(self, policy: PolicyConfig) -> None:
        """Raise ValueError if the policy's settings contradict these."""
        if self.parallel == "fsdp" and policy.compile:
            raise ValueError("policy.compile: expected false with train.parallel=fsdp, found true")
        if self.master_weights != "fp32" and policy.dtype == "float32":
            raise ValueError(
                "train.master_weights: expected fp32 with policy.dtype=float32, whose weights need "
                f"no masters, found {self.master_weights}"
            )
        if self.offload and policy.device.startswith("cpu"):
            raise ValueError(
                "train.offload: expected [] with policy.device=cpu, where all is in the host's "
                f"memory, found {list(self.offload)}"
            )
