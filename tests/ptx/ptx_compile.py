"""Turns a kernel's instructions into functions over a machine's threads."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import ptx_async
import ptx_sync
from ptx_machine import RESERVED, Machine
from ptx_program import Instruction, Kernel, PtxError, register_type
from ptx_values import TYPES, Array, arithmetic, comparison, conversion, mixed

Run = Callable[[Machine, Any], None]
Reader = Callable[[Machine, Any], Array]
GARBAGE = 0xFFF4DEADFFF4DEAD  # what a register holds before it is written; NaN as a float
ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\d+)\s*)?\]$")
SPACES = ("global", "shared", "param")
HINTS = ("cg", "ca", "nc", "L1::evict_last", "L1::evict_first", "L2::cache_hint")


class Compiler:
    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def compile(self) -> tuple[list[Run], list[int], list[bool]]:
        """What `Machine.run` takes. Raises PtxError that names every opcode it does not know."""
        code, jumps, unknown = [], [], {}
        for index, one in enumerate(self.kernel.code):
            jump = ptx_sync.make(self, one, index)
            run = jump or self.straight(one)
            if run is None:
                unknown.setdefault(one.opcode, one.line)
                continue
            code.append(Located(run, one, self.kernel.name))
            jumps.append(jump is not None)
        if unknown:
            names = ", ".join(f"{opcode} (line {line})" for opcode, line in unknown.items())
            raise PtxError(f"{self.kernel.name}: no rule for {names}")
        starts = set(self.kernel.labels.values())
        ends = list(range(len(code)))
        for index in range(len(code) - 1, -1, -1):
            if not jumps[index]:
                follows = index + 1
                ends[index] = follows if follows in starts else ends[follows]
        return code, ends, jumps

    # Operands.

    def read(self, operand: str, kind: str) -> Reader:
        """The value of an operand, as a type, for each thread."""
        dtype = TYPES[kind]
        if (declared := register_type(self.kernel, operand)) is not None:
            stored = _storage(declared)
            return lambda m, ids: _as_type(_register(m, operand, stored)[ids], dtype)
        if operand.startswith("%"):
            return lambda m, ids: _as_type(_special(m, operand)[ids], dtype)
        constant = self.constant(operand, dtype)
        return lambda m, ids: constant

    def constant(self, operand: str, dtype: np.dtype) -> Array:
        if operand in self.kernel.params:
            return np.array([self.kernel.params[operand][0]], dtype)[0]
        if operand in self.kernel.shared:
            offset, size = self.kernel.shared[operand]
            begin = RESERVED + (offset if size else self.kernel.static_bytes)
            return np.array([begin], dtype)[0]
        if match := re.match(r"0([fd])([0-9A-F]+)$", operand):
            return np.array([int(match[2], 16)], "u4" if match[1] == "f" else "u8").view(dtype)[0]
        try:
            value = int(operand.rstrip("U"), 0)
        except ValueError:
            raise PtxError(f"no rule for the operand {operand}") from None
        if dtype.kind == "b":
            return np.bool_(value)
        unsigned = np.dtype(f"u{dtype.itemsize}")
        return np.array([value % (1 << 8 * dtype.itemsize)], unsigned).view(dtype)[0]

    def write(self, operand: str, kind: str) -> Callable[[Machine, Any, Array], None]:
        """Takes values of a type to a register, which may be wider."""
        if operand == "_":
            return lambda m, ids, values: None
        declared = register_type(self.kernel, operand)
        if declared is None:
            raise PtxError(f"no register {operand}")
        dtype, signed = _storage(declared), kind[0] == "s"

        def write(m: Machine, ids: Any, values: Array) -> None:
            if values.dtype != dtype:
                if values.dtype.itemsize < dtype.itemsize:
                    wide = f"{'i' if signed else 'u'}{dtype.itemsize}"
                    values = _bits(values, signed).astype(wide)
                values = _bits(values, False)
                if values.dtype != dtype:
                    raise PtxError(f"{values.dtype} does not fit register {operand}")
            _register(m, operand, dtype)[ids] = values

        return write

    def address(self, operand: str) -> Reader:
        """The address in brackets, as an int64 for each thread."""
        match = ADDRESS.match(operand)
        if match is None:
            raise PtxError(f"no rule for the address {operand}")
        offset = np.int64(match[2] or 0)
        wide = register_type(self.kernel, match[1])
        base = self.read(match[1], "u32" if wide in ("b32", "u32", "s32") else "u64")
        return lambda m, ids: np.broadcast_to(
            base(m, ids).astype(np.int64) + offset, m.pc[ids].shape
        )

    def vector(self, operand: str) -> list[str]:
        inside = operand[1:-1] if operand.startswith("{") else operand
        return [part.strip() for part in inside.split(",")]

    # Instructions after which the next one follows.

    def straight(self, one: Instruction) -> Run | None:
        run = self.computed(one) or self.moved(one) or ptx_async.make(self, one)
        if run is None or not one.guard:
            return run
        guard = self.guard(one.guard)

        def guarded(m: Machine, ids: Any) -> None:
            if (some := m.who(ids)[guard(m, ids)]).size:
                run(m, some)

        return guarded

    def guard(self, text: str) -> Reader:
        reader = self.read(text.lstrip("!"), "pred")
        return (lambda m, ids: ~reader(m, ids)) if text[0] == "!" else reader

    def computed(self, one: Instruction) -> Run | None:
        """From registers to a register."""
        parts, operands = one.opcode.split("."), one.operands
        if parts[0] in ("mov",) and "{" in one.text:
            return self.packed(operands, parts[1])
        if (known := arithmetic(one.opcode)) is not None:
            function, kind = known
            return self.function(function, operands, kind, *[kind] * (len(operands) - 1))
        if parts[0] == "cvt" and (known := conversion(one.opcode)) is not None:
            function, to, of = known
            return self.function(function, operands, to, *[of] * (len(operands) - 1))
        if parts[0] == "setp" and len(parts) == 3 and parts[2] in TYPES:
            compare = comparison(parts[1], parts[2][0] == "f")
            kinds = ["pred", parts[2], parts[2]]
            return self.function(compare, operands, *kinds) if compare else None
        if (known := mixed(one.opcode)) is not None:
            return self.function(known[0], operands, *known[1])
        return None

    def function(self, function: Callable, operands: tuple[str, ...], to: str, *of: str) -> Run:
        if len(operands) != len(of) + 1:
            raise PtxError(f"expected {len(of) + 1} operands, found {len(operands)}")
        write = self.write(operands[0], to)
        readers = [self.read(x, kind) for x, kind in zip(operands[1:], of, strict=True)]
        return lambda m, ids: write(m, ids, function(*[read(m, ids) for read in readers]))

    def packed(self, operands: tuple[str, ...], kind: str) -> Run:
        """mov between a register and its parts, the lowest first."""
        to, of = map(self.vector, operands)
        part = f"b{int(kind[1:]) // max(len(to), len(of))}"
        shifts = [np.array(i * int(part[1:]), TYPES[kind]) for i in range(max(len(to), len(of)))]
        if len(of) > 1:
            readers, write = [self.read(x, part) for x in of], self.write(to[0], kind)
            return lambda m, ids: write(
                m,
                ids,
                sum(
                    read(m, ids).astype(TYPES[kind]) << s
                    for read, s in zip(readers, shifts, strict=True)
                ),
            )
        reader, writes = self.read(of[0], kind), [self.write(x, part) for x in to]

        def unpack(m: Machine, ids: Any) -> None:
            value = reader(m, ids)
            for write, shift in zip(writes, shifts, strict=True):
                write(m, ids, (value >> shift).astype(TYPES[part]))

        return unpack

    def moved(self, one: Instruction) -> Run | None:
        """Loads, stores, atomics and fences."""
        parts = one.opcode.split(".")
        if one.opcode in ("membar.gl", "membar.cta"):
            return lambda m, ids: None
        if parts[0] == "createpolicy":  # of the cache
            write = self.write(one.operands[0], "b64")
            return lambda m, ids: write(m, ids, np.uint64(0))
        if re.match(r"atom\.global\.(gpu\.(acq_rel|relaxed)\.)?add\.u32$", one.opcode):
            return self.atomic_add(one.operands)
        rest = [p.removesuffix("::cta") for p in parts[1:-1] if p not in HINTS]
        count = int(rest.pop()[1:]) if rest and rest[-1] in ("v2", "v4") else 1
        kind = parts[-1]
        if parts[0] not in ("ld", "st") or len(rest) != 1 or rest[0] not in SPACES:
            return None
        if kind not in TYPES or (parts[0] == "st" and rest[0] == "param"):
            return None
        width, (space,) = TYPES[kind].itemsize, rest
        place = self.address(one.operands[parts[0] == "ld"])
        names = self.vector(one.operands[parts[0] == "st"])
        if len(names) != count:
            raise PtxError(f"expected {count} registers, found {len(names)}")

        def where(m: Machine, ids: Any) -> tuple[Any, np.ndarray]:
            address = place(m, ids)
            if space == "shared":
                address = m.shared_place(address, ids, False)
            if count > 1 and (address % (width * count)).any():
                raise PtxError(f"an address is not aligned to {width * count} bytes")
            memory = {"global": m.memory, "shared": m.shared, "param": m.param}[space]
            return memory, address

        if parts[0] == "ld":
            writes = [self.write(name, kind) for name in names]

            def load(m: Machine, ids: Any) -> None:
                memory, address = where(m, ids)
                values = [memory.load(address + i * width, TYPES[kind]) for i in range(count)]
                for write, value in zip(writes, values, strict=True):
                    write(m, ids, value)

            return load
        readers = [self.read(name, kind) for name in names]

        def store(m: Machine, ids: Any) -> None:
            memory, address = where(m, ids)
            for i, read in enumerate(readers):
                memory.store(address + i * width, np.broadcast_to(read(m, ids), address.shape))

        return store

    def atomic_add(self, operands: tuple[str, ...]) -> Run:
        write, place = self.write(operands[0], "u32"), self.address(operands[1])
        added = self.read(operands[2], "u32")

        def run(m: Machine, ids: Any) -> None:
            address, before = place(m, ids), []
            adds = np.broadcast_to(added(m, ids), address.shape)
            for i in range(address.size):  # one after the other
                before.append(m.memory.load(address[i : i + 1], TYPES["u32"]))
                m.memory.store(address[i : i + 1], before[-1] + adds[i])
            write(m, ids, np.concatenate(before))

        return run


class Located:
    """A function whose errors name the instruction."""

    def __init__(self, run: Any, one: Instruction, kernel: str):
        self.run, self.one, self.kernel = run, one, kernel

    def __call__(self, m: Machine, ids: Any) -> None:
        self._call(self.run, m, ids)

    def opens(self, m: Machine, ids: Any) -> bool:
        return self._call(self.run.opens, m, ids)

    def _call(self, function: Any, m: Machine, ids: Any) -> Any:
        try:
            return function(m, ids)
        except PtxError as error:
            where = f"{self.kernel}, line {self.one.line}: {self.one.text}"
            raise PtxError(f"{where}: {error}") from None


def _storage(declared: str) -> np.dtype:
    """Registers hold bits."""
    return TYPES["pred"] if declared == "pred" else np.dtype(f"u{int(declared[1:]) // 8}")


def _bits(values: Array, signed: bool) -> Array:
    kind = np.dtype(f"{'i' if signed else 'u'}{values.dtype.itemsize}")
    return values if values.dtype == kind else values.view(kind)


def _register(m: Machine, name: str, dtype: np.dtype) -> np.ndarray:
    """Compilers read registers that nothing wrote, for bits that nobody uses."""
    if name not in m.registers:
        m.registers[name] = np.full(m.pc.size, np.array([GARBAGE], "u8").view(dtype)[0])
    return m.registers[name]


def _special(m: Machine, name: str) -> np.ndarray:
    if name not in m.special:
        raise PtxError(f"no rule for the register {name}")
    return m.special[name]


def _as_type(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The low bits of a register, as a type."""
    if values.dtype == dtype:
        return values
    if values.dtype.itemsize > dtype.itemsize:
        values = values.astype(f"u{dtype.itemsize}")
    return values.view(dtype)
