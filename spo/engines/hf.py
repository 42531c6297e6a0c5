"""The embedded engine: continuous batching over any transformers causal model, no server.

A finished sequence is kept until its slot is needed. A branch that continues it prefills nothing,
and reads what it shares with its siblings in place (`slots.py`, `slot_attention.py`).
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spo.engines.agreement import check_logprobs
from spo.engines.attention_calls import AttentionCall, attention_calls
from spo.engines.draw import draw
from spo.engines.protocol import COUNTERS, check_request
from spo.engines.slot_attention import SharedSpan, reading
from spo.engines.slots import Slots
from spo.engines.stops import StopTexts, drawn_before, stop_texts
from spo.models.check import SHORT_TYPES, in_dtype
from spo.models.head import own_forward
from spo.models.load import body, load_causal, longest, text_config
from spo.records import LENGTH, STOP, Completion, Request

PREFILL_TOKENS = 8192  # maximum of one prefill forward, padding included
UNLIMITED = 1 << 20  # maximum length of a model that names none


@dataclass
class Sequence:
    """One sample while it runs."""

    request: Request
    index: int
    arrival: int
    first_version: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """Tokens that the next one depends on; all but the last must be in the cache."""
        return (*self.request.prefix_ids, *self.token_ids)

    @cached_property
    def before(self) -> tuple[int, ...]:
        """The part of the response that earlier samples drew."""
        return drawn_before(self.request)


class HFEngine:
    """Continuous batching on one device; deterministic for a given order of submissions.

    Args:
        model: folder with config.json and safetensors weights.
        dtype: of weights and cache.
        max_num_seqs: slots, the number of sequences that can run at the same time.
        max_model_len: maximum of prefix + completion; by default the model's own limit.
        num_cached: number of finished sequences whose keys and values are kept for branches.
        min_shared: branches read a common segment of at least this many tokens in place, once per
            step for all of them; None copies it to each branch.
        response_len: longest response of the run, if known, so that the first request of a prompt
            makes the slots long enough for its whole tree.
        sleep_mode: let `sleep` give the memory of keys and values to the trainer.
        trust_remote_code: run code that comes with the model folder.

    Raises ValueError with one sentence if the model cannot be loaded, if slots cannot run it, or if
    the engine's logprobs differ from those of the model's own forward.
    """

    block_size = 1  # every token of a prefix is shared, not only full blocks
    saved_names = False
    reuse_prefixes = True  # False recomputes every prefix (the baseline of the benchmark)

    def __init__(
        self,
        model: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        max_num_seqs: int = 128,
        max_model_len: int | None = None,
        num_cached: int | None = None,
        min_shared: int | None = 256,
        response_len: int = 0,
        sleep_mode: bool = False,
        trust_remote_code: bool = False,
    ):
        self.sleep_mode = sleep_mode
        self._source = (model, trust_remote_code)
        self.model = load_causal(
            model,
            dtype=dtype,
            device=device,
            trust_remote_code=trust_remote_code,
            limit=max_model_len,
        )
        self.model.requires_grad_(False)
        self._body = body(self.model)
        self._wrapped = text_config(self.model) is not self.model.config
        limit = longest(self.model) or UNLIMITED
        self.max_model_len = min(max_model_len or limit, limit)
        self.max_num_seqs, self.response_len = max_num_seqs, 0
        self.version = 0
        self.running: list[Sequence] = []
        self.waiting: list[tuple[int, int, Sequence]] = []  # heap by priority, then arrival
        self._stops: StopTexts | None = None  # made when the first request has stop texts
        try:
            with in_dtype(self.model, torch.float32) as done:
                calls = self._checked(device)
            if done and dtype in SHORT_TYPES:
                calls = self._checked(device)  # as it will run, too
        except Exception as error:  # of the model's own code, too
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            reason = kind + " ".join(str(error).split())[:300]
            raise ValueError(
                f"policy.path: engine.name=hf cannot run {model}: {reason}; engine.name=vllm may"
            ) from error
        cached = 2 * max_num_seqs if num_cached is None else num_cached
        limits = (max_num_seqs, cached, self.max_model_len)
        self._reset(Slots(calls, *limits, min_shared=min_shared, device=device))
        self.response_len = response_len

    def _checked(self, device: str) -> list[AttentionCall]:
        """The model's calls of its attention. Raises ValueError if slots cannot run them."""
        calls = attention_calls(self.model, self.max_model_len)
        self._reset(Slots(calls, 4, 8, self.max_model_len, min_shared=4, device=device))
        check_logprobs(self, HFEngine.submit, HFEngine.poll)
        return calls

    def _reset(self, slots: Slots) -> None:
        """Start from empty slots, with counters of zero."""
        self.slots = slots
        self._arrivals = 0
        self._counters: dict[str, float] = dict.fromkeys(COUNTERS, 0)

    @property
    def room(self) -> int:
        return self.max_num_seqs - len(self.running) - len(self.waiting)

    def submit(self, request: Request) -> None:
        check_request(request, self.max_model_len)
        if request.sampling.stop and self._stops is None:
            self._stops = stop_texts(*self._source)
        size = len(request.prefix_ids)
        whole = self.response_len + (size if request.prompt_size is None else request.prompt_size)
        whole = min(whole, self.max_model_len)
        self.slots.reserve(max(whole, size + request.max_new_tokens))
        for index in range(request.n):
            self._queue(Sequence(request, index, self._arrivals, self.version))
            self._arrivals += 1

    @torch.inference_mode()
    def poll(self) -> list[Completion]:
        start = time.perf_counter()
        self._admit()
        if not self.running:
            return []
        rows, slots = len(self.running), self.slots
        last = slots.tokens[np.arange(rows), slots.lens[:rows]].astype(np.int64)
        out = self._forward(
            self._body if self._wrapped else self.model,
            last[:, None],
            slots.lens[:rows, None],
            slice(0, rows),
            slots.spans(rows),
        )
        if self._wrapped:  # an image's token is a text's token here, as it is in the trainer
            out = own_forward(self.model, out)
        token_ids, logprobs = draw(
            out.logits[:, -1],
            [s.request.sampling for s in self.running],
            np.array([s.request.sampling.seed + s.index for s in self.running], dtype=np.uint64),
            np.array([len(s.token_ids) for s in self.running], dtype=np.uint64),
        )
        slots.lens[:rows] += 1
        slots.tokens[np.arange(rows), slots.lens[:rows]] = token_ids
        for sequence, token, logprob in zip(
            self.running, token_ids.tolist(), logprobs.tolist(), strict=True
        ):
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
        counters = self._counters
        counters["steps"] += 1
        for name in ("running", "generated", "forwarded"):
            counters[name] += rows
        done = self._finish()
        counters["step_seconds"] += time.perf_counter() - start
        return done

    def abort(self) -> None:
        self.running, self.waiting = [], []
        self.slots.clear()

    def sleep(self) -> None:
        """Free the cache until `load_weights`, if asked; samples in flight wait."""
        if self.sleep_mode:
            self.slots.release()

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in named_tensors:
                if name in parameters:
                    parameters[name].copy_(tensor)
                elif not (name == "lm_head.weight" and self.model.config.tie_word_embeddings):
                    raise ValueError(f"load_weights: the model has no parameter {name!r}")
        self.version = version
        for sequence in self.running:  # they go on; the new weights recompute their prefixes
            self._queue(sequence)
        self._counters["preempted"] += len(self.running)
        self.running = []
        self.slots.clear()

    def counters(self) -> dict[str, float]:
        return dict(self._counters)

    def close(self) -> None:
        self.running, self.waiting = [], []
        del self.model, self._body, self.slots

    def _queue(self, sequence: Sequence) -> None:
        heapq.heappush(self.waiting, (sequence.request.priority, sequence.arrival, sequence))

    def _forward(
        self,
        module: Any,  # the model, or what it has before its head
        token_ids: np.ndarray,  # (R, C) int64
        positions: np.ndarray,  # (R, C) int64
        rows: slice,
        spans: list[SharedSpan] | None = None,
    ) -> Any:
        """The output for tokens at positions of their rows, which read `spans` in place."""
        device = self.slots.device
        within = np.minimum(positions, self.max_model_len - 1)  # of padding, too
        with reading(self.slots.view(rows, positions, spans or [])):
            return module(
                input_ids=torch.from_numpy(token_ids).to(device),
                position_ids=torch.from_numpy(within).to(device),
                use_cache=False,
            )

    def _ended(self, sequence: Sequence) -> bool:
        """Whether its last token is a stop token or completes a stop text."""
        request = sequence.request
        if sequence.token_ids[-1] in request.sampling.stop_token_ids:
            return True
        if not request.sampling.stop or self._stops is None:
            return False
        return self._stops.completed(request.sampling.stop, sequence.token_ids, sequence.before)

    def _finish(self) -> list[Completion]:
        done = []
        for row in range(len(self.running) - 1, -1, -1):  # the last row fills a hole
            sequence = self.running[row]
            request = sequence.request
            stopped = self._ended(sequence)
            if not stopped and len(sequence.token_ids) < request.max_new_tokens:
                continue
            done.append(
                Completion(
                    key=request.key,
                    index=sequence.index,
                    token_ids=tuple(sequence.token_ids),
                    logprobs=tuple(sequence.logprobs),
                    finish=STOP if stopped else LENGTH,
                    first_version=sequence.first_version,
                    last_version=self.version,
                )
            )
            self.slots.retain(row, int(self._counters["steps"]))
            last = self.running.pop()
            self.slots.replace(row, len(self.running))
            if row < len(self.running):
                self.running[row] = last
        return done[::-1]

    def _admit(self) -> None:
        """Move waiting sequences into free slots; compute once what no slot holds yet."""
        admitted: dict[object, list[Sequence]] = {}  # by prefix, one row each
        free = self.max_num_seqs - len(self.running)
        while free and self.waiting:
            sequence = heapq.heappop(self.waiting)[2]
            if not sequence.token_ids:
                sequence.first_version = self.version
            same = sequence.prefix_ids if self.reuse_prefixes else sequence.arrival
            admitted.setdefault(same, []).append(sequence)
            free -= 1
        slots, step = self.slots, int(self._counters["steps"])
        first = len(self.running)
        missing, groups = [], [(group[0].prefix_ids, group) for group in admitted.values()]
        for prefix, group in groups:
            ids = np.array(prefix, dtype=np.int32)
            slot, shared = slots.longest_prefix(ids[:-1]) if self.reuse_prefixes else (0, 0)
            missing.append(ids.size - 1 - shared)
            slots.used[slot] = step
            slots.attach(
                len(self.running), slot, shared, share=branches(group), flat=missing[-1] > 0
            )
            slots.tokens[len(self.running), : ids.size] = ids
            self.running.append(group[0])
        self._prefill(first, [len(prefix) for prefix, _ in groups])
        for source, (prefix, group) in enumerate(groups, start=first):
            if missing[source - first] and branches(group):
                slots.share(source, step)
            for sequence in group[1:]:
                row = len(self.running)
                slots.attach(row, source, len(prefix) - 1, share=True)
                slots.tokens[row, : len(prefix)] = prefix
                self.running.append(sequence)
            computed = missing[source - first] + len(group)  # every row computes the last token
            self._counters["prefill"] += computed
            self._counters["cached"] += len(prefix) * len(group) - computed
            self._counters["forwarded"] += missing[source - first]

    def _prefill(self, first: int, sizes: list[int]) -> None:
        """Compute the missing keys and values of each prefix, its last token excepted.

        The first decode step computes the last token, so a branch of a cached parent costs nothing
        here. Padding writes beyond a row's length, where later tokens overwrite it.
        """
        slots = self.slots
        start = 0
        while start < len(sizes):
            stop, width = start, 0
            while stop < len(sizes):
                missing = sizes[stop] - 1 - int(slots.lens[first + stop])
                if stop > start and max(width, missing) * (stop + 1 - start) > PREFILL_TOKENS:
                    break
                width, stop = max(width, missing), stop + 1
            rows = slice(first + start, first + stop)
            if width:
                columns = slots.lens[rows, None] + np.arange(width)
                columns = np.minimum(columns, slots.length)
                ids = np.take_along_axis(slots.tokens[rows], columns, 1).clip(min=0)
                self._forward(self._body, ids.astype(np.int64), columns, rows)
            slots.lens[rows] = [size - 1 for size in sizes[start:stop]]
            start = stop


def branches(group: list[Sequence]) -> bool:
    """Whether several samples continue this prefix, now or when slots are free."""
    return len(group) > 1 or group[0].request.n > 1
