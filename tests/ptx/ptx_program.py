"""PTX as text, read into kernels: instructions, labels, registers, parameters, shared memory."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class PtxError(Exception):
    """What a GPU would refuse, or could do otherwise on another run."""


@dataclass(frozen=True)
class Instruction:
    line: int  # in the PTX file, from 1
    text: str
    guard: str  # a predicate register, "!" before it where negated; empty: none
    opcode: str
    operands: tuple[str, ...]


@dataclass(eq=False)  # a key of a cache
class Kernel:
    name: str
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # the instruction that follows
    registers: dict[str, str] = field(default_factory=dict)  # types by name, or by name<count>
    params: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset and bytes
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # the same; 0 bytes: dynamic

    @property
    def param_bytes(self) -> int:
        return max((offset + size for offset, size in self.params.values()), default=0)

    @property
    def static_bytes(self) -> int:
        return max((offset + size for offset, size in self.shared.values()), default=0)


_PARAM = re.compile(
    r"\.param\s+(?:\.align (\d+) )?\.\w*?(\d+)\s+(?:\.ptr\S* .*?)?(\S+?)(?:\[(\d+)\])?,?$"
)
_SHARED = re.compile(r"(?:\.extern )?\.shared \.align (\d+) \.b8 (\S+?)\[(\d*)\];$")
HINTS = (".maxntid", ".minnctapersm", ".reqntid", ".maxnreg", ".pragma", ".loc")
_STATEMENT = re.compile(r"(?:@(!?[\w%]+)\s+)?([a-z.][\w.:]*)\s*(.*)$")


def read_kernel(text: str, name: str) -> Kernel:
    """The kernel of a readable name. Raises PtxError for what it cannot read."""
    shared: dict[str, tuple[int, int]] = {}
    kernel, statement = None, ""
    for number, raw in enumerate(text.splitlines(), 1):
        if ".entry" in raw:
            if kernel is not None:
                break
            found = readable(re.split(r"\.entry |\(", raw)[1])
            kernel = Kernel(name, shared=shared) if found == name else None
            continue
        if kernel is None and raw[:1] != ".":
            continue
        line = raw.split("//")[0].strip()
        if line.startswith((".section", ".file")):  # for debuggers
            break
        if match := _SHARED.match(line):
            _place(shared, match[2], match[1], match[3] or 0)
        if kernel is None or not line or line in "{}()" or match:
            continue
        if match := _PARAM.match(line):
            width = int(match[2]) // 8
            _place(kernel.params, match[3], match[1] or width, match[4] or width)
        elif match := re.match(r"(\$?\w+):$", line):
            kernel.labels[match[1]] = len(kernel.code)
        elif not line.startswith(HINTS):
            statement = f"{statement} {line}".lstrip("{} ")
            while ";" in statement:
                one, statement = (part.lstrip("{} ") for part in statement.split(";", 1))
                if one.startswith(".reg"):
                    _, kind, *names = one.replace(",", " ").split()
                    kernel.registers |= dict.fromkeys(names, kind[1:])
                elif one:
                    kernel.code.append(_instruction(number, one.strip()))
    if kernel is None:
        raise PtxError(f"no kernel {name}")
    return kernel


def readable(symbol: str) -> str:
    """`kernel<type, type>` from the mangled name of a kernel in a (nested) namespace."""
    parts, rest = [], symbol.removeprefix("_ZN")
    while match := re.match(r"(\d+)", rest):
        end = match.end() + int(match[1])
        parts.append(rest[match.end() : end])
        rest = rest[end:]
    kinds: list[str] = []
    while match := re.match(r"I?(?:NS_\d+(B?Float16)E|(S\d?_)|f)", rest):
        kinds.append(match[1] or (kinds[0] if match[2] else "float"))
        rest = rest[match.end() :]
    if not parts:
        return symbol
    return parts[-1] + (f"<{', '.join(kinds)}>" if kinds else "")


def _place(where: dict[str, tuple[int, int]], name: str, align: str | int, size: str | int) -> None:
    end = max((offset + bytes_ for offset, bytes_ in where.values()), default=0)
    where[name] = -(-end // int(align)) * int(align), int(size)


def _instruction(line: int, text: str) -> Instruction:
    match = _STATEMENT.match(text)
    if match is None:
        raise PtxError(f"line {line}: expected an instruction, found {text}")
    operands = re.split(r",\s*(?![^{\[]*[}\]])", match[3]) if match[3] else []
    return Instruction(line, text, match[1] or "", match[2], tuple(o.strip() for o in operands))


def register_type(kernel: Kernel, name: str) -> str | None:
    """The declared type of a register, None if it is none."""
    if name in kernel.registers:
        return kernel.registers[name]
    stem = name.rstrip("0123456789")
    for declared, kind in kernel.registers.items():
        if declared.startswith(stem + "<") and name != stem:
            return kind
    return None
