"""Logprobs of given tokens, and entropies, from logits; also what the op from hidden states uses.

Reference, op schemas with their fake and autograd, public function, in that order.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from spo_kernels import dispatch, gradients, memory
from spo_kernels import rows as _rows
from spo_kernels.library import define


def token_logprobs_ref(
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (N,) int64
    mask: Tensor,  # (N,) bool
    temperature: Tensor,  # (N,) or (1,)
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:  # (N,), (N,)
    """`token_logprobs` in differentiable PyTorch; fp64 for fp64 logits."""
    shape = logits.shape[:-1]
    _rows.check_rows(ids, temperature, mask, logits.shape[-1])
    index = mask.nonzero().squeeze(1)
    kept = logits[torch.unravel_index(index, shape)] if len(shape) else logits[None][index]
    return reference(kept, ids, index, temperature, entropy)


def reference(
    logits: Tensor, ids: Tensor, index: Tensor, temperature: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    n = ids.shape[0]
    chosen = temperature if temperature.shape[0] == 1 else temperature[index]
    logprobs, row_entropy = _rows.logprobs_of(logits, ids[index], chosen, entropy)
    logprobs = logprobs.new_zeros(n).index_put((index,), logprobs)
    if row_entropy is not None:
        row_entropy = row_entropy.new_zeros(n).index_put((index,), row_entropy)
    return logprobs, row_entropy


TOKENS = "Tensor ids, Tensor mask, Tensor temperature, bool with_entropy, str backend"
SAVED = "Tensor logprobs, Tensor entropy, Tensor row_max, Tensor row_logsum"
RESULTS = f"({SAVED})"
GRADS = "Tensor grad_logprobs, Tensor? grad_entropy"


def run_rows(kernel: str, backend: str, logits: Tensor, ids: Tensor, **fields: Any) -> None:
    """Run the forward or backward kernel over logits (..., V); `fields` holds the other buffers."""
    if ids.numel() == 0:
        return
    vocab = logits.shape[-1]
    if "dlogits" in fields:
        fields |= _rows.gradient_rows(fields["dlogits"], logits)
    logits, layout = _rows.strided_rows(logits)
    dispatch.launch(
        kernel,
        backend,
        "LogprobsArgs",
        rows=ids.numel(),
        vocab=vocab,
        dtype=_rows.DTYPES.index(logits.dtype),
        logits=logits,
        logits_layout=layout,
        token_ids=ids,
        temperature_stride=int(fields["temperature"].numel() > 1),
        **{name: _null_if_empty(value) for name, value in fields.items()},
    )


def _null_if_empty(value: Any) -> Any:
    return None if isinstance(value, Tensor) and value.numel() == 0 else value


def new_results(like: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    n = ids.numel()
    return tuple(
        like.new_empty(size, dtype=torch.float32) for size in (n, n if entropy else 0, n, n)
    )


NAMES = ("logprobs", "entropy", "row_max", "row_logsum")


@define(f"logprobs(Tensor logits, {TOKENS}) -> {RESULTS}")
def _logprobs(logits, ids, mask, temperature, entropy, backend):
    _rows.check_rows(ids, temperature, mask, logits.shape[-1])
    results = new_results(logits, ids, entropy)
    buffers = dict(zip(NAMES, results, strict=True))
    run_rows("logprobs", backend, logits, ids, mask=mask, temperature=temperature, **buffers)
    return results


@_logprobs.register_fake
def _(logits, ids, mask, temperature, entropy, backend):
    return new_results(logits, ids, entropy)


@define(f"logprobs_backward(Tensor logits, {TOKENS}, {SAVED}, {GRADS}) -> Tensor")
def _logprobs_backward(logits, ids, mask, temperature, entropy, backend, *saved_and_grads):
    names = (*NAMES, "grad_logprobs", "grad_entropy")
    buffers = dict(zip(names, saved_and_grads, strict=True))
    dlogits = memory.empty(logits.shape, logits.dtype, logits.device)
    run_rows(
        "logprobs_backward",
        backend,
        logits,
        ids,
        mask=mask,
        temperature=temperature,
        dlogits=dlogits,
        **buffers,
    )
    return dlogits


@_logprobs_backward.register_fake
def _(logits, *others):
    return logits.new_empty(logits.shape)


def save(ctx, inputs, output):
    *_, entropy, _ = inputs
    ctx.mark_non_differentiable(*output[2 if entropy else 1 :])
    ctx.set_materialize_grads(False)
    ctx.inputs = tuple(None if isinstance(x, Tensor) else x for x in inputs)
    ctx.is_tensor = tuple(isinstance(x, Tensor) for x in inputs)
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *output)


def restore(ctx) -> tuple[list[Any], tuple[Tensor, ...]]:
    """The inputs and outputs that `save` saved."""
    saved = iter(ctx.saved_tensors)
    inputs = [
        next(saved) if tensor else x for tensor, x in zip(ctx.is_tensor, ctx.inputs, strict=True)
    ]
    return inputs, tuple(saved)


def row_grads(
    logprobs: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the two results as the kernels take them; None is zero."""
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(logprobs)
    return grad_logprobs.contiguous(), None if grad_entropy is None else grad_entropy.contiguous()


