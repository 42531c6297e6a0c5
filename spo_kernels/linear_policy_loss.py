"""Probability-masked PPO loss from hidden states: the head runs only on the rows that train.

Reference, op schema with its fake and autograd, public function, in that order.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from spo_kernels import dispatch, gradients, head, objective, rows
from spo_kernels.library import define
from spo_kernels.objective import PolicyLoss, Tokens
from spo_kernels.policy_loss import fake_outputs, reference, run_rows

MEMORY_BUDGET = 1 << 30  # bytes of logits that the head makes at a time


def linear_masked_ppo_loss_ref(
    hidden: Tensor,  # (..., D), or (H, D) with hidden_index
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    hidden_index: Tensor | None,  # (N,) int64
    tokens: Tokens,  # N rows, from `objective.prepare`
    shape: tuple[int, ...],
    entropy: bool = False,
    max_active: int | None = None,
) -> PolicyLoss:
    """`linear_masked_ppo_loss` in differentiable PyTorch: keep rows, project, reference loss."""
    tokens.check(weight.shape[0])
    index = _active(tokens, max_active)
    states = head.select_states(hidden, hidden_index, index)
    logits = head.linear_ref(hidden.reshape(-1, hidden.shape[-1])[states], weight, bias)
    return reference(logits, tokens, index, shape, entropy)


def _active(tokens: Tokens, max_active: int | None) -> Tensor:
    """Indices of the rows to project."""
    index = tokens.used().nonzero().squeeze(1)
    if max_active is not None and index.numel() > max_active:
        raise ValueError(
            f"max_active: expected at most {max_active} rows to project, found {index.numel()}"
        )
    return index


def _active_fixed(tokens: Tokens, max_active: int) -> tuple[Tensor, Tensor]:
    """The first `max_active` rows to project, padded with N, and whether there are more.

    Shapes and launches do not depend on the data, so a CUDA graph can capture them.
    """
    used = tokens.used()
    n = used.numel()
    slot = torch.where(used, used.cumsum(0) - 1, max_active).clamp(max=max_active)
    index = torch.full((max_active + 1,), n, device=used.device)
    index.scatter_(0, slot, torch.arange(n, device=used.device))
    return index[:max_active], used.sum() > max_active


def _setup_linear(ctx, inputs, output):
    gradients.keep(ctx, inputs, output, {0: 4, 1: 5, 2: 6})


@define(
    "linear_policy_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor? hidden_index, "
    "bool[] needs_grad, bool entropy, ScalarType logits_dtype, int memory_budget, int? max_active, "
    f"bool fixed, str backend, {objective.SCHEMA}) -> (Tensor loss, Tensor totals, "
    "Tensor logprobs, Tensor entropy, Tensor dhidden, Tensor dweight, Tensor dbias, "
    "Tensor overflow)"
)
def _linear_policy_loss(
    hidden,
    weight,
    bias,
    hidden_index,
    needs_grad,
    entropy,
    logits_dtype,
    memory_budget,
    max_active,
    fixed,
    backend,
    *arguments,
):
    """Computes the gradients too, chunk by chunk, while the chunk's logits are in memory.

    `fixed`: neither shapes nor errors depend on the data.
    """
    tokens, vocab = Tokens(*arguments), weight.shape[0]
    flat, n = hidden.reshape(-1, hidden.shape[-1]), tokens.token_ids.numel()
    fixed = fixed and n > 0
    if fixed:
        index, overflow = _active_fixed(tokens, max_active)
        states, known = head.select_states_fixed(flat, hidden_index, index)
        tokens = tokens.padded()
    else:
        tokens.check(vocab)
        index, overflow = _active(tokens, max_active), tokens.policy_mask.new_zeros(())
        states, known = head.select_states(hidden, hidden_index, index), None
    parts = list(head.chunks(index.numel(), vocab, logits_dtype, memory_budget))
    grads = head.HeadGradients(weight, bias, needs_grad)
    totals, *outputs = (x.zero_() for x in fake_outputs(hidden, tokens.token_ids, entropy)[1:])
    with torch.autocast(hidden.device.type, enabled=False):
        for part in parts:
            chunk = tokens.take(index[part])
            if known is not None:  # no hidden state: kernels return NaN for the id -1
                chunk = dataclasses.replace(
                    chunk, token_ids=torch.where(known[part], chunk.token_ids, -1)
                )
            x = flat[states[part].clamp(max=flat.shape[0] - 1)]
            logits = head.project(x, weight, bias, logits_dtype)
            dlogits = head.gradient_buffer(logits, x, weight) if any(needs_grad) else None
            sums, *of_rows = run_rows(backend, logits, dlogits, chunk, entropy)
            totals += sums
            for whole, values in zip(outputs, of_rows, strict=True):
                if whole.numel():
                    whole[index[part]] = values
            if dlogits is not None:
                grads.add(dlogits, x, only=len(parts) == 1)
        products = grads.finish(hidden, states, shared=fixed or hidden_index is not None)
    outputs = (x[:n].clone() if fixed else x for x in outputs)
    return totals[0] + totals[1], totals, *outputs, *products, overflow


@_linear_policy_loss.register_fake
def _(hidden, weight, bias, hidden_index, needs_grad, entropy, *others):
    ids = others[-len(objective.TYPES)]
    grads = head.empty_gradients(hidden, weight, bias, needs_grad)
    return *fake_outputs(hidden, ids, entropy), *grads, ids.new_empty((), dtype=torch.bool)


_linear_policy_loss.register_autograd(gradients.hand_out, setup_context=_setup_linear)


def linear_masked_ppo_loss(
    hidden: Tensor,  # (..., D), or (H, D) with hidden_index; fp32, bf16, fp16 or fp64
    weight: Tensor,  # (V, D), the vocabulary projection
    token_ids: Tensor,  # (...), or (N,) with hidden_index, as are the other per-token arguments
    old_logprobs: Tensor,  # (...)
    advantages: Tensor,  # broadcasts against (...)
    *,
    bias: Tensor | None = None,  # (V,)
    hidden_index: Tensor | None = None,  # (N,) int64, the hidden state that predicts each token
    loss_mask: Tensor | None = None,
    prob_threshold: float | None = 0.9,
    ref_logprobs: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    log_ratio_clamp: float = 10.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_scope: str = "masked",
    policy_norm: float | Tensor | None = None,
    kl_norm: float | Tensor | None = None,
    entropy: bool = False,
    max_active: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int = MEMORY_BUDGET,
    backend: str | None = None,
) -> PolicyLoss:
    """`masked_ppo_loss(hidden @ weight.T + bias, ...)` without the logits of unused tokens.

    Unused tokens are removed before the projection: those that the masks drop, and those with
    advantage 0 that no KL term needs. The loss is the same; the three matrix products run over the
    other tokens only. Several tokens may share a hidden state through `hidden_index`; their
    gradients are summed in fp32, in order.

    hidden and weight may differ in dtype, as under autocast. Logits are fp32, or bf16 with
    `logits_dtype=torch.bfloat16` (faster where the CPU has bf16 instructions; costs up to 4e-3 in a
    logprob). At most `memory_budget` bytes of logits exist at a time. `masked_ppo_loss` describes
    the other arguments and errors.

    Raises ValueError if there are more than `max_active` rows to project. While a CUDA graph is
    captured, and under torch.compile, always `max_active` rows are projected, without a host sync.
    If there are more, the rest is left out and `overflow` is True; a token id or `hidden_index` out
    of range makes the loss NaN.
    """
    shape = head.check_head(hidden, weight, bias, hidden_index)
    head.check_options(hidden, weight, bias, hidden_index, logits_dtype)
    rows.check_floating("hidden", hidden)
    tokens = objective.prepare(
        hidden, shape, token_ids=token_ids, old_logprobs=old_logprobs,
        advantages=advantages, loss_mask=loss_mask, prob_threshold=prob_threshold,
        ref_logprobs=ref_logprobs, temperature=temperature, clip_eps_low=clip_eps_low,
        clip_eps_high=clip_eps_high, log_ratio_clamp=log_ratio_clamp, kl_coef=kl_coef,
        kl_estimator=kl_estimator, kl_scope=kl_scope, policy_norm=policy_norm, kl_norm=kl_norm,
    )  # fmt: skip
    chosen = dispatch.choose("policy_loss", hidden, backend)
    if chosen == "reference":
        head.refuse_low_precision(logits_dtype)
        return linear_masked_ppo_loss_ref(
            hidden, weight, bias, hidden_index, tokens, shape, entropy, max_active
        )
    fixed = max_active is not None and rows.is_captured(hidden)
    needs_grad = head.needs_grad(hidden, weight, bias)
    sizes = (entropy, logits_dtype, memory_budget, max_active, fixed)
    loss, totals, logprobs, row_entropy, *_, overflow = _linear_policy_loss(
        *(hidden, weight, bias, hidden_index, needs_grad, *sizes, chosen), *tokens.arguments()
    )
    row_entropy = row_entropy if entropy else None
    return objective.record(loss, totals, logprobs, row_entropy, tokens, shape, overflow)
