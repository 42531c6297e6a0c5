"""Instructions after which a thread may go elsewhere or wait: branches, barriers, shuffles."""

from __future__ import annotations

from typing import Any

import numpy as np
from ptx_machine import ENDED, RUNS, WAITS, WARP, Machine
from ptx_program import Instruction, PtxError


def make(compiler: Any, one: Instruction, index: int) -> Any:
    """What runs an instruction of this file; None if it is none."""
    stem = one.opcode.removesuffix(".uni")
    kinds = {"bra": Branch, "ret": End, "exit": End, "bar.sync": BlockBarrier}
    kinds |= {"barrier.cluster.wait": ClusterWait, "bar.warp.sync": WarpBarrier}
    for order in ("", ".acquire.cluster"):
        kinds[f"mbarrier.try_wait.parity{order}.shared::cta.b64"] = TryWait
    kinds |= {f"shfl.sync.{mode}.b32": Shuffle for mode in ("up", "down", "bfly", "idx")}
    kinds |= {f"redux.sync.{how}.{t}": Reduce for how in REDUCE for t in ("s32", "u32")}
    if stem not in kinds:
        return None
    if one.guard and stem not in ("bra", "ret", "exit"):
        raise PtxError(f"line {one.line}: no rule for a guard before {one.opcode}")
    return kinds[stem](compiler, one, index)


class Step:
    """Called with threads, which it moves on, stops, or makes wait until `opens`."""

    def __init__(self, compiler: Any, one: Instruction, index: int):
        self.c, self.opcode, self.operands, self.index = compiler, one.opcode, one.operands, index
        self.guard = compiler.guard(one.guard) if one.guard else lambda m, ids: np.bool_(True)
        self.prepare()

    def prepare(self) -> None:
        """Reads the operands."""

    def __call__(self, m: Machine, ids: Any) -> None:
        m.state[ids] = WAITS

    def opens(self, m: Machine, ids: np.ndarray) -> bool:
        """Lets those of the waiting threads go on that may; whether there are any."""
        raise NotImplementedError


class Branch(Step):
    def __call__(self, m: Machine, ids: Any) -> None:
        target = self.c.kernel.labels[self.operands[0]]
        m.pc[ids] = np.where(self.guard(m, ids), target, self.index + 1)


class End(Step):
    def __call__(self, m: Machine, ids: Any) -> None:
        m.state[ids] = np.where(self.guard(m, ids), ENDED, RUNS)
        m.pc[ids] += 1


class BlockBarrier(Step):
    def prepare(self) -> None:
        if self.operands != ("0",):
            raise PtxError(f"expected barrier 0 of all threads, found {self.operands}")
        # Threads may wait at any of a kernel's barriers: they are the same one.
        code = self.c.kernel.code
        self.same = [i for i, one in enumerate(code) if one.opcode == "bar.sync"]

    def opens(self, m: Machine, ids: np.ndarray) -> bool:
        there = ((m.state == WAITS) & np.isin(m.pc, self.same)).reshape(m.blocks, -1)
        ended = (m.state == ENDED).reshape(m.blocks, -1)
        if ((there | ended).all(1) & there.any(1) & ended.any(1)).any():
            raise PtxError("some threads of the block have ended, so that the barrier never opens")
        return m.release(np.flatnonzero(np.repeat(there.all(1), m.threads)))


