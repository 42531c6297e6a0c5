"""What every CUDA kernel of the built extension uses: registers, stack, local and shared memory.

    python csrc/cuda/resources.py spo_kernels/_C*.so
    python csrc/cuda/resources.py spo_kernels/_C*.so --json benchmarks/results/registers.json

It reads the machine code in the extension, so nothing is compiled again. cuobjdump is taken from
PATH, from CUDA_HOME, or from the Triton package, which brings one.
"""

import argparse
import datetime
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Kernel(NamedTuple):
    """One kernel for one architecture; sizes in bytes."""

    name: str
    arch: str
    registers: int
    stack: int  # of one thread
    local: int  # of one thread; spilled registers live here or on the stack
    shared: int  # fixed at compile time; on sm_90 and later 1024 of it are the system's


def find_cuobjdump() -> str | None:
    """Path of cuobjdump, or None."""
    places = [os.environ.get("PATH", ""), os.path.join(os.environ.get("CUDA_HOME", ""), "bin")]
    if (triton := importlib.util.find_spec("triton")) and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which("cuobjdump", path=os.pathsep.join(places))


def kernels(extension: Path, cuobjdump: str) -> list[Kernel]:
    """All kernels in `extension` except those of CUDA's own library."""
    command = [cuobjdump, "--dump-resource-usage", extension]
    dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found, arch = [], ""
    for line in dump.splitlines():
        if match := re.match(r"\s*arch = (\S+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif "REG:" in line and "cub" not in name:
            used = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
            sizes = (used[key] for key in ("REG", "STACK", "LOCAL", "SHARED"))
            found.append(Kernel(readable(name), arch, *sizes))
    return sorted(found)


def readable(symbol: str) -> str:
    """`kernel<type>` from the mangled name of a kernel in a (nested) namespace.

    `kernel<type, type>` where the gradient has another type than the logits.
    """
    parts, rest = [], symbol.removeprefix("_ZN")
    while match := re.match(r"(\d+)", rest):
        begin, size = match.end(), int(match[1])
        parts.append(rest[begin : begin + size])
        rest = rest[begin + size :]
    if not rest.startswith("I"):
        return parts[-1]
    half = next((t for t in ("BFloat16", "Float16") if t in rest), "")
    types = [t for t in ("float" if rest.startswith("If") else "", half) if t]
    return f"{parts[-1]}<{', '.join(types)}>"


def compiler(extension: Path) -> str | None:
    """Release and version of the nvcc that built `extension`, as its machine code notes them."""
    note = re.search(rb"Cuda compilation tools, (release [\d.]+, V[\d.]+)", extension.read_bytes())
    return note[1].decode() if note else None


def sources() -> list[Path]:
    """All that the CUDA kernels are compiled from."""
    return sorted([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.cu*")])


def sources_hash() -> str:
    """SHA-256 of the names and the code of the sources; comments and spaces do not count."""
    hashed = hashlib.sha256()
    for path in sources():
        code = re.sub(r"//.*|/\*.*?\*/|\\$", "", path.read_text(), flags=re.MULTILINE)
        hashed.update(" ".join([path.name, *code.split()]).encode() + b"\0")
    return hashed.hexdigest()


def commit() -> str | None:
    """The commit that changed the sources last, with a + where they differ from it."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words, "--", *map(str, sources())]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    last = git("log", "-1", "--format=%h")
    return last + ("+" if git("status", "--porcelain") else "") if last else None


def write_json(path: Path, extension: Path, rows: list[Kernel]) -> None:
    """The rows, one a line, below what they were measured from."""
    head = {
        "compiler": compiler(extension),
        "archs": sorted({row.arch for row in rows}),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "sources": sources_hash(),
    }
    lines = ",\n".join(f"  {json.dumps(row._asdict())}" for row in rows)
    path.write_text(f'{json.dumps(head, indent=1)[:-2]},\n "kernels": [\n{lines}\n ]\n}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extension", type=Path, help="the built extension, spo_kernels/_C*.so")
    parser.add_argument("--json", type=Path, help="write the rows there instead of a table")
    arguments = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        sys.exit("cuobjdump was not found on PATH, in CUDA_HOME or in the Triton package")
    rows = kernels(arguments.extension, cuobjdump)
    if arguments.json:
        write_json(arguments.json, arguments.extension, rows)
        return
    print("| kernel | arch | registers | stack | local | static shared |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
