"""`engine`: the rollout engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from spo.config.ranges import Count, PositiveInt, Share

TAKEN = {  # arguments of vLLM that the engine gives itself -> the setting they follow, if any
    "model": "policy.path",
    "dtype": "engine.dtype",
    "max_num_seqs": "engine.max_num_seqs",
    "max_model_len": "engine.max_model_len",
    "gpu_memory_utilization": "engine.memory_fraction",
    "enable_sleep_mode": "engine.sleep_mode",
    "block_size": "",
    "enable_chunked_prefill": "",
    "enable_prefix_caching": "",
    "logprobs_mode": "",
    "scheduling_policy": "",
    "seed": "",
    "skip_tokenizer_init": "",
    "disable_log_stats": "",
    "use_tqdm_on_load": "",
}


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
    """Give the engine's memory to the trainer while it trains, and the trainer's back before the
    rollout. vllm on a GPU: weights and cache; hf: the cache."""
    align_segments: bool = False
    """Change the lengths of a tree's segments by at most half a cache block, so that a branch
    recomputes only one token (vllm; hf shares prefixes of any length)."""
    options: dict[str, Any] = field(default_factory=dict)
    """vllm in this process: further arguments of its `EngineArgs`, such as `tensor_parallel_size`,
    `quantization` and `max_num_batched_tokens`."""

    def __post_init__(self) -> None:
        for name in self.options:
            if name in TAKEN:
                by = f"{TAKEN[name]} sets it" if TAKEN[name] else "samples and logprobs rely on it"
                raise ValueError(f"engine.options.{name}: expected no such option, as {by}")
        if self.options and (self.name == "hf" or self.addresses):
            found = "engine.addresses" if self.addresses else "hf"
            where = ", whose servers have flags of their own" if self.addresses else ""
            raise ValueError(
                f"engine.options: expected engine.name=vllm in this process, found {found}{where}"
            )
        if self.name == "hf" and self.addresses:
            raise ValueError("engine.addresses: expected engine.name=vllm, found hf")
