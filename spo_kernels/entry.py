"""What the public losses and logprobs do before all else with arguments that kernels cannot take.

Transforms (torch.func, forward-mode AD) are refused unless the reference runs: an op without such a
derivative would give 0. Tensors that are distributed over processes go to `sharded.py`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

from spo_kernels.gradients import PLAIN
from spo_kernels.head_weight import warn_about

P = ParamSpec("P")
R = TypeVar("R")


def entry(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function whose tensors may be transformed."""

    is_head = "hidden" in function.__annotations__

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        arguments = (*args, *kwargs.values())
        if not torch.compiler.is_compiling():
            refuse_transforms(function.__name__, arguments, kwargs.get("backend"))
            if is_head:
                weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
                refuse_flat(weight)
                warn_about(weight)
        odd = [x for x in arguments if isinstance(x, Tensor) and type(x) not in PLAIN]
        if odd and any(is_distributed(x) for x in odd):
            return importlib.import_module("spo_kernels.sharded").call(function, args, kwargs)
        return function(*args, **kwargs)

    return call


def is_distributed(x: Tensor) -> bool:
    """Whether it is a DTensor: their package takes long to import, so it is not imported here."""
    package = sys.modules.get("torch.distributed.tensor")
    return package is not None and isinstance(x, package.DTensor)


def refuse_flat(weight: Any) -> None:
    """Raise ValueError for a parameter of FSDP1 that is not gathered: flat, or without memory."""
    if type(weight) not in PLAIN or torch._C._are_functorch_transforms_active():
        return
    flat = weight.ndim != 2 and hasattr(weight, "_fsdp_flattened")
    if flat or (weight.numel() > 0 and weight.untyped_storage().size() == 0):
        raise ValueError(
            "weight: expected the whole matrix (V, D), found what FullyShardedDataParallel keeps "
            "outside its forward; call the loss inside, as FusedPolicyLoss does"
        )


def refuse_transforms(name: str, arguments: tuple[Any, ...], backend: Any) -> None:
    """Raise RuntimeError if an argument is traced by torch.func or carries a forward-mode tangent,
    and it is not the reference that runs.

    Costs two checks where no transform is active.
    """
    if not (torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0):
        return
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    if backend == "reference" or (backend is None and tensors[0].dtype == torch.float64):
        return
    if any(_functorch.is_functorch_wrapped_tensor(x) or _has_tangent(x) for x in tensors):
        raise RuntimeError(
            f"{name}: the kernels have no torch.func transforms (grad, vmap, jvp) and no "
            "forward-mode derivative; use backend='reference'"
        )


def _has_tangent(x: Tensor) -> bool:
    if forward_ad._current_level < 0 or type(x) not in PLAIN:
        return False
    return forward_ad.unpack_dual(x).tangent is not None
