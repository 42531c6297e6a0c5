"""`engine`: what samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from spo.config.ranges import Count, PositiveInt, Share


@dataclass(frozen=True)
class EngineConfig:
    """The rollout engine."""

    name: Literal["vllm", "hf"] = "vllm"
    """vllm, or hf: the embedded engine, which needs transformers alone."""
    addresses: tuple[str, ...] = ()
    """vllm: servers that sample instead of this process, http://host:port each, started as
    docs/rollout.md says."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the engine's weights and cache."""
    max_num_seqs: Count = 128
    """Sequences that run at once."""
    max_model_len: PositiveInt | None = None
    """Longest prompt + response, in tokens; the model's own limit by default."""
    memory_fraction: Share = 0.5
    """vllm on a GPU: share of the card for weights and cache; the trainer needs the rest."""
    sleep_mode: bool = False
    """vllm on a GPU: give the engine's memory to the trainer while it trains."""
    align_segments: bool = False
    """Move the segments of trees to lengths at which a branch recomputes one token only, by at most
    half a cache block (vllm; hf shares prefixes of any length)."""

    def __post_init__(self) -> None:
        if self.name == "hf" and (self.addresses or self.sleep_mode):
            raise ValueError(
                "engine.addresses and engine.sleep_mode are vLLM's, found engine.name=hf"
            )
