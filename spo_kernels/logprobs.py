"""Logprobs of given tokens, and entropies, from logits; also what the op from hidden states uses.

Reference, op schemas with their fake and autograd, public function, in that order.
"""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from spo_kernels import dispatch, gradients, memory, static
from spo_kernels import rows as _rows
from spo_kernels.entry import entry
from spo_kernels.library import define


def token_logprobs_ref(
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (N,) int64
    mask: Tensor,  # (N,) bool
    temperature: Tensor,  # (N,) or (1,)
    entropy: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # (N,), (N,)
    """`token_logprobs` in differentiable PyTorch; fp64 for fp64 logits."""
    shape = logits.shape[:-1]
    if _rows.is_unreadable(logits):
        flat = logits.reshape(-1, logits.shape[-1])
        scaling = (logit_scale, logit_softcap)
        return static.logprobs(flat, ids, mask, temperature, entropy, *scaling)
    _rows.check_rows(ids, temperature, mask, logits.shape[-1])
    index = mask.nonzero().squeeze(1)
    kept = logits[torch.unravel_index(index, shape)] if len(shape) else logits[None][index]
    return reference(kept, ids, index, temperature, entropy, logit_scale, logit_softcap)


def reference(
    logits: Tensor,  # (n, V) of the rows `index` only
    ids: Tensor,  # (N,)
    index: Tensor,  # (n,)
    temperature: Tensor,  # (N,) or (1,)
    entropy: bool,
    logit_scale: float,
    logit_softcap: float | None,
) -> tuple[Tensor, Tensor | None]:  # (N,), (N,)
    n = ids.shape[0]
    chosen = temperature if temperature.shape[0] == 1 else temperature[index]
    logprobs, row_entropy = _rows.logprobs_of(
        logits, ids[index], chosen, entropy, logit_scale, logit_softcap
    )
    logprobs = logprobs.new_zeros(n).index_put((index,), logprobs)
    if row_entropy is not None:
        row_entropy = row_entropy.new_zeros(n).index_put((index,), row_entropy)
    return logprobs, row_entropy


TOKENS = (
    "Tensor ids, Tensor mask, Tensor temperature, float logit_scale, float? logit_softcap, "
    "bool with_entropy, str backend"
)
SAVED = "Tensor logprobs, Tensor entropy, Tensor row_max, Tensor row_logsum"
RESULTS = f"({SAVED})"
GRADS = "Tensor grad_logprobs, Tensor? grad_entropy"


def run_rows(
    kernel: str,
    backend: str,
    logits: Tensor,  # (..., V)
    ids: Tensor,  # (N,) int64
    temperature: Tensor,  # (N,) or (1,)
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **fields: Any,
) -> None:
    """Run the forward or backward kernel; `fields` holds the other buffers."""
    if ids.numel() == 0:
        return
    vocab = logits.shape[-1]
    divisor, tanh_scale = _rows.scaling(logit_scale, logit_softcap)
    temperature = temperature if divisor == 1 else temperature / divisor
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
        temperature=temperature,
        temperature_stride=int(temperature.numel() > 1),
        tanh_scale=tanh_scale,
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
def _logprobs(logits, ids, mask, temperature, logit_scale, logit_softcap, entropy, backend):
    _rows.check_rows(ids, temperature, mask, logits.shape[-1])
    results = new_results(logits, ids, entropy)
    buffers = dict(zip(NAMES, results, strict=True))
    scales = (temperature, logit_scale, logit_softcap)
    run_rows("logprobs", backend, logits, ids, *scales, mask=mask, **buffers)
    return results


@_logprobs.register_fake
def _(logits, ids, *others):
    return new_results(logits, ids, others[-2])


@define(f"logprobs_backward(Tensor logits, {TOKENS}, {SAVED}, {GRADS}) -> Tensor")
def _logprobs_backward(logits, *tokens_and_saved):
    ids, mask, temperature, logit_scale, logit_softcap, _, backend, *saved = tokens_and_saved
    names = (*NAMES, "grad_logprobs", "grad_entropy")
    buffers = dict(zip(names, saved, strict=True))
    dlogits = memory.empty(logits.shape, logits.dtype, logits.device)
    scales = (temperature, logit_scale, logit_softcap)
    run_rows(
        "logprobs_backward", backend, logits, ids, *scales, mask=mask, dlogits=dlogits, **buffers
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
    results = output[: len(NAMES)]  # extras have no gradient
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *results)


def restore(ctx) -> tuple[list[Any], tuple[Tensor, ...]]:
    """The inputs and results that `save` saved."""
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
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
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
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    entropy: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@entry
def token_logprobs(
    logits: Tensor,  # (..., V) fp32, bf16, fp16 or fp64, raw: not divided by the temperature
    token_ids: Tensor,  # (...) int32 or int64, logits[i] predicts token_ids[i]
    *,
    loss_mask: Tensor | None = None,  # (...) bool or integer; 0 = not computed
    temperature: float | Tensor = 1.0,  # a number, or a tensor that broadcasts; (B,) per sequence
    logit_scale: float = 1.0,  # Cohere's logit_scale; Granite: 1 / logits_scaling
    logit_softcap: float | None = None,  # Gemma's final_logit_softcapping
    entropy: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # (...) fp32 (fp64 from fp64), or that and the entropy (...)
    """log_softmax(z / temperature) at token_ids; with `entropy=True` also the entropy.

    z = logits * logit_scale, and with a cap z = logit_softcap * tanh(z / logit_softcap).

    Both are differentiable. Masked tokens have logprob 0; their logits are not read, and the
    gradient of these logits is 0.

    Raises TypeError for wrong types; ValueError for wrong shapes, for an id outside [0, V) or a
    temperature that is not positive and finite where the mask is set, for a scale or a cap that is
    not positive and finite, and for a `backend` that cannot run. A backward with create_graph=True
    raises RuntimeError: the kernels have no second derivative.
    """
    _rows.check_floating("logits", logits)
    shape = logits.shape[:-1]
    _rows.check_scaling(logit_scale, logit_softcap)
    ids, mask, heat = prepare("logits", logits, shape, token_ids, loss_mask, temperature)
    chosen = dispatch.choose("logprobs", logits, backend)
    scaling = (logit_scale, logit_softcap)
    if chosen == "reference":
        logprobs, row_entropy = token_logprobs_ref(logits, ids, mask, heat, entropy, *scaling)
    else:
        logprobs, row_entropy, *_ = _logprobs(logits, ids, mask, heat, *scaling, entropy, chosen)
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
