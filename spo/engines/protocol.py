"""The interface of every rollout engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from spo.records import Completion, Request

COUNTERS = (
    "steps",
    "running",  # samples in a step, summed over steps
    "generated",  # tokens of finished samples (vllm) or of steps (hf)
    "prefill",  # prefix tokens computed, the last token of every prefix included
    "cached",  # prefix tokens taken from the cache
    "forwarded",  # tokens through the model
    "preempted",  # samples put back into the queue and recomputed later
    "step_seconds",  # inside the engine's steps
)


class Engine(Protocol):
    """What the rollout loop needs of an engine. Token ids go in and come out, never text."""

    @property
    def max_model_len(self) -> int:
        """Maximum of prefix + completion, in tokens."""
        ...

    @property
    def block_size(self) -> int:
        """Tokens per cache block; prefixes are shared in whole blocks."""
        ...

    @property
    def version(self) -> int:
        """Version of the weights."""
        ...

    @property
    def saved_names(self) -> bool:
        """Whether `load_weights` takes the names and shapes of a checkpoint's files, or those of
        transformers' model in memory, which joins the experts of a mixture.
        """
        ...

    @property
    def room(self) -> int:
        """Free slots: the number of samples that could start now; negative if some wait."""
        ...

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ValueError if it cannot fit `max_model_len`."""
        ...

    def poll(self) -> list[Completion]:
        """Advance by one step and return the samples that finished in it."""
        ...

    def abort(self) -> None:
        """Drop every sample that waits or runs."""
        ...

    def sleep(self) -> None:
        """Give memory to the trainer until `load_weights`, if the engine can."""
        ...

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights in place and forget every cached prefix.

        Samples in flight go on: their prefixes are computed again, and each token keeps the logprob
        that it was sampled with.
        """
        ...

    def counters(self) -> dict[str, float]:
        """Totals since the engine was made, by the names in `COUNTERS`."""
        ...

    def close(self) -> None:
        """Free the engine's memory."""
        ...


def check_request(request: Request, max_model_len: int) -> None:
    """Raise ValueError if `request` is malformed or cannot fit the context."""
    if not request.prefix_ids:
        raise ValueError("request: expected a prefix of at least one token id, found none")
    if request.n < 1 or request.max_new_tokens < 1:
        raise ValueError(
            "request: expected n and max_new_tokens of at least 1, found "
            f"n={request.n}, max_new_tokens={request.max_new_tokens}"
        )
    total = len(request.prefix_ids) + request.max_new_tokens
    if total > max_model_len:
        raise ValueError(
            f"request: prefix of {len(request.prefix_ids)} + {request.max_new_tokens} new tokens "
            f"= {total} exceeds the context of {max_model_len}"
        )


def check_vocabulary(size: int | None, present: int | None, running: int) -> None:
    """Raise ValueError if `running` samples with another `Sampling.vocab_size` are in flight."""
    if running:
        raise ValueError(
            f"request: expected vocab_size={present}, that of the {running} samples in flight, "
            f"found {size}"
        )