def _logprobs_grad(ctx, grad_logprobs, grad_entropy, *_):
    inputs, output = restore(ctx)
    grads = row_grads(output[0], grad_logprobs, grad_entropy)
    gradients.refuse_second_order(grads[0])
    dlogits = _logprobs_backward(*inputs, *output, *grads)
    return dlogits, *[None] * (len(inputs) - 1)


_logprobs.register_autograd(_logprobs_grad, setup_context=save)


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    loss_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    *,
    loss_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    logits: Tensor,  # (..., V) fp32, bf16, fp16 or fp64, raw: not divided by the temperature
    token_ids: Tensor,  # (...) int32 or int64, logits[i] predicts token_ids[i]
    *,
    loss_mask: Tensor | None = None,  # (...) bool, integer or float; 0 = not computed
    temperature: float | Tensor = 1.0,  # a number, or a tensor that broadcasts; (B,) per sequence
    entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # (...) fp32 (fp64 from fp64), or that and the entropy (...)
    """log_softmax(logits / temperature) at token_ids; with `entropy=True` also the entropy.

    Both are differentiable. Masked tokens have logprob 0; their logits are not read, and the
    gradient of these logits is 0.

    Raises TypeError for wrong types; ValueError for wrong shapes, for an id outside [0, V) or a
    temperature that is not positive and finite where the mask is set, and for a `backend` that
    cannot run. A backward with create_graph=True raises RuntimeError: the kernels have no second
    derivative.
    """
    _rows.check_floating("logits", logits)
    shape = logits.shape[:-1]
    ids, mask, heat = prepare("logits", logits, shape, token_ids, loss_mask, temperature)
    chosen = dispatch.choose("logprobs", logits, backend)
    if chosen == "reference":
        logprobs, row_entropy = token_logprobs_ref(logits, ids, mask, heat, entropy)
    else:
        logprobs, row_entropy, *_ = _logprobs(logits, ids, mask, heat, entropy, chosen)
    return shaped(logprobs, row_entropy if entropy else None, shape)


def prepare(
    name: str,
    like: Tensor,
    shape: tuple[int, ...],
    token_ids: Tensor,
    loss_mask: Tensor | None,
    temperature: float | Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Check and flatten the per-token arguments: ids (N,), mask (N,), temperature (N,) or (1,)."""
    _rows.check_floating(name, like)
    _rows.check_devices(like, token_ids=token_ids, loss_mask=loss_mask, temperature=temperature)
    _rows.check_tensors(token_ids=token_ids)
    _rows.check_optional_tensors(loss_mask=loss_mask)
    ids = _rows.flat_ids("token_ids", token_ids, shape).long()
    mask = _rows.flat_mask("loss_mask", loss_mask, shape)
    mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    dtype = _rows.math_dtype(like)
    heat = _rows.flat_temperature(temperature, shape, dtype)
    if heat is None:
        heat = torch.full((1,), float(temperature), dtype=dtype, device=like.device)
    return ids, mask, heat


def shaped(
    logprobs: Tensor, entropy: Tensor | None, shape: tuple[int, ...]
) -> Tensor | tuple[Tensor, Tensor]:
    """What the public functions return."""
    if entropy is None:
        return logprobs.reshape(shape)
    return logprobs.reshape(shape), entropy.reshape(shape)
