"""`engine`: the rollout engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spo.config.ranges import Count, PositiveInt, Share


@dataclass(frozen=True)
class EngineConfig:
    """The rollout engine."""

    name: Literal["vllm", "hf"] = "vllm"
    """vllm, or hf: the embedded engine, which needs only transformers."""
    addresses: tuple[str, ...] = ()
    """vllm: servers that sample instead of this process, each http://host:port; docs/rollout.md
    says how to start them."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the engine's weights and cache."""
    max_num_seqs: Count = 128
    """Slots: the number of samples that can run at the same time."""
    max_model_len: PositiveInt | None = None
    """Maximum length of prompt + response, in tokens; by default the model's own limit."""
    memory_fraction: Share = 0.5
    """vllm on a GPU: share of its memory for weights and cache; the trainer needs the rest."""
    sleep_mode: bool = False
    """vllm on a GPU: give the engine's memory to the trainer while it trains."""
    align_segments: bool = False
    """Change the lengths of a tree's segments by at most half a cache block, so that a branch
    recomputes only one token (vllm; hf shares prefixes of any length)."""

    def __post_init__(self) -> None:
        if self.name == "hf" and (self.addresses or self.sleep_mode):
            raise ValueError(
                "engine.addresses and engine.sleep_mode: expected engine.name=vllm, found hf"
            )