class ClusterWait(Step):
    def __call__(self, m: Machine, ids: Any) -> None:
        if (m.arrived[ids] == m.waited[ids]).any():
            raise PtxError("a thread waits for the cluster's barrier at which it has not arrived")
        m.state[ids] = WAITS

    def opens(self, m: Machine, ids: np.ndarray) -> bool:
        arrived = np.where(m.state == ENDED, np.iinfo(int).max, m.arrived)
        least = arrived.reshape(-1, m.cluster * m.threads).min(1)
        ready = ids[least[m.block[ids] // m.cluster] > m.waited[ids]]
        m.waited[ready] += 1
        return m.release(ready)


class TryWait(Step):
    """Says once that the phase has not ended; the second time it waits."""

    def prepare(self) -> None:
        self.write = self.c.write(self.operands[0], "pred")
        self.place = self.c.address(self.operands[1])
        self.parity = self.c.read(self.operands[2], "u32")

    def ended(self, m: Machine, ids: Any) -> np.ndarray:
        places = m.shared_place(self.place(m, ids), ids, False)
        barriers = [m.barrier_at(int(place)) for place in places]
        ended = np.array([one.phase & 1 for one in barriers], np.uint32) != self.parity(m, ids)
        if any(ended & [one.remote for one in barriers]) and ".acquire.cluster." not in self.opcode:
            raise PtxError("bytes of other blocks are waited for without .acquire.cluster")
        return ended

    def __call__(self, m: Machine, ids: Any) -> None:
        ended = self.ended(m, ids)
        self.write(m, ids, ended)
        waits = ~ended & m.tried[ids]
        m.tried[ids] = ~ended
        m.pc[ids] += ~waits
        m.state[ids] = np.where(waits, WAITS, RUNS)

    def opens(self, m: Machine, ids: np.ndarray) -> bool:
        ready = ids[self.ended(m, ids)]
        self.write(m, ready, np.ones(ready.size, bool))
        m.tried[ready] = False
        return m.release(ready)


class WarpBarrier(Step):
    """Opens when all lanes of its mask have come."""

    def prepare(self) -> None:
        self.mask = self.c.read(self.operands[-1], "u32")

    def __call__(self, m: Machine, ids: Any) -> None:
        m.state[ids] = WAITS
        self.opens(m, m.who(ids))  # at once, where nothing is missing

    def opens(self, m: Machine, ids: np.ndarray) -> bool:
        present = np.zeros(m.pc.size, bool)
        present[ids] = True
        lanes = present.reshape(-1, WARP) @ (1 << np.arange(WARP, dtype=np.int64))
        masks = np.broadcast_to(self.mask(m, ids), ids.shape).astype(np.int64)
        if (masks >> ids % WARP & 1 == 0).any():
            raise PtxError("a lane is not in its own mask")
        ready = ids[lanes[ids // WARP] & masks == masks]
        if ready.size:
            self.run(m, ready)
        return m.release(ready)

    def run(self, m: Machine, ids: np.ndarray) -> None:
        """What the lanes do then."""


class Shuffle(WarpBarrier):
    def prepare(self) -> None:
        super().prepare()
        to, inside = ([*self.operands[0].split("|"), "_"])[:2]
        self.write, self.write_inside = self.c.write(to, "b32"), self.c.write(inside, "pred")
        self.value, *self.how = (self.c.read(operand, "u32") for operand in self.operands[1:4])

    def run(self, m: Machine, ids: np.ndarray) -> None:
        by, clamp = (read(m, ids).astype(np.int64) for read in self.how)
        lane, segment = ids % WARP, clamp >> 8 & 31
        last = (lane & segment) | (clamp & 31 & ~segment)
        source = {
            "up": lane - by,
            "down": lane + by,
            "bfly": lane ^ by,
            "idx": (lane & segment) | (by & 31 & ~segment),
        }[self.opcode.split(".")[2]]
        inside = source >= last if ".up." in self.opcode else source <= last
        source = np.where(inside, source, lane)
        if (self.mask(m, ids).astype(np.int64) >> source & 1 == 0).any():
            raise PtxError("a lane reads from one that is not in the mask")
        everyone = np.zeros(m.pc.size, np.uint32)
        everyone[ids] = self.value(m, ids)
        self.write(m, ids, everyone[ids - lane + source])
        self.write_inside(m, ids, inside)


REDUCE = {"add": np.add, "min": np.minimum, "max": np.maximum}


class Reduce(WarpBarrier):
    """redux: each lane of a mask gets the sum, or the least or largest, of all."""

    def prepare(self) -> None:
        super().prepare()
        *_, self.how, kind = self.opcode.split(".")
        self.write = self.c.write(self.operands[0], kind)
        self.value = self.c.read(self.operands[1], kind)

    def run(self, m: Machine, ids: np.ndarray) -> None:
        group = (ids // WARP) << 32 | np.broadcast_to(self.mask(m, ids), ids.shape).astype(np.int64)
        order = np.argsort(group, kind="stable")
        starts = np.flatnonzero(np.diff(group[order], prepend=-1))
        value = np.broadcast_to(self.value(m, ids), ids.shape)[order]
        totals = REDUCE[self.how].reduceat(value, starts).astype(value.dtype)
        self.write(m, ids[order], np.repeat(totals, np.diff(np.append(starts, ids.size))))
