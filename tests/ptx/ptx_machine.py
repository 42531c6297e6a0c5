"""Runs a kernel of a PTX file as a GPU would: a grid of blocks, in clusters, with barriers.

All threads of the grid run side by side, one numpy operation for all that are at the same
instruction. Of those that can run, the ones at the smallest address run first, which brings threads
back together after a branch. `order` changes who can: one warp at a time, from the first, from the
last, or a random one, so that a missing barrier shows in at least one. Background copies and stores
to other blocks land as late as they can, in a random order; at once in the order "forward"; at any
time in the order "random".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ptx_memory import Global, Memory
from ptx_program import Kernel, PtxError

WARP = 32
RUNS, WAITS, ENDED = 0, 1, 2
ORDERS = ("together", "forward", "backward", "random")
RESERVED = 1024  # bytes at the start of a block's shared memory that belong to the system
RANK_SHIFT = 24  # an address of another block holds its rank plus one from this bit on


@dataclass
class Barrier:
    """An mbarrier."""

    count: int  # arrivals in a phase
    pending: int
    bytes: int = 0  # announced and not yet arrived
    phase: int = 0
    fenced: bool = False  # visible to the copy engine
    remote: bool = False  # bytes come from other blocks

    def advance(self) -> None:
        if self.pending < 0:
            raise PtxError("more arrivals at an mbarrier than it counts")
        if self.pending == 0 and self.bytes == 0:
            self.phase, self.pending = self.phase + 1, self.count


@dataclass
class Delivery:
    """Bytes under way to shared memory."""

    line: int
    to: int  # where, in all of shared memory
    barrier: int  # of its mbarrier
    data: np.ndarray | None  # None: they are read when they arrive
    source: int = 0
    size: int = 0


@dataclass
class Machine:
    kernel: Kernel
    memory: Global
    blocks: int
    threads: int
    shared_bytes: int = 0
    cluster: int = 1
    params: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))
    order: str = "together"
    seed: int = 0

    def __post_init__(self):
        if self.blocks % self.cluster or self.threads % WARP or self.order not in ORDERS:
            raise ValueError("expected whole clusters, whole warps and a known order")
        if self.params.size != self.kernel.param_bytes:
            found, expected = self.params.size, self.kernel.param_bytes
            raise ValueError(f"expected {expected} bytes of parameters, found {found}")
        count = self.blocks * self.threads
        thread = np.arange(count)
        self.block = thread // self.threads
        self.thread = thread % self.threads
        self.rank = self.block % self.cluster
        self.pc = np.zeros(count, np.int64)
        self.state = np.full(count, RUNS)
        self.tried = np.zeros(count, bool)  # an mbarrier, in vain
        self.arrived, self.waited = np.zeros(count, int), np.zeros(count, int)  # at the cluster's
        self.registers: dict[str, np.ndarray] = {}
        self.random = np.random.default_rng(self.seed)
        self.barriers: dict[int, Barrier] = {}
        self.deliveries: list[Delivery] = []
        used = self.kernel.static_bytes + self.shared_bytes
        self.window = -(-(RESERVED + used + 16) // 128) * 128
        self.shared = Memory("shared", self.window * self.blocks)
        for block in range(self.blocks):
            self.shared.allow(block * self.window + RESERVED, used)
        self.param = Memory("param", self.params.size)
        self.param.put(0, self.params)
        one = {"ntid": self.threads, "nctaid": self.blocks, "cluster_nctarank": self.cluster}
        special = {"tid": self.thread, "ctaid": self.block, "cluster_ctarank": self.rank}
        special |= {"laneid": thread % WARP}
        special |= {name: np.full(count, value) for name, value in one.items()}
        self.special = {
            f"%{name}" + ("" if "rank" in name or name == "laneid" else ".x"): v.astype(np.uint32)
            for name, v in special.items()
        }

    # Threads of the grid, as an index of arrays: an array of numbers, or a slice where it is all.
    def who(self, ids: Any) -> np.ndarray:
        return np.arange(self.pc.size)[ids]

    def shared_place(self, addresses: np.ndarray, ids: Any, other_blocks: bool) -> np.ndarray:
        """Where shared addresses lie. Raises PtxError for another block's unless it is allowed."""
        rank, offset = addresses >> RANK_SHIFT, addresses & ((1 << RANK_SHIFT) - 1)
        block = self.block[ids]
        if rank.any():
            if not other_blocks:
                raise PtxError("an address of another block in an access to the block's own memory")
            block = np.where(rank > 0, block - self.rank[ids] + rank - 1, block)
        if (offset >= self.window).any():
            raise PtxError(f"address {offset.max()} lies outside of the block's shared memory")
        return block * self.window + offset

    def run(self, code: list[Any], ends: list[int], jumps: list[bool]) -> None:
        """Runs to the end of all threads.

        `code`: a function of each instruction; `ends`: where the straight code from each one on
        ends; `jumps`: whether an instruction ends straight code.
        """
        with np.errstate(all="ignore"):
            while (self.state != ENDED).any():
                if self.order == "random" and self.deliveries and self.random.random() < 0.1:
                    self._deliver()
                ids = self._next()
                if ids is None:
                    self._go_on(code)
                    continue
                index = int(self.pc[ids][0])
                end = ends[index]
                for function in code[index:end]:
                    function(self, ids)
                self.pc[ids] = end
                if jumps[end]:
                    code[end](self, ids)
                    if self.order != "together" and (self.state[ids] == WAITS).any():
                        self._open(code)
        self._check_end()

    def _next(self) -> Any:
        runs = self.state == RUNS
        if not runs.any():
            return None
        if self.order != "together":
            warps = np.unique(np.flatnonzero(runs) // WARP)
            chosen = {"forward": warps[0], "backward": warps[-1]}.get(self.order)
            chosen = self.random.choice(warps) if chosen is None else chosen
            runs[: chosen * WARP] = runs[(chosen + 1) * WARP :] = False
        runs &= self.pc == self.pc[runs].min()
        return slice(None) if runs.all() else np.flatnonzero(runs)

    def _open(self, code: list[Any]) -> bool:
        """Lets threads go on whose wait is over; whether there are any."""
        opened = False
        for index in np.unique(self.pc[self.state == WAITS]):
            ids = np.flatnonzero((self.state == WAITS) & (self.pc == index))
            opened |= ids.size > 0 and code[index].opens(self, ids)
        return opened

    def _go_on(self, code: list[Any]) -> None:
        """No thread can run: opens what may open, else lets something arrive, else raises."""
        if self._open(code):
            return
        if self.deliveries:
            together = self.order == "together"  # so that threads stay so
            for _ in range(len(self.deliveries) if together else 1):
                self._deliver()
            return
        lines = [self.kernel.code[i] for i in np.unique(self.pc[self.state == WAITS])]
        where = "; ".join(f"line {one.line}: {one.text}" for one in lines)
        raise PtxError(f"{self.kernel.name}: threads wait for what never comes, at {where}")

    def release(self, ids: np.ndarray) -> bool:
        self.state[ids] = RUNS
        self.pc[ids] += 1
        return ids.size > 0

    def barrier_at(self, place: int) -> Barrier:
        if place not in self.barriers:
            raise PtxError(f"no mbarrier was initialised at shared address {place % self.window}")
        return self.barriers[place]

    def send(self, delivery: Delivery) -> None:
        if delivery.to // self.window != delivery.barrier // self.window:
            raise PtxError("bytes and their mbarrier lie in two blocks")
        if not self.barrier_at(delivery.barrier).fenced:
            raise PtxError("no fence has made the mbarrier's initialisation visible")
        self.deliveries.append(delivery)
        if self.order == "forward":
            self._deliver()

    def _deliver(self) -> None:
        """One of the deliveries under way arrives."""
        sent = self.deliveries.pop(self.random.integers(len(self.deliveries)))
        try:
            block = sent.to // self.window
            if (self.state[self.block == block] == ENDED).all():
                raise PtxError("bytes arrive at a block that has ended")
            data = sent.data
            if data is None:
                data = self.memory.load(sent.source + np.arange(sent.size), np.dtype(np.uint8))
            self.shared.store(sent.to + np.arange(data.size), data)
            barrier = self.barrier_at(sent.barrier)
            barrier.remote |= sent.data is not None
            barrier.bytes -= data.size
            barrier.advance()
        except PtxError as error:
            raise PtxError(f"{self.kernel.name}, line {sent.line}: {error}") from None

    def _check_end(self) -> None:
        name = self.kernel.name
        if self.deliveries:
            line = self.deliveries[0].line
            raise PtxError(f"{name}, line {line}: bytes are under way to a block that has ended")
        for place, barrier in self.barriers.items():
            if barrier.bytes < 0:
                where = f"{place % self.window} of block {place // self.window}"
                raise PtxError(f"{name}: more bytes than announced reached the mbarrier at {where}")
