"""Logprob of chosen tokens and entropy, from logits or from hidden states, differentiable.

Reference, op schemas with their fake and autograd, public functions, in that order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spo_kernels import dispatch, gradients, head, memory
from spo_kernels import rows as _rows
from spo_kernels.library import define

MEMORY_BUDGET = 1 << 30  # bytes of logits that the head makes at a time


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
    return _reference(kept, ids, index, temperature, entropy)


def linear_token_logprobs_ref(
    hidden: Tensor,  # (..., D), or (H, D) with hidden_index
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    hidden_index: Tensor | None,  # (N,) int64
    ids: Tensor,  # (N,) int64
    mask: Tensor,  # (N,) bool
    temperature: Tensor,  # (N,) or (1,)
    entropy: bool = False,
) -> tuple[Tensor, Tensor | None]:  # (N,), (N,)
    """`linear_token_logprobs` in differentiable PyTorch: keep rows, project, reference logprobs."""
    _rows.check_rows(ids, temperature, mask, weight.shape[0])
    index = mask.nonzero().squeeze(1)
    states = head.select_states(hidden, hidden_index, index)
    logits = head.linear_ref(hidden.reshape(-1, hidden.shape[-1])[states], weight, bias)
    return _reference(logits, ids, index, temperature, entropy)


def _reference(
    logits: Tensor, ids: Tensor, index: Tensor, temperature: Tensor, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    n = ids.shape[0]
    chosen = temperature if temperature.shape[0] == 1 else temperature[index]
    values = _rows.logprobs_of(logits, ids[index], chosen, entropy)
    return tuple(x if x is None else x.new_zeros(n).index_put((index,), x) for x in values)


_TOKENS = "Tensor ids, Tensor mask, Tensor temperature, bool with_entropy, str backend"
_RESULTS = "(Tensor logprobs, Tensor entropy, Tensor row_max, Tensor row_logsum)"
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? hidden_index"
_SAVED = "Tensor logprobs, Tensor entropy, Tensor row_max, Tensor row_logsum"
_GRADS = "Tensor grad_logprobs, Tensor? grad_entropy"


def _native_rows(kernel: str, backend: str, logits: Tensor, ids: Tensor, **fields: Any) -> None:
    """Run the forward or backward row kernel over logits (..., V) on buffers in `fields`."""
    if ids.numel() == 0:
        return
    vocab = logits.shape[-1]
    logits, layout = _rows.strided_rows(logits)
    if "dlogits" in fields:
        fields["dlogits_dtype"] = _rows.DTYPES.index(fields["dlogits"].dtype)
        fields["dlogits"], fields["dlogits_layout"] = _rows.strided_rows(fields["dlogits"])
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


def _new_results(like: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    n = ids.numel()
    return tuple(
        like.new_empty(size, dtype=torch.float32) for size in (n, n if entropy else 0, n, n)
    )


_NAMES = ("logprobs", "entropy", "row_max", "row_logsum")


@define(f"logprobs(Tensor logits, {_TOKENS}) -> {_RESULTS}")
def _logprobs(logits, ids, mask, temperature, entropy, backend):
    _rows.check_rows(ids, temperature, mask, logits.shape[-1])
    results = _new_results(logits, ids, entropy)
    buffers = dict(zip(_NAMES, results, strict=True))
    _native_rows("logprobs", backend, logits, ids, mask=mask, temperature=temperature, **buffers)
    return results


@_logprobs.register_fake
def _(logits, ids, mask, temperature, entropy, backend):
    return _new_results(logits, ids, entropy)


@define(f"logprobs_backward(Tensor logits, {_TOKENS}, {_SAVED}, {_GRADS}) -> Tensor")
def _logprobs_backward(logits, ids, mask, temperature, entropy, backend, *saved_and_grads):
    names = (*_NAMES, "grad_logprobs", "grad_entropy")
    buffers = dict(zip(names, saved_and_grads, strict=True))
    dlogits = memory.empty(logits.shape, logits.dtype, logits.device)
    _native_rows(
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


def _setup(ctx, inputs, output):
    *_, entropy, _ = inputs
    ctx.mark_non_differentiable(*output[2 if entropy else 1 :])
    ctx.set_materialize_grads(False)
    ctx.inputs = tuple(None if isinstance(x, Tensor) else x for x in inputs)
    ctx.is_tensor = tuple(isinstance(x, Tensor) for x in inputs)
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)), *output)


def _restore(ctx) -> tuple[list[Any], tuple[Tensor, ...]]:
    """The inputs and outputs that `_setup` saved."""
    saved = iter(ctx.saved_tensors)
    inputs = [
        next(saved) if tensor else x for tensor, x in zip(ctx.is_tensor, ctx.inputs, strict=True)
    ]
    return inputs, tuple(saved)


def _row_grads(
    logprobs: Tensor, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the two results as the kernels take them; None stands for zero."""
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(logprobs)
    return grad_logprobs.contiguous(), None if grad_entropy is None else grad_entropy.contiguous()


