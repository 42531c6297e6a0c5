"""What a `vllm serve` process adds for this package: `--worker-extension-cls` with `EXTENSION`.

vLLM's HTTP interface can only call methods of its workers, by name. These load the weights that a
trainer writes, and count what vLLM's own metrics leave out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load_file

from spo.engines.protocol import COUNTERS
from spo.engines.vllm import count_step, limit_vocabulary, repack_cpu_linears
from spo.engines.vllm_sampler import keep_policy_logprobs

EXTENSION = "spo.engines.served.Served"


class Served:
    """Mixed into vLLM's worker. All names begin with `spo_`: vLLM refuses names that it has."""

    vllm_config: Any  # these four are the worker's
    device: torch.device
    get_model: Callable
    reload_weights: Callable
    execute_model: Callable

    def spo_settings(self) -> dict:
        """How this process was started. From the first call on, its steps are counted."""
        if not hasattr(self, "_spo_totals"):
            self._spo_totals: dict[str, float] = dict.fromkeys(COUNTERS, 0)
            self.execute_model = self._spo_counted(self.execute_model)
        config = self.vllm_config
        return {
            "device": self.device.type,
            "dtype": str(config.model_config.dtype).removeprefix("torch."),
            "max_model_len": config.model_config.max_model_len,
            "max_num_seqs": config.scheduler_config.max_num_seqs,
            "block_size": config.cache_config.block_size,
            "flags": {
                "--scheduling-policy": config.scheduler_config.policy,
                "--logprobs-mode": config.model_config.logprobs_mode,
                "--enable-prefix-caching": config.cache_config.enable_prefix_caching,
                "--enable-chunked-prefill": config.scheduler_config.enable_chunked_prefill,
            },
        }

    def spo_load_weights(self, path: str) -> None:
        """Replace the weights in place by those of a safetensors file."""
        self.reload_weights(weights_iterator=iter(load_file(path).items()))
        if self.device.type == "cpu":
            repack_cpu_linears(self.get_model())

    def spo_limit_vocabulary(self, size: int | None) -> None:
        """Never sample the ids from `size` on; None: every id may be sampled."""
        limit_vocabulary(self.get_model(), size)

    def spo_keep_policy_logprobs(self) -> bool:
        """Return the policy's logprobs also of samples that truncate; False if vLLM cannot."""
        return keep_policy_logprobs(self)

    def spo_counters(self) -> dict[str, float]:
        return dict(self._spo_totals)

    def _spo_counted(self, execute_model):
        totals = self._spo_totals

        def counted(step):
            if step.total_num_scheduled_tokens:
                totals["steps"] += 1
                totals["cached"] += sum(new.num_computed_tokens for new in step.scheduled_new_reqs)
                count_step(totals, step)
            return execute_model(step)

        return counted
