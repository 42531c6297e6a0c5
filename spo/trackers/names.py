"""The names of figures in trackers: those of TRL 1.16 where the meaning is the same.

docs/metrics.md explains each of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

STEP = "train/global_step"
"""The iteration, where a tracker wants its x axis among the figures."""

TRL = {  # key in metrics.jsonl -> name
    "reward_mean": "reward",
    "reward_std": "reward_std",
    "same_reward_share": "frac_reward_zero_std",
    "response_tokens_mean": "completions/mean_length",
    "response_tokens_min": "completions/min_length",
    "response_tokens_max": "completions/max_length",
    "truncated_share": "completions/clipped_ratio",
    "loss": "loss",
    "clipfrac": "clip_ratio/region_mean",
    "entropy": "entropy",
    "kl": "kl",
    "grad_norm": "grad_norm",
    "lr": "learning_rate",
    "time_iteration": "step_time",
}


def trl_name(key: str, stage: str) -> str:
    """The name of a figure: of an evaluation `eval_…`, else TRL's, else `spo/…`."""
    if stage == "eval":
        return f"eval_{key.replace('/', '_')}"
    if key in TRL:
        return TRL[key]
    if key.startswith("reward_"):
        return f"rewards/{key.removeprefix('reward_')}/mean"
    return f"spo/{key}"


def figures(line: Mapping[str, Any]) -> dict[str, float]:
    """Name -> value, of the finite numbers of a metrics line. The iteration is no figure."""
    return {
        trl_name(key, line["stage"]): float(value)
        for key, value in line.items()
        if key != "iteration" and not isinstance(value, str) and math.isfinite(value)
    }


def in_sections(figures: Mapping[str, float]) -> dict[str, float]:
    """The same under `eval/` or `train/`, as the Trainer of transformers renames what it sends to
    TensorBoard, Weights & Biases and Trackio."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in figures.items()
    }
