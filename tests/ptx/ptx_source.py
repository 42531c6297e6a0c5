"""The PTX that nvcc makes of csrc/cuda, and the argument structs of csrc/ops.h."""

from __future__ import annotations

import functools
import os
import re
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from ptx_compile import Compiler
from ptx_program import Kernel, read_kernel

ROOT = Path(__file__).resolve().parents[2]
PLACES = [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
PLACES += [os.path.join(os.environ.get(name, ""), "bin") for name in ("CUDA_HOME", "CUDA_PATH")]
NVCC = shutil.which("nvcc", path=os.pathsep.join(PLACES))
SCALARS = {"int64_t": "q", "int32_t": "i", "float": "f", "double": "d", "bool": "?", "uint8_t": "B"}


@functools.cache
def ptx_of(source: str, arch: int = 90) -> str:
    """The PTX of csrc/cuda/<source>.cu, by the flags of CMakeLists.txt."""
    assert NVCC is not None
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.ptx"
        flags = ["-std=c++17", "-O3", "-DNDEBUG", "-ptx", f"-arch=compute_{arch}", f"-I{ROOT}"]
        command = [NVCC, *flags, ROOT / "csrc" / "cuda" / f"{source}.cu", "-o", out]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return out.read_text()


@functools.cache
def code_of(text: str, name: str) -> tuple[Kernel, Any]:
    """A kernel of a PTX file, and what `Machine.run` takes."""
    kernel = read_kernel(text, name)
    return kernel, Compiler(kernel).compile()


@functools.cache
def fields_of(name: str) -> tuple[list[tuple[str, str, int, Any]], int]:
    """Name, type, offset and initial value of the fields of a struct of csrc/ops.h; its size."""
    text = (ROOT / "csrc" / "ops.h").read_text()

    def entries(macro: str) -> list[tuple[str, str, str]]:
        body = re.search(rf"#define {macro}\(.*?\)(.*?[^\\])\n", text, re.DOTALL)
        assert body is not None, macro
        pattern = r"(SPO_\w+_FIELDS)\(|PER_TOKEN\((\w+),|FIELD\(([^,]+), (\w+), ([^)]+)\)"
        found = []
        for nested, array, kind, field, initial in re.findall(pattern, body[1]):
            found += (
                entries(nested) if nested else [(array or field, kind or "const float*", initial)]
            )
        return found

    known = {"INFINITY": float("inf"), "true": True, "{}": (1, 0, 0)}
    struct_of = re.search(rf"struct {name} {{\s*(SPO_\w+_FIELDS)\(", text)
    assert struct_of is not None, name
    end, rows = 0, []
    for field, kind, initial in entries(struct_of[1]):
        code = code_of_type(kind)
        size, align = struct.calcsize(code), min(struct.calcsize(code), 8)
        end = -(-end // align) * align
        number = re.fullmatch(r"-?\d+", initial)
        rows.append((field, kind, end, int(initial) if number else known.get(initial, 0)))
        end += size
    return rows, -(-end // 8) * 8


def code_of_type(kind: str) -> str:
    """For `struct`."""
    return "3q" if kind == "RowLayout" else SCALARS.get(kind, "q")


class Arguments:
    """An argument struct; `dispatch.assign` sets its fields, tensors as they are."""

    def __init__(self, struct_name: str):
        self.struct = struct_name
        self.given: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return self.given.get(name)
