"""What vLLM's sampler is asked for, and logprobs of the whole policy where samples truncate.

The `processed_logprobs` of vLLM (0.32) are those of the truncated distribution. The functions here
replace them by logprobs at the temperature, of which nothing is dropped.
"""

from __future__ import annotations

from typing import Any

import torch

from spo.records import Request

GREEDY = 1e-5  # vLLM takes lower temperatures for 0
CANNOT = (
    "eval.top_p, eval.top_k and eval.min_p: expected none with this version of vLLM, whose sampler "
    "gives only logprobs of the truncated distribution; engine.name=hf can truncate"
)


def parameters(request: Request, index: int) -> dict[str, Any]:
    """Fields of vLLM's `SamplingParams` for one sample of a request."""
    sampling = request.sampling
    found = {
        "temperature": sampling.temperature,
        "max_tokens": request.max_new_tokens,
        "stop_token_ids": list(sampling.stop_token_ids),
        "ignore_eos": True,  # only the request's stop tokens stop it
        "seed": sampling.seed + index,
        "logprobs": 0,  # only of the sampled token
        "detokenize": False,
    }
    if sampling.truncates:
        found |= {name: getattr(sampling, name) for name in ("top_p", "top_k", "min_p")}
    return found


def keep_policy_logprobs(worker: Any) -> bool:
    """Make a worker's sampler return the policy's logprobs; False if it has none that we know."""
    sampler: Any = getattr(worker.model_runner, "sampler", None)
    if hasattr(sampler, "spo_logprobs"):
        return True
    if hasattr(sampler, "topk_topp_sampler"):
        sample = _of_first_runner(sampler.sample)
    elif hasattr(sampler, "sampling_states"):
        sample = _of_second_runner(sampler.sample, sampler.sampling_states)
    else:
        return False
    vars(sampler).update(sample=sample, spo_logprobs=True)
    return True


def _of_first_runner(own: Any) -> Any:
    """The `sample` of the sampler in vllm/v1/sample, which may change the logits in place."""

    def sample(logits: torch.Tensor, metadata: Any, *rest: Any, **options: Any) -> Any:
        whole, heat = None, metadata.temperature
        limits = (metadata.top_k, metadata.top_p)
        others = metadata.logitsprocs.argmax_invariant
        truncates = limits != (None, None) or any(getattr(p, "min_p_count", 0) for p in others)
        if truncates and heat is not None and metadata.max_num_logprobs is not None:
            heat = torch.where(heat < GREEDY, 1.0, heat)
            whole = (logits / heat[:, None]).log_softmax(-1, dtype=torch.float32)
        token_ids, logprobs = own(logits, metadata, *rest, **options)
        return token_ids, logprobs if whole is None else whole

    return sample


def _of_second_runner(own: Any, states: Any) -> Any:
    """The `sample` of the sampler in vllm/v1/worker/gpu, whose logprobs come from its logits."""

    def sample(logits: torch.Tensor, expanded: Any, of: Any, rows: Any, *rest: Any, **options: Any):
        limits = states.get_top_k_top_p(expanded, rows)
        whole = None
        if any(limit is not None for limit in limits) or (states.min_p.np[rows] != 0).any():
            whole = logits.to(torch.float32, copy=True)
            states.apply_temperature(whole, expanded, rows)
        token_ids, processed = own(logits, expanded, of, rows, *rest, **options)
        return token_ids, processed if whole is None else whole

    return sample
