"""What the public losses and logprobs do before all else with arguments that kernels cannot take.

Transforms (torch.func, forward-mode AD) are refused unless the reference runs: an op without such a
derivative would give 0. Tensors that are distributed over processes go to `sharded.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

from spo_kernels.gradients import PLAIN

P = ParamSpec("P")
R = TypeVar("R")


def entry(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function whose tensors may be transformed."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not torch.compiler.is_compiling():
            refuse_transforms(function.__name__, (*args, *kwargs.values()), kwargs.get("backend"))
        return function(*args, **kwargs)

    return call


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
