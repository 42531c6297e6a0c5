"""Key-value slots of the embedded engine: which slot holds what, and which sequences read it.

A slot stores the keys and values of a sequence from position `base` on. The positions before `base`
are in other slots, which the slot's chain of spans lists. The first slots hold the running rows, so
that a decode step reads plain views. The slots after them hold finished sequences. A slot that
others read is pinned, so leaves are forgotten before the segments that they continue.

Memory grows with what is asked for, up to the limits: the slots' length when a longer request
comes, the number of finished sequences when all slots hold one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spo.engines.attention_calls import AttentionCall, MaskFunction
from spo.engines.slot_attention import SharedSpan, SlotView, Visible
from spo.models.memory import free_bytes, gigabytes, release_caches, zeros

LENGTH, CACHED = 64, 16  # tokens of a slot, and number of slots for finished sequences, at first
SPARE = 3  # more such slots are made only where so many times their memory is free: the trainer
# needs some, and so do longer slots later


@dataclass(frozen=True)
class Span:
    """Positions start:stop of a sequence, at indices 0:stop - start of a cached slot."""

    slot: int
    start: int
    stop: int


class Slots:
    """Keys and values of `rows` running sequences and of up to `cached` finished ones.

    Args:
        calls: what the model's attention is called with, in the order of a forward.
        max_len: maximum length of a sequence, in tokens.
        min_shared: branches read a segment of at least this many tokens in place; a shorter one is
            copied to each branch. None always copies.
    """

    def __init__(
        self,
        calls: Sequence[AttentionCall],
        rows: int,
        cached: int,
        max_len: int,
        *,
        min_shared: int | None,
        device: str,
    ):
        self.rows, self.min_shared, self.device = rows, min_shared, torch.device(device)
        self.limit = rows + cached  # maximum number of slots
        self.max_len = max_len
        self.shapes = [shape for call in calls for shape in (call.key, call.value)]
        self.patterns = list(dict.fromkeys(call.pattern for call in calls))
        self._pattern_of = [self.patterns.index(call.pattern) for call in calls]
        # One tensor for each shape of keys or values, so that most models copy a slot at once.
        self.kv: list[Tensor] = []  # (planes, slots, KVH, length + 1, hd)
        self.tokens = np.full((0, 0), -1, dtype=np.int32)  # (slots, length + 1), whole sequences
        # of each slot:
        self.lens = np.zeros(0, dtype=np.int64)  # tokens with keys and values, from position 0
        self.base = np.zeros(0, dtype=np.int64)  # first position that the slot itself holds
        self.used = np.zeros(0, dtype=np.int64)  # step of last use, for eviction
        self.pins = np.zeros(0, dtype=np.int64)  # number of chains that list the slot
        self.chains: list[tuple[Span, ...]] = []  # positions 0:base
        self._plan: list[SharedSpan] | None = None
        self.released = 0  # tokens of a slot, while the memory is given back
        self.reserve(min(LENGTH, max_len))

    @property
    def length(self) -> int:
        """Tokens that a slot can hold now."""
        return self.tokens.shape[1] - 1

    def reserve(self, length: int) -> None:
        """Make room for sequences of `length` tokens. Raises ValueError if the memory lacks."""
        if length <= self.length:
            return
        count = len(self.chains) or min(self.rows + CACHED, self.limit)
        roomy = min(self.length * 5 // 4, self.max_len)  # so that it grows a few times only
        needed, free = self._bytes(count, length), free_bytes(self.device)
        if needed > free:
            raise ValueError(
                f"engine.max_num_seqs: {count} slots for {length} tokens need {gigabytes(needed)} "
                f"of memory, and {gigabytes(free)} are free; lower engine.max_num_seqs (now "
                f"{self.rows}), engine.max_model_len or sampling.max_new_tokens"
            )
        fits = self._bytes(count, roomy) <= free
        self._resize(count, max(length, roomy) if fits else length)

    def _bytes(self, count: int, length: int) -> int:
        token = sum(heads * width * dtype.itemsize for heads, width, dtype in self.shapes)
        return count * (length + 1) * token

    def _resize(self, count: int, length: int) -> None:
        """Allocate `count` slots of `length` tokens and keep what is cached."""
        more = count - len(self.chains)
        held = (self.lens - self.base).tolist()
        self.calls: list[tuple[Tensor, Tensor]] = []  # so that each old tensor goes before the next
        planes: dict[int, Tensor] = {}  # each key and value tensor, by its place in `shapes`
        for group, shape in enumerate(dict.fromkeys(self.shapes)):
            heads, width, dtype = shape
            members = [i for i, other in enumerate(self.shapes) if other == shape]
            size = (len(members), count, heads, length + 1, width)
            new = zeros(size, dtype, self.device)
            if group < len(self.kv):
                for slot, n in enumerate(held):
                    new[:, slot, :, :n] = self.kv[group][:, slot, :, :n]
                self.kv[group] = new
            else:
                self.kv.append(new)
            planes |= dict(zip(members, new, strict=True))
        self.calls = [(planes[i], planes[i + 1]) for i in range(0, len(self.shapes), 2)]
        wider = ((0, more), (0, length + 1 - self.tokens.shape[1]))
        self.tokens = np.pad(self.tokens, wider, constant_values=-1)
        for name in ("lens", "base", "used", "pins"):
            setattr(self, name, np.pad(getattr(self, name), (0, more)))
        self.chains += [()] * more

    def longest_prefix(self, ids: np.ndarray) -> tuple[int, int]:
        """The slot with the longest common prefix with `ids`, and the length of that prefix."""
        if ids.size == 0:
            return 0, 0
        same = self.tokens[:, : ids.size] == ids
        shared = np.where(same.all(1), ids.size, same.argmin(1))
        shared = np.minimum(shared, self.lens)
        slot = int(shared.argmax())
        return slot, int(shared[slot])

    def attach(self, row: int, source: int, length: int, *, share: bool, flat: bool = False):
        """Let `row` continue the first `length` tokens of `source`.

        `source`'s own tokens are read in place if `share` is set and it is a finished sequence of
        at least `min_shared` tokens; else they are copied. `flat` copies everything, for a prefill.
        """
        pieces = [s for s in self.chains[source] if s.start < length]
        pieces = [Span(s.slot, s.start, min(s.stop, length)) for s in pieces]
        base = int(self.base[source])
        own = Span(source, base, length)
        if length > base:
            pieces.append(own)
        keep = 0 if flat else len(pieces) - (length > base and not self._in_place(own, share))
        self._link(row, tuple(pieces[:keep]))
        start = pieces[keep - 1].stop if keep else 0
        for piece in pieces[keep:]:
            size = piece.stop - piece.start
            at = piece.start - start
            for kv in self.kv:
                kv[:, row, :, at : at + size] = kv[:, piece.slot, :, :size]
        self.base[row], self.lens[row] = start, length

    def share(self, row: int, step: int) -> None:
        """Move the tokens of `row` to a cached slot, for others to read in place."""
        held = Span(row, int(self.base[row]), int(self.lens[row]))
        if self.min_shared is None or held.stop - held.start < self.min_shared:
            return
        slot = self.retain(row, step)
        if slot is not None:
            self._link(row, (*self.chains[row], Span(slot, held.start, held.stop)))
            self.base[row] = held.stop

    def retain(self, row: int, step: int) -> int | None:
        """Keep a sequence in the least recently used free slot; None if all slots are pinned."""
        free = self.rows + np.flatnonzero(self.pins[self.rows :] == 0)
        new = len(self.chains)
        if self.used[free].min(initial=1) > 0 and self._add_cached():
            free = np.array([new])  # never used, so the least recently used one
        if free.size == 0:
            return None
        slot = int(free[self.used[free].argmin()])
        self._move(row, slot)
        self.used[slot] = step
        return slot

    def replace(self, row: int, last: int) -> None:
        """Move the last running row into the slot of a finished one."""
        if row != last:
            self._move(last, row)
        self._link(last, ())
        self.base[last] = self.lens[last] = 0

    def release(self) -> None:
        """Forget all sequences and give the memory back, until `clear` takes it again."""
        self.released = max(self.released, self.length)
        self.kv, self.calls, self.chains, self._plan = [], [], [], None
        self.tokens = self.tokens[:0, :0]
        self.lens, self.base, self.used, self.pins = (np.zeros(0, dtype=np.int64) for _ in range(4))

    def clear(self) -> None:
        """Forget everything, the order of use too, so that rounding does not depend on the past."""
        if self.released:
            release_caches()  # what others have left would be in the way
            length, self.released = self.released, 0
            self.reserve(length)
        self.chains = [()] * len(self.chains)
        for array in (self.lens, self.base, self.used, self.pins):
            array[:] = 0
        self._plan = None

    def _add_cached(self) -> bool:
        """Make more slots for finished sequences, if limit and memory allow it."""
        count = len(self.chains)
        if count == self.limit:
            return False
        more = min(2 * count, self.limit)
        if SPARE * self._bytes(more, self.length) > free_bytes(self.device):
            self.limit = count
            return False
        self._resize(more, self.length)
        return True

    def spans(self, running: int) -> list[SharedSpan]:
        """The shared spans of rows 0:running."""
        if self._plan is None:
            readers: dict[int, list[tuple[int, int]]] = {}
            for row in range(running):
                for span in self.chains[row]:
                    readers.setdefault(span.slot, []).append((row, span.stop - span.start))
            self._plan = [self._span(slot, reads, running) for slot, reads in readers.items()]
        return self._plan

    def _span(self, slot: int, reads: list[tuple[int, int]], running: int) -> SharedSpan:
        rows, sizes = (torch.tensor(x, device=self.device) for x in zip(*reads, strict=True))
        length = int(sizes.max())
        visible = None
        if int(sizes.min()) < length:
            visible = torch.arange(length, device=self.device) < sizes[:, None, None]
        every = None if len(reads) == running else rows  # a row lists a slot at most once
        depth, start = len(self.chains[slot]), int(self.base[slot])
        return SharedSpan(slot, start, length, every, depth, visible)

    def _in_place(self, span: Span, share: bool) -> bool:
        return (
            share
            and self.min_shared is not None
            and span.slot >= self.rows  # a running row moves and ends
            and span.stop - span.start >= self.min_shared
        )

    def _move(self, source: int, target: int) -> None:
        held = int(self.lens[source] - self.base[source])
        for kv in self.kv:
            kv[:, target, :, :held] = kv[:, source, :, :held]
        self._link(target, self.chains[source])
        self.tokens[target] = self.tokens[source]
        self.base[target], self.lens[target] = self.base[source], self.lens[source]

    def _link(self, slot: int, chain: tuple[Span, ...]) -> None:
        for span in chain:
            self.pins[span.slot] += 1
        for span in self.chains[slot]:
            self.pins[span.slot] -= 1
        self.chains[slot] = chain
        self._plan = None

    def view(self, rows: slice, positions: np.ndarray, spans: Sequence[SharedSpan]) -> SlotView:
        """A forward of tokens at `positions` (R, C) of `rows`, which read `spans` in place."""
        places = positions - self.base[rows, None]
        indices, length = torch.from_numpy(places).to(self.device), int(places.max()) + 1
        within = torch.arange(length, device=self.device)
        masks = []
        for pattern in self.patterns:
            if pattern is None:
                own = within <= indices[:, None, :, None]
                masks.append(Visible(own, [span.visible for span in spans]))
                continue
            queries = torch.from_numpy(positions).to(self.device)[:, None, :, None]
            keys = torch.from_numpy(self.base[rows]).to(self.device)[:, None, None, None] + within
            own = pattern(queries, keys)
            masks.append(Visible(own, [_spanned(pattern, queries[:, 0], span) for span in spans]))
        visible = [masks[i] for i in self._pattern_of]
        return SlotView(self.calls, rows, indices, length, visible, spans)


def _spanned(pattern: MaskFunction, queries: Tensor, span: SharedSpan) -> Tensor:
    """(n, 1, length) bool, what the rows at positions `queries` (R, 1, 1) read of a shared span."""
    keys = torch.arange(span.start, span.start + span.length, device=queries.device)
    seen = pattern(queries if span.rows is None else queries[span.rows], keys)
    return seen if span.visible is None else seen & span.visible
