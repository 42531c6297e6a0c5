"""Launches of Triton kernels that run the PTX which Triton makes of them, on CPU tensors."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch
import triton
from ptx_machine import Machine
from ptx_memory import Global
from ptx_source import code_of
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import JITFunction, jit

from spo_kernels import dispatch

TARGET = GPUTarget("cuda", 90, 32)
CODES = {"fp32": "f", "fp64": "d", "i32": "i", "i64": "q", "u1": "?", "i1": "?"}  # else an address
# Triton's own, since what it makes of an argument decides what it compiles: 1 becomes a constant.
SPECIALISES = hasattr(jit, "create_function_from_signature") and hasattr(JITFunction, "_pack_args")


def install(monkeypatch: Any, order: str = "together") -> list[str]:
    """Makes `backend="triton"` run so; the kernels that have run, in order."""
    ran: list[str] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        ran.append(kernel.__name__)
        launch(kernel, args, grid[0], options, order)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(dispatch, "_reasons", {})
    monkeypatch.setattr(dispatch, "_interpreted", lambda backend: backend == "triton")
    return ran


def launch(kernel: Any, args: Any, programs: int, options: dict[str, Any], order: str) -> None:
    """Compiles the kernel for these arguments, as a launch would, and runs its PTX."""
    backend = make_backend(TARGET)
    bind = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, special, rest = bind(*args, **options)
    packed = kernel._pack_args(backend, options, bound, special, rest)
    options_, signature, constants, attributes = packed
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=TARGET, options=options_.__dict__)
    leaves = []

    def collect(kind: Any, value: Any) -> None:
        if isinstance(kind, tuple):
            for pair in zip(kind, value, strict=True):
                collect(*pair)
        elif kind != "constexpr":
            leaves.append((kind, value))

    collect(tuple(signature.values()), tuple(bound.values()))
    storages = {t.untyped_storage().data_ptr(): t for _, t in leaves if isinstance(t, Tensor)}
    bytes_of = {p: _bytes(t) for p, t in storages.items()}
    memory = Global(8192 + sum(data.size + 1024 for data in bytes_of.values()))
    places = {pointer: memory.allocate(data.size) for pointer, data in bytes_of.items()}
    for pointer, data in bytes_of.items():
        memory.put(places[pointer], data)
    format_, values = "=", []
    for kind, value in leaves:
        code = CODES.get(kind, "q")
        format_ += "x" * (-struct.calcsize(format_) % struct.calcsize(code)) + code
        if isinstance(value, Tensor):
            begin = value.untyped_storage().data_ptr()
            value = places[begin] + value.data_ptr() - begin
        values.append(value)
    format_ += "x" * (-struct.calcsize(format_) % 8) + "2q"  # scratch memory, which is not used
    params = np.frombuffer(struct.pack(format_, *values, 0, 0), np.uint8)
    parsed, code = code_of(binary.asm["ptx"], binary.metadata.name)
    threads, shared = 32 * binary.metadata.num_warps, binary.metadata.shared
    Machine(parsed, memory, programs, threads, shared_bytes=shared, params=params, order=order).run(
        *code
    )
    for pointer, data in bytes_of.items():
        data[:] = memory.bytes[places[pointer] :][: data.size]


def _bytes(tensor: Tensor) -> np.ndarray:
    return torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
