"""The learning rate over a run: transformers' schedules, of the share of the run that is done."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from spo.config.train import TrainConfig

STEPS = 1 << 20  # of a whole run, to transformers' functions


def share_done(train: TrainConfig, iterations: int, generated_tokens: int) -> float:
    """Share of the run that is done, by the limit that is nearer: 0 to 1."""
    done = iterations / train.iterations
    if train.max_generated_tokens is not None:
        done = max(done, generated_tokens / train.max_generated_tokens)
    return min(done, 1.0)


def rate(train: TrainConfig, start: float, end: float) -> float:
    """Share of the peak rate, for an optimiser step from `start` to `end`, shares of the run.

    Rising, it is that of the step's end, so that the first step is not lost; then of its start.
    """
    if start < train.warmup_share:
        return min(end / train.warmup_share, 1.0)
    return _schedule(train.decay, train.warmup_share, train.min_lr_rate)(round(start * STEPS))


@cache
def _schedule(decay: str, warmup_share: float, min_lr_rate: float) -> Callable[[int], float]:
    """Step -> share of the peak rate."""
    schedule = get_scheduler(
        "constant_with_warmup" if decay == "constant" else decay,
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=round(warmup_share * STEPS),
        num_training_steps=STEPS,
        scheduler_specific_kwargs={"min_lr_rate": min_lr_rate} if min_lr_rate else None,
    )
    assert isinstance(schedule, LambdaLR)
    return schedule.lr_lambdas[0]