def _logprobs_grad(ctx, grad_logprobs, grad_entropy, *_):
    inputs, output = _restore(ctx)
    grads = _row_grads(output[0], grad_logprobs, grad_entropy)
    gradients.refuse_second_order(grads[0])
    dlogits = _logprobs_backward(*inputs, *output, *grads)
    return dlogits, *[None] * (len(inputs) - 1)


_logprobs.register_autograd(_logprobs_grad, setup_context=_setup)


@define(
    f"linear_logprobs({_HEAD}, bool[] needs_grad, ScalarType logits_dtype, int memory_budget, "
    f"{_TOKENS}) -> {_RESULTS}",
)
def _linear_logprobs(
    hidden, weight, bias, hidden_index, needs_grad, logits_dtype, memory_budget, *tokens
):
    ids, mask, temperature, entropy, backend = tokens
    vocab = weight.shape[0]
    _rows.check_rows(ids, temperature, mask, vocab)
    results = tuple(x.zero_() for x in _new_results(hidden, ids, entropy))
    index = mask.nonzero().squeeze(1)
    states = head.select_states(hidden, hidden_index, index)
    flat = hidden.reshape(-1, hidden.shape[-1])
    with torch.autocast(hidden.device.type, enabled=False):
        for part in head.chunks(index.numel(), vocab, logits_dtype, memory_budget):
            rows = index[part]
            logits = head.project(flat[states[part]], weight, bias, logits_dtype)
            chunk = _new_results(hidden, rows, entropy)
            _native_rows(
                "logprobs",
                backend,
                logits,
                ids[rows],
                temperature=temperature if temperature.numel() == 1 else temperature[rows],
                **dict(zip(_NAMES, chunk, strict=True)),
            )
            for whole, values in zip(results, chunk, strict=True):
                if whole.numel():
                    whole[rows] = values
    return results


@_linear_logprobs.register_fake
def _(hidden, weight, bias, hidden_index, needs_grad, logits_dtype, memory_budget, ids, *others):
    return _new_results(hidden, ids, others[2])


@define(
    f"linear_logprobs_backward({_HEAD}, bool[] needs_grad, ScalarType logits_dtype, "
    f"int memory_budget, {_TOKENS}, {_SAVED}, {_GRADS})"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
)
def _linear_logprobs_backward(
    hidden, weight, bias, hidden_index, needs_grad, logits_dtype, memory_budget, *tokens_and_saved
):
    """Makes the logits a second time: the forward of a long batch cannot keep them."""
    ids, mask, temperature, _, backend, *saved, grad_logprobs, grad_entropy = tokens_and_saved
    wanted = mask & (grad_logprobs != 0)
    if grad_entropy is not None:
        wanted |= mask & (grad_entropy != 0)
    index = wanted.nonzero().squeeze(1)
    states = head.select_states(hidden, hidden_index, index)
    flat = hidden.reshape(-1, hidden.shape[-1])
    parts = list(head.chunks(index.numel(), weight.shape[0], logits_dtype, memory_budget))
    grads = head.HeadGradients(weight, bias, needs_grad)
    with torch.autocast(hidden.device.type, enabled=False):
        for part in parts:
            rows, x = index[part], flat[states[part]]
            logits = head.project(x, weight, bias, logits_dtype)
            dlogits = head.gradient_buffer(logits, x, weight)
            buffers = dict(
                zip(_NAMES, (s if s.numel() == 0 else s[rows] for s in saved), strict=True)
            )
            _native_rows(
                "logprobs_backward",
                backend,
                logits,
                ids[rows],
                temperature=temperature if temperature.numel() == 1 else temperature[rows],
                grad_logprobs=grad_logprobs[rows],
                grad_entropy=None if grad_entropy is None else grad_entropy[rows],
                dlogits=dlogits,
                **buffers,
            )
            grads.add(dlogits, x, only=len(parts) == 1)
        return grads.finish(hidden, states, shared=hidden_index is not None)


