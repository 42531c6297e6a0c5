"""Autograd of ops that compute their gradient in the forward and return it as an output.

The loss is a scalar, so the backward only multiplies the gradient by `grad_output`. It passes the
gradient on without a copy: nothing else refers to it, so a leaf tensor takes it as its `.grad`.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd

from spo_kernels.library import define


@define("scale(Tensor(a!) grad, Tensor factor) -> ()")
def scale(grad: Tensor, factor: Tensor) -> None:
    """grad *= factor, a () tensor; on the CPU a factor of 1 costs nothing."""
    torch.autograd.graph.increment_version(grad)
    if factor.device.type != "cpu" or factor.item() != 1:
        grad.mul_(factor)


@scale.register_fake
def _(grad: Tensor, factor: Tensor) -> None:
    return None


def keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...], grads: dict[int, int]) -> None:
    """`setup_context`: output 0 is the loss, `grads` maps each input to the output of its gradient.

    Gradients are attributes, not `save_for_backward`, so that the backward can release them.
    """
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else autograd fills zeros as large as the gradients
    ctx.num_inputs = len(inputs)
    ctx.formed = {
        i: output[o].detach()
        for i, o in grads.items()
        if inputs[i] is not None and inputs[i].shape == output[o].shape  # else it was not wanted
    }
    ctx.holders = [weakref.ref(output[o]) for o in grads.values()]


def refuse_second_order(grad: Tensor) -> None:
    """Raise RuntimeError in a backward with create_graph=True.

    The gradients carry no graph, so a second derivative would silently be zero. `grad` is one of
    the backward's gradients; torch.compile and other tracers may go on.
    """
    traced = torch.compiler.is_compiling() or type(grad) is not Tensor
    if torch.is_grad_enabled() and not traced:
        raise RuntimeError(
            "create_graph=True needs second derivatives, which the kernels of spo_kernels do not "
            "have; use backend='reference'"
        )


def hand_out(ctx: Any, grad_output: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """`backward`: the gradients times grad_output."""
    refuse_second_order(grad_output)
    if ctx.formed is None:
        raise RuntimeError(
            "the gradients of this loss were released by an earlier backward; "
            "pass retain_graph=True to every backward but the last"
        )
    formed = ctx.formed
    traced = any(type(grad) is not Tensor for grad in formed.values())
    held = any(holder() is not None for holder in ctx.holders)  # by a direct caller of the op
    if traced or held or _autograd._get_current_graph_task_keep_graph():
        formed = {i: grad * grad_output for i, grad in formed.items()}
    else:
        ctx.formed = None
        for grad in formed.values():
            scale(grad, grad_output)
    return tuple(formed.pop(i, None) for i in range(ctx.num_inputs))
