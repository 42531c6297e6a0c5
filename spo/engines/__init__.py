"""Rollout engines: the embedded one (`hf`, transformers alone) and vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from spo.records import Completion, Request

ENGINES = ("vllm", "hf")


class Engine(Protocol):
    """What the rollout loop needs. Token ids go in and come out; text never does."""

    max_model_len: int  # longest prefix + completion, in tokens

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it cannot fit `max_model_len`."""

    def poll(self) -> list[Completion]:
        """Advance by one step and return the samples that finished in it."""

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights in place and forget every cached prefix."""

    def counters(self) -> dict[str, float]:
        """Totals: steps, running (summed over steps), generated, prefill and cached tokens."""

    def close(self) -> None:
        """Free the engine's memory."""


def make_engine(name: str, model: str, **options) -> Engine:
    """Build the engine called `name` for the model folder `model`.

    Raises ValueError for an unknown name, or where vLLM is asked for and not installed.
    """
    if name == "hf":
        from spo.engines.hf import HFEngine

        return HFEngine(model, **options)
    if name == "vllm":
        from spo.engines.vllm import VLLMEngine

        return VLLMEngine(model, **options)
    raise ValueError(f"engine.name: expected one of {', '.join(ENGINES)}, found {name!r}")


def check_request(request: Request, max_model_len: int) -> None:
    """Raise ValueError if `request` is malformed or cannot fit the context."""
    if not request.prefix_ids:
        raise ValueError("request: the prefix is empty, expected at least one token id")
    if request.n < 1 or request.max_new_tokens < 1:
        raise ValueError(
            "request: n and max_new_tokens must be at least 1, found "
            f"n={request.n}, max_new_tokens={request.max_new_tokens}"
        )
    total = len(request.prefix_ids) + request.max_new_tokens
    if total > max_model_len:
        raise ValueError(
            f"request: prefix of {len(request.prefix_ids)} + {request.max_new_tokens} new tokens "
            f"= {total} exceeds the context of {max_model_len}"
        )
