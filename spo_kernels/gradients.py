"""Autograd of ops that compute their gradient in the forward and return it as an output.

The loss is a scalar, so the backward only multiplies the gradient by `grad_output`. It passes the
gradient on without a copy: nothing else refers to it, so a leaf tensor takes it as its `.grad`.

Gradients of fp16 inputs are formed times a power of two, which the backward takes out again: a loss
scaler's factor reaches them only then, when small ones would be gone. A norm that is known only
after the rows is divided by there too.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _autograd

from spo_kernels import dispatch, rows
from spo_kernels.library import Op, define

PLAIN = (Tensor, torch.nn.Parameter)


@define("scale(Tensor(a!) grad, Tensor factor, Tensor? unscale) -> ()")
def scale(grad: Tensor, factor: Tensor, unscale: Tensor | None) -> None:
    """grad *= factor * unscale, () fp32 tensors; a product of 1 costs no pass over the gradient."""
    torch.autograd.graph.increment_version(grad)
    if grad.numel() == 0:
        return
    if grad.is_cuda and not dispatch.unavailable("policy_loss", "cuda"):
        _scale_on_device(grad, factor, unscale)
    elif grad.is_cuda and grad.is_contiguous() and not dispatch.unavailable("scale", "triton"):
        dispatch.run_triton("scale", {"grad": grad, "factor": factor.float(), "unscale": unscale})
    elif grad.is_cuda:
        grad.copy_(_product(grad, factor, unscale, grad.dtype))
    elif (number := factor.item() * (1.0 if unscale is None else unscale.item())) != 1:
        grad.mul_(number)


@scale.register_fake
def _(grad: Tensor, factor: Tensor, unscale: Tensor | None) -> None:
    return None


def _scale_on_device(grad: Tensor, factor: Tensor, unscale: Tensor | None) -> None:
    """One kernel that reads the factor on the device: no host sync."""
    if grad.is_contiguous():
        lines, layout = 1, (1, 0, 0)
    else:
        lines, layout = grad.numel() // grad.shape[-1], rows.strided_rows(grad)[1]
    dispatch.launch(
        "scale",
        "cuda",
        "ScaleArgs",
        rows=lines,
        vocab=grad.numel() // lines,
        grad=grad,
        dtype=rows.DTYPES.index(grad.dtype),
        layout=layout,
        factor=factor.float(),
        unscale=unscale,
    )


def _product(grad: Tensor, factor: Tensor, unscale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """grad * factor * unscale in fp32, rounded once."""
    product = grad.float() * (factor if unscale is None else factor * unscale)
    return product.to(dtype)


def unscale(figures: Tensor) -> Tensor:
    """The number by which the backward multiplies the gradients, () fp32."""
    return figures[9].detach()


def one_pass(op: Op, grads: dict[int, int]) -> Callable[..., Any]:
    """`op`, differentiable: output 0 is the loss, output 1 the figures, and `grads` maps each input
    to the output that is its gradient.

    torch.compile, fake tensors and other tracers see the op, with the same autograd. Elsewhere a
    plain autograd function calls its kernel: PyTorch's dispatcher costs more than a small loss.
    """

    def setup(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        keep(ctx, inputs, output, grads)

    op.register_autograd(hand_out, setup_context=setup)

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):  # with a setup_context PyTorch inspects the signature each time
            output = op.kernel(*inputs)
            keep(ctx, inputs, output, grads)
            return output

        backward = staticmethod(hand_out)

    def call(*arguments: Any) -> Any:
        traced = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
        traced = traced or torch._C._are_functorch_transforms_active()
        if traced or any(isinstance(x, Tensor) and type(x) not in PLAIN for x in arguments):
            return op(*arguments)
        return Eager.apply(*arguments)

    return call


def keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...], grads: dict[int, int]) -> None:
    """Gradients are attributes, not `save_for_backward`, so that the backward can release them."""
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # else autograd fills zeros as large as the gradients
    ctx.num_inputs = len(inputs)
    ctx.formed = {
        i: output[o].detach()
        for i, o in grads.items()
        if inputs[i] is not None and inputs[i].shape == output[o].shape  # else it was not wanted
    }
    ctx.dtypes = {i: inputs[i].dtype for i in ctx.formed}
    ctx.unscale = unscale(output[1])
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
    formed, factor, unscale = ctx.formed, grad_output, ctx.unscale
    traced = any(type(grad) is not Tensor for grad in formed.values())
    held = any(holder() is not None for holder in ctx.holders)  # by a direct caller of the op
    kept = traced or held or _autograd._get_current_graph_task_keep_graph()
    if not kept:
        ctx.formed = None
    handed: dict[int, Tensor] = {}
    for i, grad in formed.items():
        if kept or grad.dtype != ctx.dtypes[i]:
            handed[i] = _product(grad, factor, unscale, ctx.dtypes[i])
        else:
            scale.kernel(grad, factor, unscale)
            handed[i] = grad
    return tuple(handed.get(i) for i in range(ctx.num_inputs))


class _Overwritten(torch.autograd.Function):
    """Stands behind later uses of an overwritten tensor: a gradient that comes here is wrong."""

    @staticmethod
    def forward(ctx, logits):
        ctx.mark_dirty(logits)
        ctx.set_materialize_grads(False)
        return logits

    @staticmethod
    def backward(ctx, *grads):
        (grad,) = grads
        if grad is not None and grad.any():  # zeros: only other parts of the logits' base were used
            raise RuntimeError(
                "inplace_grad=True: the logits were used after the loss, when they held their "
                "gradient; use them before the loss or leave inplace_grad out"
            )
        return grad


def guard_overwritten(loss: Tensor, logits: Tensor) -> None:
    """Make later uses of logits (..., V) that hold their gradient raise in a backward.

    The loss keeps its edge to the op that made the logits; other ops get `_Overwritten` instead.
    """
    _Overwritten.apply(logits)
    vars(loss.grad_fn)["version"] = logits._version


def hand_out_overwritten(ctx: Any, grad_output: Tensor) -> Tensor:
    """`backward` of a loss whose gradient lies in `ctx.dlogits`: times grad_output.

    Raises RuntimeError if anything wrote there since the loss.
    """
    refuse_second_order(grad_output)
    if ctx.version != ctx.dlogits._version:
        raise RuntimeError(
            "inplace_grad=True: something wrote to the logits after the loss, when they held their "
            "gradient (another op, or an earlier backward of this loss); leave inplace_grad out"
        )
    scale(ctx.dlogits, grad_output, ctx.unscale)
    return ctx.dlogits
