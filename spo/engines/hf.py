"""The embedded engine: continuous batching over any transformers causal model, no server.

Every sequence owns a slot of one preallocated KV cache; running sequences stand in the first slots
so that a decode step reads plain views. A finished sequence is kept in a slot of its own until the
space is needed: a branch that continues it copies those keys and values and prefills nothing.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from spo.engines import check_request
from spo.records import LENGTH, STOP, Completion, Request

PREFILL_TOKENS = 8192  # most padded tokens of one prefill forward


@dataclass
class SlotView:
    """Where this forward writes its keys and values, and what each query may read."""

    kv: Tensor  # (layers, 2, slots, kv_heads, max_len + 1, head_dim)
    rows: slice  # the slots of this batch
    positions: Tensor  # (R, C) int64, cache position of every token of the batch
    length: int  # keys beyond this are nobody's
    mask: Tensor  # (R, 1, C, length) bool, True where the key may be read


def slot_attention(module, query, key, value, attention_mask, scaling, slots: SlotView, **_):
    """Attention of a batch against its slots; plugged in through transformers' interface.

    query (R, H, C, hd); key and value (R, KVH, C, hd) are written to the cache first.
    """
    cache = slots.kv[module.layer_idx][:, slots.rows]
    rows = torch.arange(query.shape[0], device=query.device)[:, None]
    cache[0][rows, :, slots.positions] = key.transpose(1, 2)
    cache[1][rows, :, slots.positions] = value.transpose(1, 2)
    keys, values = cache[:, :, :, : slots.length]
    out = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=slots.mask, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


AttentionInterface.register("spo_slots", slot_attention)


@dataclass
class Sequence:
    """One sample while it runs."""

    request: Request
    index: int
    first_version: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


class HFEngine:
    """Continuous batching on one device; deterministic for a given order of submissions.

    Args:
        model: folder with config.json and safetensors weights.
        dtype: of weights and cache.
        max_num_seqs: sequences that run at once.
        max_model_len: longest prefix + completion; the model's own limit by default.
        num_cached: finished sequences whose keys and values are kept for branches.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        max_num_seqs: int = 128,
        max_model_len: int | None = None,
        num_cached: int | None = None,
    ):
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype, attn_implementation="spo_slots", local_files_only=True
        )
        self.model.to(device).eval().requires_grad_(False)
        config = self.model.config
        window = getattr(config, "sliding_window", None)
        if window and "sliding_attention" in (getattr(config, "layer_types", None) or ()):
            raise ValueError(f"model: sliding-window layers ({window}) are not supported by 'hf'")
        limit = config.max_position_embeddings
        self.max_model_len = min(max_model_len or limit, limit)
        self.max_num_seqs = max_num_seqs
        self.version = 0
        slots = max_num_seqs + (2 * max_num_seqs if num_cached is None else num_cached)
        heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, slots, heads, self.max_model_len + 1, head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.tokens = np.full((slots, self.max_model_len + 1), -1, dtype=np.int32)
        self.lens = np.zeros(slots, dtype=np.int64)  # tokens of the slot with keys and values
        self.used = np.zeros(slots, dtype=np.int64)  # step of last use, for eviction
        self.running: list[Sequence] = []
        self.waiting: list[tuple[int, int, Sequence]] = []  # heap by priority, then arrival
        self._arrivals = 0
        self._counters = dict.fromkeys(("steps", "running", "generated", "prefill", "cached"), 0)

    def submit(self, request: Request) -> None:
        check_request(request, self.max_model_len)
        for index in range(request.n):
            sequence = Sequence(request, index, self.version)
            heapq.heappush(self.waiting, (request.priority, self._arrivals, sequence))
            self._arrivals += 1

    @torch.inference_mode()
    def poll(self) -> list[Completion]:
        self._admit()
        if not self.running:
            return []
        rows = len(self.running)
        positions = torch.from_numpy(self.lens[:rows, None].copy())
        last = self.tokens[np.arange(rows), self.lens[:rows]].astype(np.int64)
        hidden = self._forward(torch.from_numpy(last[:, None]), positions, slice(0, rows))
        token_ids, logprobs = self._sample(self.model.get_output_embeddings()(hidden[:, -1]))
        self.lens[:rows] += 1
        self.tokens[np.arange(rows), self.lens[:rows]] = token_ids
        self._counters["steps"] += 1
        self._counters["running"] += rows
        self._counters["generated"] += rows
        for sequence, token, logprob in zip(
            self.running, token_ids.tolist(), logprobs.tolist(), strict=True
        ):
            sequence.token_ids.append(token)
            sequence.logprobs.append(logprob)
        return self._finish()

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in named_tensors:
                if name in parameters:
                    parameters[name].copy_(tensor)
                elif not (name == "lm_head.weight" and self.model.config.tie_word_embeddings):
                    raise ValueError(f"load_weights: the model has no parameter {name!r}")
        self.version = version
        rows = len(self.running)  # these keep their keys and values, of the older version
        self.lens[rows:] = 0
        self.used[:] = 0  # so that slots, and with them rounding, do not depend on the past

    def counters(self) -> dict[str, float]:
        return dict(self._counters)

    def close(self) -> None:
        self.running, self.waiting = [], []
        del self.model, self.kv

    def _forward(self, token_ids: Tensor, positions: Tensor, rows: slice) -> Tensor:
        """Hidden states (R, C, D) of `token_ids` (R, C) at cache `positions` (R, C)."""
        device = self.kv.device
        length = int(positions.max()) + 1
        positions = positions.to(device)
        mask = torch.arange(length, device=device) <= positions[:, None, :, None]
        view = SlotView(self.kv, rows, positions, length, mask)
        out = self.model.base_model(
            input_ids=token_ids.to(device), position_ids=positions, use_cache=False, slots=view
        )
        return out.last_hidden_state

    def _sample(self, logits: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """One token per running row by inverse CDF; its noise depends on (seed, depth) alone."""
        requests = [s.request for s in self.running]
        temperature = np.array([r.temperature for r in requests])
        divisor = np.where(temperature > 0, temperature, 1.0).astype(np.float32)
        logits = logits.float() / torch.from_numpy(divisor).to(logits.device)[:, None]
        logprobs = torch.log_softmax(logits, -1)
        seeds = np.array([s.request.seed + s.index for s in self.running], dtype=np.uint64)
        depth = np.array([len(s.token_ids) for s in self.running], dtype=np.uint64)
        noise = torch.from_numpy(uniform(seeds, depth)).to(logits.device)
        cdf = logprobs.double().exp().cumsum(-1)
        drawn = torch.searchsorted(cdf, noise[:, None] * cdf[:, -1:], right=True)[:, 0]
        drawn = drawn.clamp(max=logits.shape[-1] - 1)
        greedy = torch.from_numpy(temperature <= 0).to(logits.device)
        token_ids = torch.where(greedy, logits.argmax(-1), drawn)
        chosen = logprobs.gather(-1, token_ids[:, None])[:, 0]
        return token_ids.cpu().numpy(), chosen.cpu().numpy()

    def _finish(self) -> list[Completion]:
        done = []
        for row in range(len(self.running) - 1, -1, -1):  # the last row fills a hole
            sequence = self.running[row]
            request = sequence.request
            stopped = sequence.token_ids[-1] in request.stop_token_ids
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
            self._retain(row)
            last = len(self.running) - 1
            if row != last:
                self._copy(last, row, int(self.lens[last]))
                self.tokens[row] = self.tokens[last]
                self.running[row] = self.running[last]
            self.running.pop()
            self.lens[last] = 0
        return done[::-1]

    def _retain(self, row: int) -> None:
        """Keep a finished sequence where the least recently used one was."""
        cached = self.used[self.max_num_seqs :]
        if cached.size == 0:
            return
        slot = self.max_num_seqs + int(cached.argmin())
        self._copy(row, slot, int(self.lens[row]))
        self.tokens[slot] = self.tokens[row]
        self.used[slot] = self._counters["steps"]

    def _copy(self, source: int, target: int, length: int) -> None:
        self.kv[:, :, target, :, :length] = self.kv[:, :, source, :, :length]
        self.lens[target] = length

    def _longest_prefix(self, prefix: np.ndarray) -> tuple[int, int]:
        """Slot that holds the most leading tokens of `prefix`, and how many."""
        if prefix.size == 0:
            return 0, 0
        same = self.tokens[:, : prefix.size] == prefix
        shared = np.where(same.all(1), prefix.size, same.argmin(1))
        shared = np.minimum(shared, self.lens)
        slot = int(shared.argmax())
        return slot, int(shared[slot])

    def _admit(self) -> None:
        """Move waiting sequences into free slots; compute what no slot holds yet, once."""
        admitted: dict[tuple[int, ...], list[Sequence]] = {}
        room = self.max_num_seqs - len(self.running)
        while room and self.waiting:
            sequence = heapq.heappop(self.waiting)[2]
            sequence.first_version = self.version
            admitted.setdefault(sequence.request.prefix_ids, []).append(sequence)
            room -= 1
        if not admitted:
            return
        found = []
        for prefix, group in admitted.items():
            ids = np.array(prefix, dtype=np.int32)
            slot, shared = self._longest_prefix(ids[:-1])
            found.append((ids, group, slot, shared))
            self.used[slot] = self._counters["steps"]
        first = len(self.running)
        for ids, group, slot, shared in found:  # one row per distinct prefix
            row = len(self.running)
            self._copy(slot, row, shared)
            self.tokens[row, : ids.size] = ids
            self.running.append(group[0])
        self._prefill(first, [ids for ids, *_ in found])
        for source, (ids, group, _, shared) in enumerate(found, start=first):
            self._counters["prefill"] += ids.size - 1 - shared
            self._counters["cached"] += shared + (len(group) - 1) * (ids.size - 1)
            for sequence in group[1:]:
                row = len(self.running)
                self._copy(source, row, ids.size - 1)
                self.tokens[row, : ids.size] = ids
                self.running.append(sequence)

    def _prefill(self, first: int, prefixes: list[np.ndarray]) -> None:
        """Compute keys and values of all but the last token of each prefix, from its slot's length.

        The last token is fed by the first decode step, so a branch whose parent is cached costs
        nothing here. Padding writes beyond a row's length, where later tokens overwrite it.
        """
        start = 0
        while start < len(prefixes):
            stop, width = start, 0
            while stop < len(prefixes):
                missing = prefixes[stop].size - 1 - int(self.lens[first + stop])
                if stop > start and max(width, missing) * (stop + 1 - start) > PREFILL_TOKENS:
                    break
                width, stop = max(width, missing), stop + 1
            rows = slice(first + start, first + stop)
            if width:
                columns = self.lens[rows, None] + np.arange(width)
                columns = np.minimum(columns, self.max_model_len)
                ids = np.take_along_axis(self.tokens[rows], columns, 1).clip(min=0)
                self._forward(
                    torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(columns), rows
                )
            self.lens[rows] = [p.size - 1 for p in prefixes[start:stop]]
            start = stop


def uniform(seed: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Uniform [0, 1) noise (R,) fp64 from two (R,) uint64 counters: the splitmix64 finaliser."""
    with np.errstate(over="ignore"):
        x = seed * np.uint64(0x9E3779B97F4A7C15) + counter * np.uint64(0xD1B54A32D192ED03)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
