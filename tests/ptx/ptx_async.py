"""What mbarriers count, and what reaches shared memory in the background or from other blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from ptx_machine import RANK_SHIFT, Barrier, Delivery, Machine
from ptx_program import Instruction, PtxError


def make(c: Any, one: Instruction) -> Callable[[Machine, Any], None] | None:
    """What runs an instruction of this file, given a compiler; None if it is none."""
    known = {
        "barrier.cluster.arrive.relaxed": arrive,
        "mbarrier.init.shared::cta.b64": init,
        "fence.mbarrier_init.release.cluster": fence,
        "mbarrier.arrive.expect_tx.shared::cta.b64": expect,
        "mapa.shared::cluster.u32": map_address,
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes": copy,
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32": send,
    }
    return known[one.opcode](c, one) if one.opcode in known else None


def each(*columns: Any) -> Iterator[tuple[int, ...]]:
    """Rows of numbers, one of each thread."""
    rows = np.broadcast_arrays(*(np.asarray(column, np.int64) for column in columns))
    return zip(*(row.tolist() for row in rows), strict=True)


def arrive(c: Any, one: Instruction) -> Any:
    def run(m: Machine, ids: Any) -> None:
        if (m.arrived[ids] != m.waited[ids]).any():
            raise PtxError("a thread arrives twice at the cluster's barrier without a wait")
        m.arrived[ids] += 1

    return run


def init(c: Any, one: Instruction) -> Any:
    where, count = c.address(one.operands[0]), c.read(one.operands[1], "u32")

    def run(m: Machine, ids: Any) -> None:
        places = m.shared_place(where(m, ids), ids, False)
        m.shared.place(places, 8, False)
        for place, arrivals in each(places, count(m, ids)):
            if place in m.barriers:
                raise PtxError("a second initialisation of an mbarrier")
            m.barriers[place] = Barrier(arrivals, arrivals)
            m.shared.state[place : place + 8] = 0  # no place for loads and stores

    return run


def fence(c: Any, one: Instruction) -> Any:
    def run(m: Machine, ids: Any) -> None:
        blocks = set(m.block[ids].tolist())
        for place, barrier in m.barriers.items():
            barrier.fenced |= place // m.window in blocks

    return run


def expect(c: Any, one: Instruction) -> Any:
    if one.operands[0] != "_":
        raise PtxError(f"line {one.line}: no rule for the state of an mbarrier")
    where, size = c.address(one.operands[1]), c.read(one.operands[2], "u32")

    def run(m: Machine, ids: Any) -> None:
        for place, bytes_ in each(m.shared_place(where(m, ids), ids, False), size(m, ids)):
            barrier = m.barrier_at(place)
            barrier.bytes += bytes_
            barrier.pending -= 1
            barrier.advance()

    return run


def map_address(c: Any, one: Instruction) -> Any:
    write = c.write(one.operands[0], "u32")
    own, to = (c.read(operand, "u32") for operand in one.operands[1:])

    def run(m: Machine, ids: Any) -> None:
        rank = to(m, ids)
        if np.any(rank >= m.cluster):
            raise PtxError(f"expected a rank below {m.cluster}, found {np.max(rank)}")
        offset = own(m, ids) & np.uint32((1 << RANK_SHIFT) - 1)
        write(m, ids, offset | (rank + np.uint32(1)) << np.uint32(RANK_SHIFT))

    return run


def copy(c: Any, one: Instruction) -> Any:
    to, source = (c.address(operand) for operand in one.operands[:2])
    size, barrier = c.read(one.operands[2], "u32"), c.address(one.operands[3])

    def run(m: Machine, ids: Any) -> None:
        places, landings = (m.shared_place(x(m, ids), ids, True) for x in (to, barrier))
        for place, landing, begin, bytes_ in each(places, landings, source(m, ids), size(m, ids)):
            if place % 16 or begin % 16 or bytes_ % 16 or bytes_ == 0:
                raise PtxError("a copy is not of whole pieces of 16 bytes")
            m.memory.place(begin + np.arange(bytes_), 1, True)
            m.send(Delivery(one.line, place, landing, None, begin, bytes_))

    return run


def send(c: Any, one: Instruction) -> Any:
    to, barrier = c.address(one.operands[0]), c.address(one.operands[2])
    words = [c.read(word, "u32") for word in c.vector(one.operands[1])]

    def run(m: Machine, ids: Any) -> None:
        if m.cluster == 1:
            raise PtxError("an illegal instruction in a grid without clusters")
        places, landings = (m.shared_place(x(m, ids), ids, True) for x in (to, barrier))
        for place, landing, *data in each(places, landings, *(word(m, ids) for word in words)):
            if place % 16:
                raise PtxError("a store of 16 bytes is not aligned to them")
            m.send(Delivery(one.line, place, landing, np.array(data, np.uint32).view(np.uint8)))

    return run
