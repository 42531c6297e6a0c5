"""Key-value slots of the embedded engine: which slot holds what, and which sequences read it.

A slot stores the keys and values of a sequence from position `base` on. The positions before `base`
are in other slots, which the slot's chain of spans lists. The first slots hold the running rows, so
that a decode step reads plain views. The slots after them hold finished sequences. A slot that
others read is pinned, so leaves are forgotten before the segments that they continue.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spo.engines.slot_attention import SharedSpan


@dataclass(frozen=True)
class Span:
    """Positions start:stop of a sequence, at indices 0:stop - start of a cached slot."""

    slot: int
    start: int
    stop: int


class Slots:
    """Keys and values of `rows` running sequences and `cached` finished ones.

    Args:
        min_shared: branches read a segment of at least this many tokens in place; a shorter one is
            copied to each branch. None always copies.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],  # layers, key-value heads, head dimension
        *,
        rows: int,
        cached: int,
        max_len: int,
        min_shared: int | None,
        dtype: torch.dtype,
        device: str,
    ):
        layers, heads, width = shape
        count = rows + cached
        self.kv = torch.zeros(
            (layers, 2, count, heads, max_len + 1, width), dtype=dtype, device=device
        )
        self.rows, self.min_shared = rows, min_shared
        self.tokens = np.full((count, max_len + 1), -1, dtype=np.int32)  # whole sequences
        self.lens = np.zeros(count, dtype=np.int64)  # tokens with keys and values, from position 0
        self.base = np.zeros(count, dtype=np.int64)  # first position that the slot itself holds
        self.used = np.zeros(count, dtype=np.int64)  # step of last use, for eviction
        self.pins = np.zeros(count, dtype=np.int64)  # number of chains that list the slot
        self.chains: list[tuple[Span, ...]] = [()] * count  # positions 0:base
        self._plan: list[SharedSpan] | None = None

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
            self.kv[:, :, row, :, at : at + size] = self.kv[:, :, piece.slot, :, :size]
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
        free = np.flatnonzero(self.pins[self.rows :] == 0)
        if free.size == 0:
            return None
        slot = self.rows + int(free[self.used[self.rows + free].argmin()])
        self._move(row, slot)
        self.used[slot] = step
        return slot

    def replace(self, row: int, last: int) -> None:
        """Move the last running row into the slot of a finished one."""
        if row != last:
            self._move(last, row)
        self._link(last, ())
        self.base[last] = self.lens[last] = 0

    def clear(self) -> None:
        """Forget everything, the order of use too, so that rounding does not depend on the past."""
        self.chains = [()] * len(self.chains)
        for array in (self.lens, self.base, self.used, self.pins):
            array[:] = 0
        self._plan = None

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
        device = self.kv.device
        rows, sizes = (torch.tensor(x, device=device) for x in zip(*reads, strict=True))
        length = int(sizes.max())
        visible = None
        if int(sizes.min()) < length:
            visible = torch.arange(length, device=device) < sizes[:, None, None]
        every = None if len(reads) == running else rows  # a row lists a slot at most once
        return SharedSpan(slot, length, every, len(self.chains[slot]), visible)

    def _in_place(self, span: Span, share: bool) -> bool:
        return (
            share
            and self.min_shared is not None
            and span.slot >= self.rows  # a running row moves and ends
            and span.stop - span.start >= self.min_shared
        )

    def _move(self, source: int, target: int) -> None:
        held = int(self.lens[source] - self.base[source])
        self.kv[:, :, target, :, :held] = self.kv[:, :, source, :, :held]
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


def own_view(slots: Slots, rows: slice, positions: np.ndarray) -> tuple[Tensor, int, Tensor]:
    """Indices (R, C) of `positions` in the rows' own slots, the length that is read there, and the
    mask (R, 1, C, length) of what each token may read.
    """
    indices = torch.from_numpy(positions - slots.base[rows, None]).to(slots.kv.device)
    length = int(indices.max()) + 1
    mask = torch.arange(length, device=indices.device) <= indices[:, None, :, None]
    return indices, length, mask
