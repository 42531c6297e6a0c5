"""Which backend runs an op: `cuda` and `cpu` (the native extension), `triton`, or `reference`.

A backend has an op if it follows the naming rule: the extension `spo_kernels._C` has the function
`<op>_cpu` or `<op>_cuda`, the package `spo_kernels.triton` has the module `<op>`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from spo_kernels.workspace import run_checked

_C: ModuleType | None
try:
    _C = importlib.import_module("spo_kernels._C")
except ImportError as error:  # installed with SPO_BUILD_NATIVE=0, or built for another Python
    _C = None
    _NO_NATIVE = f"the native extension spo_kernels._C was not found ({error})"

OPS = ("policy_loss", "logprobs", "segments", "tree", "gae")
BACKENDS = ("cuda", "triton", "cpu", "reference")  # in the order `choose` tries them
SIBLINGS = {  # kernels that stand in the Triton module of an op with another name
    "logprobs_backward": "logprobs",
    **{f"policy_{phase}": "policy_loss" for phase in ("prepare", "finish", "step")},
    "segment_advantages": "segments",
    "tree_advantages": "tree",
    "tree_stats": "tree",
}


def native() -> ModuleType:
    """The native extension. Raises RuntimeError if it was not built."""
    if _C is None:
        raise RuntimeError(_NO_NATIVE)
    return _C


NOWHERE = contextlib.nullcontext()
# Dictionaries, since torch.compile cannot trace functools.cache.
_reasons: dict[tuple[str, str], str] = {}
_chosen: dict[tuple[str, str, bool], str] = {}


def unavailable(op: str, backend: str) -> str:
    """Why `backend` cannot run `op` in this installation; an empty string if it can."""
    if (op, backend) not in _reasons:
        _reasons[op, backend] = _find_reason(op, backend)
    return _reasons[op, backend]


def _find_reason(op: str, backend: str) -> str:
    if backend == "reference":
        return ""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if importlib.util.find_spec(f"spo_kernels.triton.{op}") is None:
            return "this op has no Triton kernel"
    elif _C is None:
        return _NO_NATIVE
    elif backend == "cuda" and not _C.has_cuda:
        return "the native extension was built without CUDA"
    elif not hasattr(_C, f"{op}_{backend}"):
        return f"this op has no {backend} kernel"
    if backend != "cpu" and not (torch.cuda.is_available() or _interpreted(backend)):
        return "PyTorch finds no GPU"
    if backend == "cuda" and (problem := native().cuda_problem()):
        return f"CUDA cannot run the extension's kernels here: {problem}"
    return ""


def _interpreted(backend: str) -> bool:
    """Whether Triton interprets kernels on CPU tensors: slow, for tests, only if asked by name."""
    return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def backends() -> dict[str, dict[str, str]]:
    """What can run here: for every op and backend "available", or the reason why not."""
    return {op: {b: unavailable(op, b) or "available" for b in BACKENDS} for op in OPS}


def choose(op: str, tensor: Tensor, backend: str | None = None) -> str:
    """The backend that runs `op` on tensors like `tensor`: `backend`, else the first that can.

    Raises ValueError with the reason if `backend` is unknown or cannot run. It never falls back.
    """
    if backend is None:
        key = (op, tensor.device.type, tensor.dtype == torch.float64)
        if key not in _chosen:
            able = (b for b in BACKENDS if not _interpreted(b) and not _refusal(op, b, tensor))
            _chosen[key] = next(able)
        return _chosen[key]
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, found {backend!r}")
    if reason := _refusal(op, backend, tensor):
        raise ValueError(f"backend={backend!r} cannot run {op}: {reason}")
    return backend


def _refusal(op: str, backend: str, tensor: Tensor) -> str:
    if reason := unavailable(op, backend):
        return reason
    if backend == "reference":
        return ""
    device = "cpu" if backend == "cpu" or _interpreted(backend) else "cuda"
    if tensor.device.type != device:
        return f"expected tensors on {device}, found {tensor.device.type}"
    if tensor.dtype == torch.float64:
        return "float64 runs on the reference only"
    return ""


def launch(kernel: str, backend: str, struct: str, **fields: Any) -> Any:
    """Run a kernel: `<kernel>_<backend>` of the extension, or `<kernel>` of the Triton package.

    Native kernels take the argument struct of csrc/ops.h that `struct` names: a tensor becomes its
    address, None a null pointer, and every tensor must stay alive in the caller. Triton kernels
    take the fields as keyword arguments.
    """
    if backend == "triton":
        return run_triton(kernel, fields)
    args = getattr(native(), struct)()
    return run_native(kernel, backend, args, assign(args, fields))


def run_triton(kernel: str, fields: Mapping[str, Any]) -> Any:
    """Run a kernel of the Triton package."""
    op = SIBLINGS.get(kernel, kernel)
    return getattr(importlib.import_module(f"spo_kernels.triton.{op}"), kernel)(**fields)


def assign(args: Any, fields: Mapping[str, Any]) -> torch.device | None:
    """Fill fields of a native argument struct that are not None; the device of the tensors."""
    device = None
    for name, value in fields.items():
        if isinstance(value, Tensor):
            device, value = value.device, value.data_ptr()
        if value is not None:
            setattr(args, name, value)
    return device


def run_native(kernel: str, backend: str, args: Any, device: torch.device | None) -> Any:
    """Run a kernel of the extension, on the tensors' device and PyTorch's current stream there."""
    run = getattr(native(), f"{kernel}_{backend}")
    if backend == "cpu":
        if hasattr(args, "num_threads"):
            args.num_threads = torch.get_num_threads()
        return run(args)
    assert device is not None  # a GPU's kernel has tensors
    with torch.cuda.device(device) if device.index != torch.cuda.current_device() else NOWHERE:
        args.stream = torch._C._cuda_getCurrentRawStream(device.index)
        if hasattr(args, "workspace"):
            return run_checked(native(), kernel, args, device)
        return run(args)
