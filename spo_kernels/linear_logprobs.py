"""Logprobs of given tokens, and entropies, from hidden states: the head runs chunk by chunk.

Reference, op schemas with their fake and autograd, public function, in that order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from spo_kernels import dispatch, gradients, head, static
from spo_kernels import extras as _extras
from spo_kernels import logprobs as _logprobs
from spo_kernels import rows as _rows
from spo_kernels.entry import entry
from spo_kernels.extras import TokenExtras
from spo_kernels.library import define
from spo_kernels.logprobs import GRADS, NAMES, SAVED, TOKENS


def linear_token_logprobs_ref(
    hidden: Tensor,  # (..., D), or (H, D) with hidden_index
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    hidden_index: Tensor | None,  # (N,) int64
    ids: Tensor,  # (N,) int64
    mask: Tensor,  # (N,) bool
    temperature: Tensor,  # (N,) or (1,)
    entropy: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # (N,), (N,)
    """`linear_token_logprobs` in differentiable PyTorch: keep rows, project, reference logprobs."""
    if _rows.is_unreadable(hidden):
        states = static.all_states(head.flatten(hidden), hidden_index)
        logits = head.linear_ref(states, weight, bias)
        scaling = (logit_scale, logit_softcap)
        return static.logprobs(logits, ids, mask, temperature, entropy, *scaling)
    _rows.check_rows(ids, temperature, mask, weight.shape[0])
    index = mask.nonzero().squeeze(1)
    states = head.select_states(hidden, hidden_index, index)
    logits = head.linear_ref(head.flatten(hidden)[states], weight, bias)
    scaling = (logit_scale, logit_softcap)
    return _logprobs.reference(logits, ids, index, temperature, entropy, *scaling)


def token_extras_ref(
    hidden: Tensor,  # (..., D), or (H, D) with hidden_index
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    hidden_index: Tensor | None,  # (N,) int64
    ids: Tensor,  # (N,) int64
    mask: Tensor,  # (N,) bool
    temperature: Tensor,  # (N,) or (1,)
    logit_scale: float,
    logit_softcap: float | None,
    names: list[str],
    top_k: int,
) -> tuple[Tensor, ...]:
    """The extras in the order of their names, from logits of their own; fp64 for fp64 states."""
    results = _extras.new_results(hidden, ids.shape[0], names, top_k, _rows.math_dtype(hidden))
    if not names or _rows.has_no_data(hidden):
        return results
    index = mask.nonzero().squeeze(1)
    states = head.select_states(hidden, hidden_index, index)
    with torch.no_grad():
        logits = head.linear_ref(head.flatten(hidden)[states], weight, bias)
        heat = temperature if temperature.shape[0] == 1 else temperature[index]
        scaling = (heat, logit_scale, logit_softcap)
        _extras.fill(results, index, logits, ids[index], *scaling, names, top_k)
    return results


_EXTRAS = "Tensor is_top1, Tensor log_sum_sq_probs, Tensor mean_logits, Tensor top_ids"
_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor? hidden_index"


@define(
    f"linear_logprobs({_HEAD}, bool[] needs_grad, ScalarType logits_dtype, int? memory_budget, "
    f"bool batch_invariant, str[] extras, int top_k, {TOKENS}) -> ({SAVED}, {_EXTRAS})",
)
def _linear_logprobs(
    hidden, weight, bias, hidden_index, needs_grad, logits_dtype, memory_budget, *tokens
):
    fixed, names, top_k, ids, mask, temperature, *scaling, entropy, backend = tokens
    vocab = weight.shape[0]
    _rows.check_rows(ids, temperature, mask, vocab)
    results = tuple(x.zero_() for x in _logprobs.new_results(hidden, ids, entropy))
    more = _extras.new_results(hidden, ids.numel(), names, top_k)
    index = mask.nonzero().squeeze(1)
    states = head.select_states(hidden, hidden_index, index)
    flat, weight = head.flatten(hidden), head.operand_of(hidden, weight)
    room = head.budget(memory_budget, hidden.device, index.numel() * vocab * logits_dtype.itemsize)
    with torch.autocast(hidden.device.type, enabled=False):
        for part in head.chunks(index.numel(), vocab, logits_dtype, room):
            rows, x = index[part], flat[states[part]]
            logits = head.project(x, weight, bias, logits_dtype, fixed)
            chunk = _logprobs.new_results(hidden, rows, entropy)
            heat = temperature if temperature.numel() == 1 else temperature[rows]
            buffers = dict(zip(NAMES, chunk, strict=True))
            _logprobs.run_rows("logprobs", backend, logits, ids[rows], heat, *scaling, **buffers)
            for whole, values in zip(results, chunk, strict=True):
                if whole.numel():
                    whole[rows] = values
            _extras.fill(more, rows, logits, ids[rows], heat, *scaling, names=names, top_k=top_k)
    return *results, *more


@_linear_logprobs.register_fake
def _(hidden, weight, bias, hidden_index, needs_grad, logits_dtype, memory_budget, *tokens):
    _, names, top_k, ids, *_, entropy, _ = tokens
    more = _extras.new_results(hidden, ids.numel(), names, top_k)
    return *_logprobs.new_results(hidden, ids, entropy), *more


@define(
    f"linear_logprobs_backward({_HEAD}, bool[] needs_grad, ScalarType logits_dtype, "
    f"int? memory_budget, bool batch_invariant, {TOKENS}, {SAVED}, {GRADS})"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
)
def _linear_logprobs_backward(
    hidden, weight, bias, hidden_index, needs_grad, logits_dtype, memory_budget, *tokens_and_saved
):
    """Computes the logits again: the forward of a long batch cannot keep them."""
    fixed, ids, mask, temperature, logit_scale, logit_softcap, _, backend, *saved = tokens_and_saved
    *saved, grad_logprobs, grad_entropy = saved
    wanted = mask & (grad_logprobs != 0)
    if grad_entropy is not None:
        wanted |= mask & (grad_entropy != 0)
    index = wanted.nonzero().squeeze(1)
    states = head.select_states(hidden, hidden_index, index)
    flat, size = head.flatten(hidden), weight.shape[0]
    operand = head.operand_of(hidden, weight)
    room = head.budget(memory_budget, hidden.device, index.numel() * size * logits_dtype.itemsize)
    parts = list(head.chunks(index.numel(), size, logits_dtype, room))
    grads = head.HeadGradients(hidden, weight, operand, bias, needs_grad, fixed)
    with torch.autocast(hidden.device.type, enabled=False):
        for part in parts:
            rows, x = index[part], flat[states[part]]
            logits = head.project(x, operand, bias, logits_dtype, fixed)
            dlogits = head.gradient_buffer(logits, x, operand, backend)
            buffers = dict(
                zip(NAMES, (s if s.numel() == 0 else s[rows] for s in saved), strict=True)
            )
            _logprobs.run_rows(
                "logprobs_backward",
                backend,
                logits,
                ids[rows],
                temperature if temperature.numel() == 1 else temperature[rows],
                logit_scale,
                logit_softcap,
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
    inputs, output = _logprobs.restore(ctx)
    grads = _logprobs.row_grads(output[0], grad_logprobs, grad_entropy)
    gradients.refuse_second_order(grads[0])
    products = _linear_logprobs_backward(*inputs[:8], *inputs[10:], *output, *grads)
    leaves = zip(products, inputs[:3], inputs[4], strict=True)
    needed = (x.to(leaf.dtype) if need else None for x, leaf, need in leaves)
    return *needed, *[None] * (len(inputs) - 3)


_linear_logprobs.register_autograd(_linear_logprobs_grad, setup_context=_logprobs.save)


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    hidden_index: Tensor | None = None,
    loss_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    entropy: Literal[False] = False,
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    extras: None = None,
    top_k: int = 1,
    backend: str | None = None,
) -> Tensor: ...


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    hidden_index: Tensor | None = None,
    loss_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    entropy: Literal[True],
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    extras: None = None,
    top_k: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    hidden_index: Tensor | None = None,
    loss_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    entropy: Literal[False] = False,
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    extras: Sequence[str],
    top_k: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, TokenExtras]: ...


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    hidden_index: Tensor | None = None,
    loss_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    entropy: Literal[True],
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    extras: Sequence[str],
    top_k: int = 1,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, TokenExtras]: ...


@entry
def linear_token_logprobs(
    hidden: Tensor,  # (..., D), or (H, D) with hidden_index
    weight: Tensor,  # (V, D)
    token_ids: Tensor,  # (...), or (N,) with hidden_index
    *,
    bias: Tensor | None = None,  # (V,)
    hidden_index: Tensor | None = None,  # (N,) int64, the hidden state that predicts each token
    loss_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    entropy: bool = False,
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,
    batch_invariant: bool = False,
    extras: Sequence[str] | None = None,
    top_k: int = 1,
    backend: str | None = None,
) -> Tensor | tuple[Tensor | TokenExtras, ...]:  # (...) fp32, fp64 from fp64; and what is asked
    """`token_logprobs(hidden @ weight.T + bias, ...)` with at most `memory_budget` bytes of logits.

    Masked tokens never reach the projection. Logits are fp32, or bf16 with
    `logits_dtype=torch.bfloat16`; hidden and weight may differ in dtype. The backward computes the
    logits again. `batch_invariant=True`: the results and the gradient of a hidden state have the
    same bits whatever stands beside it; see `linear_masked_ppo_loss`, also for a DTensor as weight.
    `token_logprobs` describes the other arguments and errors.

    `extras` names fields of a `TokenExtras`, which is then the last result: `is_top1`,
    `log_sum_sq_probs`, `mean_logits`, and `top_ids`, the ids of the `top_k` largest logits. They
    have no gradients.
    """
    shape = head.check_head(hidden, weight, bias, hidden_index)
    head.check_options(hidden, weight, bias, hidden_index, logits_dtype)
    _rows.check_scaling(logit_scale, logit_softcap)
    ids, mask, heat = _logprobs.prepare("hidden", hidden, shape, token_ids, loss_mask, temperature)
    names = _extras.check(extras, top_k, weight.shape[0])
    chosen = dispatch.choose("logprobs", hidden, backend)
    scaling = (logit_scale, logit_softcap)
    if chosen == "reference":
        head.check_reference(hidden, logits_dtype, batch_invariant)
        arguments = (hidden, weight, bias, hidden_index, ids, mask, heat)
        logprobs, row_entropy = linear_token_logprobs_ref(*arguments, entropy, *scaling)
        more = token_extras_ref(*arguments, *scaling, names, top_k)
    else:
        needs_grad = head.needs_grad(hidden, weight, bias)
        sizes = (needs_grad, logits_dtype, memory_budget, batch_invariant, names, top_k)
        tokens = (ids, mask, heat, *scaling, entropy, chosen)
        logprobs, row_entropy, _, _, *more = _linear_logprobs(
            hidden, weight, bias, hidden_index, *sizes, *tokens
        )
    results = _logprobs.shaped(logprobs, row_entropy if entropy else None, shape)
    if extras is None:
        return results
    asked = _extras.record(more, names, shape)
    return (results, asked) if isinstance(results, Tensor) else (*results, asked)