@_linear_logprobs_backward.register_fake
def _(hidden, weight, bias, hidden_index, needs_grad, *others):
    return head.empty_gradients(hidden, weight, bias, needs_grad)


def _linear_logprobs_grad(ctx, grad_logprobs, grad_entropy, *_):
    inputs, output = _restore(ctx)
    grads = _row_grads(output[0], grad_logprobs, grad_entropy)
    gradients.refuse_second_order(grads[0])
    products = _linear_logprobs_backward(*inputs, *output, *grads)
    needed = (x if need else None for x, need in zip(products, inputs[4], strict=True))
    return *needed, *[None] * (len(inputs) - 3)


_linear_logprobs.register_autograd(_linear_logprobs_grad, setup_context=_setup)


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

    Both are differentiable. Masked tokens give 0; their logits are not read and get zero gradients.

    Raises TypeError for wrong types; ValueError for wrong shapes, for an id outside [0, V) or a
    temperature that is not positive and finite where the mask is set, and for a `backend` that
    cannot run. A backward with create_graph=True is a RuntimeError: there is no second derivative.
    """
    _rows.check_floating("logits", logits)
    shape = logits.shape[:-1]
    ids, mask, heat = _prepare("logits", logits, shape, token_ids, loss_mask, temperature)
    chosen = dispatch.choose("logprobs", logits, backend)
    if chosen == "reference":
        results = token_logprobs_ref(logits, ids, mask, heat, entropy)
    else:
        results = _logprobs(logits, ids, mask, heat, entropy, chosen)
    return _shaped(results, shape, entropy)


def linear_token_logprobs(
    hidden: Tensor,  # (..., D), or (H, D) with hidden_index
    weight: Tensor,  # (V, D)
    token_ids: Tensor,  # (...), or (N,) with hidden_index
    *,
    bias: Tensor | None = None,  # (V,)
    hidden_index: Tensor | None = None,  # (N,) int64, the hidden state that predicts each token
    loss_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int = MEMORY_BUDGET,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # (...) fp32 (fp64 from fp64), or that and the entropy (...)
    """`token_logprobs(hidden @ weight.T + bias, ...)` with at most `memory_budget` bytes of logits.

    Masked tokens never reach the projection. Products are fp32, or `logits_dtype` if that is
    torch.bfloat16; hidden and weight may differ in dtype. The backward makes the logits again.
    """
    shape = head.check_head(hidden, weight, bias, hidden_index)
    head.check_options(hidden, weight, bias, hidden_index, logits_dtype)
    ids, mask, heat = _prepare("hidden", hidden, shape, token_ids, loss_mask, temperature)
    chosen = dispatch.choose("logprobs", hidden, backend)
    if chosen == "reference":
        head.refuse_low_precision(logits_dtype)
        results = linear_token_logprobs_ref(
            hidden, weight, bias, hidden_index, ids, mask, heat, entropy
        )
    else:
        needs_grad = head.needs_grad(hidden, weight, bias)
        sizes = (needs_grad, logits_dtype, memory_budget)
        tokens = (ids, mask, heat, entropy, chosen)
        results = _linear_logprobs(hidden, weight, bias, hidden_index, *sizes, *tokens)
    return _shaped(results, shape, entropy)


def _prepare(
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
    ids = _rows.flat_ids("token_ids", token_ids, shape)
    mask = _rows.flat_mask("loss_mask", loss_mask, ids, shape)
    return ids, mask, _rows.flat_temperature(temperature, like, shape, _rows.math_dtype(like))


def _shaped(
    results: tuple[Tensor | None, ...], shape: tuple[int, ...], entropy: bool
) -> Tensor | tuple[Tensor, Tensor]:
    logprobs = results[0].reshape(shape)
    return (logprobs, results[1].reshape(shape)) if entropy else logprobs
