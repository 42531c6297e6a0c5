"""vLLM driven in this process, one step at a time, so that a branch starts in the step after its
parent's segment ends. Prefix caching does the sharing; the weights are replaced in place.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor

from spo.engines import check_request
from spo.records import LENGTH, STOP, Completion, Request

QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # step() in this process: no hop between two steps
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class VLLMEngine:
    """An `LLMEngine` with token ids in and out.

    Args:
        model: folder with config.json and safetensors weights.
        dtype: of weights and cache.
        max_num_seqs: sequences that run at once.
        max_model_len: longest prefix + completion; the model's own limit by default.
        block_size: tokens per cache block; only full blocks are shared. A multiple of 32 on CPU.
        kv_cache_bytes: size of the KV cache; on CPU 1 GiB by default, on a GPU
            `memory_fraction` of the card when None.
        memory_fraction: share of the card for weights and cache when `kv_cache_bytes` is None.
        reuse_prefixes: False recomputes every prefix (the baseline of the benchmark).
        seed: of vLLM itself; every request carries a seed of its own.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        max_num_seqs: int = 128,
        max_model_len: int | None = None,
        block_size: int | None = None,
        kv_cache_bytes: int | None = None,
        memory_fraction: float = 0.5,
        reuse_prefixes: bool = True,
        seed: int = 0,
    ):
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        set_num_threads = torch.set_num_threads
        try:
            from vllm import EngineArgs, LLMEngine, SamplingParams
            from vllm.sampling_params import RequestOutputKind
        except ImportError as error:
            raise ValueError(f"engine.name: 'vllm' cannot be imported here ({error})") from error
        self._on_cpu = on_cpu = device == "cpu"
        self.block_size = block_size or (32 if on_cpu else 16)
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=model,
                skip_tokenizer_init=True,
                dtype=str(dtype).removeprefix("torch."),
                block_size=self.block_size,
                enforce_eager=on_cpu,
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                enable_prefix_caching=True,
                # vLLM rewinds a seeded request's generator after a partial prefill, which CPU
                # generators cannot do (0.32: "CPU Generator does not use offset").
                enable_chunked_prefill=not on_cpu,
                kv_cache_memory_bytes=kv_cache_bytes or (1 << 30 if on_cpu else None),
                gpu_memory_utilization=memory_fraction,
                logprobs_mode="processed_logprobs",  # at the sampling temperature
                scheduling_policy="priority",
                disable_log_stats=True,
                seed=seed,
            )
        )
        torch.set_num_threads = set_num_threads  # vLLM on CPU replaces it for the whole process
        self.max_model_len = self.engine.model_config.max_model_len
        self.reuse_prefixes = reuse_prefixes
        self.version = 0
        self._params = (SamplingParams, RequestOutputKind.FINAL_ONLY)
        self._requests: dict[str, tuple[Request, int, int]] = {}
        self._serial = 0
        self._counters = dict.fromkeys(("steps", "running", "generated", "prefill", "cached"), 0)

    def submit(self, request: Request) -> None:
        check_request(request, self.max_model_len)
        sampling_params, final_only = self._params
        for index in range(request.n):
            name = str(self._serial)
            self._serial += 1
            params = sampling_params(
                temperature=request.temperature,
                max_tokens=request.max_new_tokens,
                stop_token_ids=list(request.stop_token_ids),
                seed=request.seed + index,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=final_only,
                skip_reading_prefix_cache=not self.reuse_prefixes,
            )
            prompt = {"prompt_token_ids": list(request.prefix_ids)}
            self.engine.add_request(name, prompt, params, priority=request.priority)
            self._requests[name] = (request, index, self.version)

    def poll(self) -> list[Completion]:
        if not self._requests:
            return []
        outputs = self.engine.step()
        scheduler = self.engine.engine_core.engine_core.scheduler
        self._counters["steps"] += 1
        self._counters["running"] += len(scheduler.running) + len(outputs)
        return [self._completion(output) for output in outputs if output.finished]

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self._requests:
            raise ValueError(
                f"load_weights: {len(self._requests)} samples are in flight; poll until none is"
            )
        weights = {"weights_iterator": iter(named_tensors)}
        self.engine.collective_rpc("reload_weights", kwargs=weights)
        if self._on_cpu:
            self.engine.apply_model(repack_cpu_linears)
        self.reset_prefix_cache()
        self.version = version

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; RuntimeError if vLLM did not, as while requests run."""
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM refused to reset its prefix cache: requests are running")

    def counters(self) -> dict[str, float]:
        return dict(self._counters)

    def close(self) -> None:
        self.engine.engine_core.shutdown()
        del self.engine

    def _completion(self, output) -> Completion:
        request, index, first_version = self._requests.pop(output.request_id)
        sample = output.outputs[0]
        token_ids = tuple(sample.token_ids)
        cached = output.num_cached_tokens or 0
        self._counters["generated"] += len(token_ids)
        self._counters["cached"] += cached
        self._counters["prefill"] += len(request.prefix_ids) - cached
        error = None
        if sample.finish_reason not in ("stop", "length"):
            error = f"vLLM ended the request with {sample.finish_reason!r}"
        return Completion(
            key=request.key,
            index=index,
            token_ids=() if error else token_ids,
            logprobs=() if error else tuple(sample.logprobs.logprobs),
            finish=STOP if sample.finish_reason == "stop" else LENGTH,
            first_version=first_version,
            last_version=self.version,
            error=error,
        )


def repack_cpu_linears(model: torch.nn.Module) -> None:
    """Point oneDNN at the weights that stay.

    A reload packs a tied embedding while it lies in a temporary tensor; where oneDNN keeps fp32
    weights unpacked (AVX2), the head then reads freed memory (vLLM 0.32: wrong by nats, no error).
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for layer in model.modules():
        if hasattr(layer, "cpu_linear") and layer.weight.numel() > 0:
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
