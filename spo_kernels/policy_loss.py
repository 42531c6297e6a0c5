"""Probability-masked PPO loss from logits; also what the loss from hidden states uses.

Reference, op schemas with their fake and autograd, public functions, in that order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spo_kernels import dispatch, gradients, memory, objective
from spo_kernels import rows as _rows
from spo_kernels.library import define
from spo_kernels.objective import PolicyLoss, Tokens


def masked_ppo_loss_ref(
    logits: Tensor,  # (..., V)
    tokens: Tokens,  # N rows, from `objective.prepare`
    entropy: bool = False,
) -> PolicyLoss:
    """`masked_ppo_loss` in differentiable PyTorch; fp64 throughout for fp64 logits."""
    shape = logits.shape[:-1]
    tokens.check(logits.shape[-1])
    index = tokens.used().nonzero().squeeze(1)
    # Rows are picked before the view is flattened: flattening a slice would copy all of it.
    kept = logits[torch.unravel_index(index, shape)] if len(shape) else logits[None][index]
    return reference(kept, tokens, index, shape, entropy)


def reference(
    logits: Tensor,  # (n, V) of the rows `index` only
    tokens: Tokens,  # N rows
    index: Tensor,  # (n,) int64
    shape: tuple[int, ...],
    entropy: bool,
) -> PolicyLoss:
    kept = tokens.take(index)
    logprobs, row_entropy = _rows.logprobs_of(logits, kept.token_ids, kept.temperature, entropy)
    terms = objective.token_objective(logprobs, kept)
    totals = torch.stack([term.sum() for term in terms])
    empty = logprobs.new_zeros(tokens.token_ids.shape)
    if row_entropy is not None:
        row_entropy = empty.index_put((index,), row_entropy.detach())
    logprobs = empty.index_put((index,), logprobs.detach())
    return objective.record(totals[0] + totals[1], totals, logprobs, row_entropy, tokens, shape)


def run_rows(
    backend: str,
    logits: Tensor,  # (..., V)
    dlogits: Tensor | None,  # (..., V) of the logits' dtype or bf16, may be logits itself
    tokens: Tokens,  # N rows
    entropy: bool,
    zeroed: bool = False,  # dlogits is zero already
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the row kernel, which fills dlogits: totals (4,), logprobs (N,), entropy (N,) or (0,)."""
    n, vocab = tokens.token_ids.numel(), logits.shape[-1]
    stats, logprobs = logits.new_empty((n, 4), dtype=torch.float32), tokens.scales.new_empty(n)
    row_entropy = tokens.scales.new_empty(n if entropy else 0)
    layout = {}
    logits, layout["logits_layout"] = _rows.strided_rows(logits)
    if dlogits is not None:
        layout["dlogits_dtype"] = _rows.DTYPES.index(dlogits.dtype)
        dlogits, layout["dlogits_layout"] = _rows.strided_rows(dlogits)
    if n:
        dispatch.launch(
            "policy_loss",
            backend,
            "PolicyLossArgs",
            rows=n,
            vocab=vocab,
            dtype=_rows.DTYPES.index(logits.dtype),
            logits=logits,
            dlogits=dlogits,
            dlogits_zeroed=zeroed,
            **layout,
            **vars(tokens),
            temperature_stride=int(tokens.temperature.numel() > 1),
            logprobs=logprobs,
            entropy=row_entropy if entropy else None,
            stats=stats,
        )
    return stats.sum(0, dtype=torch.float64).float(), logprobs, row_entropy


@define(
    f"policy_loss(Tensor logits, bool needs_grad, bool entropy, str backend, {objective.SCHEMA})"
    " -> (Tensor loss, Tensor totals, Tensor logprobs, Tensor entropy, Tensor dlogits)",
)
def _policy_loss(logits, needs_grad, entropy, backend, *arguments):
    tokens = Tokens(*arguments)
    tokens.check(logits.shape[-1])
    shape = logits.shape if needs_grad else (0,)
    # Pages of zeros are free where nothing writes. A buffer that is written is best a reused one.
    zeroed = needs_grad and logits.device.type == "cpu"
    zeroed = zeroed and 2 * int(tokens.used().sum()) < tokens.token_ids.numel()
    allocate = memory.zeros if zeroed else memory.empty
    dlogits = allocate(shape, logits.dtype, logits.device)
    totals, *outputs = run_rows(
        backend, logits, dlogits if needs_grad else None, tokens, entropy, zeroed
    )
    return totals[0] + totals[1], totals, *outputs, dlogits


@_policy_loss.register_fake
def _(logits, needs_grad, entropy, backend, token_ids, *arguments):
    dlogits = logits.new_empty(logits.shape if needs_grad else (0,))
    return *fake_outputs(logits, token_ids, entropy), dlogits


def fake_outputs(like: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    n = ids.numel()
    shapes = ((), (4,), (n,), (n if entropy else 0,))
    return tuple(like.new_empty(shape, dtype=torch.float32) for shape in shapes)


def _setup_policy_loss(ctx, inputs, output):
    gradients.keep(ctx, inputs, output, {0: 4})


_policy_loss.register_autograd(gradients.hand_out, setup_context=_setup_policy_loss)


@define(
    f"policy_loss_inplace(Tensor(a!) logits, bool entropy, str backend, {objective.SCHEMA})"
    " -> (Tensor totals, Tensor logprobs, Tensor entropy)",
)
def _policy_loss_inplace(logits, entropy, backend, *arguments):
    # An op that saved the logits now raises in its backward, instead of reading the gradient.
    torch.autograd.graph.increment_version(logits)
    tokens = Tokens(*arguments)
    tokens.check(logits.shape[-1])
    return run_rows(backend, logits, logits, tokens, entropy)


@_policy_loss_inplace.register_fake
def _(logits, entropy, backend, token_ids, *arguments):
    return fake_outputs(logits, token_ids, entropy)[1:]


class _InplaceGrad(torch.autograd.Function):
    """The loss whose dlogits overwrite the logits."""

    @staticmethod
    def forward(ctx, logits, entropy, backend, *arguments):
        totals, logprobs, row_entropy = _policy_loss_inplace(logits, entropy, backend, *arguments)
        ctx.save_for_backward(logits)
        ctx.mark_non_differentiable(totals, logprobs, row_entropy)
        ctx.set_materialize_grads(False)
        return totals[0] + totals[1], totals, logprobs, row_entropy

    @staticmethod
    def backward(ctx, *grad_outputs):
        grad_output = grad_outputs[0]
        gradients.refuse_second_order(grad_output)
        (logits,) = ctx.saved_tensors
        dlogits = logits.detach()
        gradients.scale(dlogits, grad_output)
        return dlogits, *[None] * (len(ctx.needs_input_grad) - 1)


def masked_ppo_loss(
    logits: Tensor,  # (..., V) fp32, bf16, fp16 or fp64, raw: not divided by the temperature
    token_ids: Tensor,  # (...) int32 or int64, logits[i] predicts token_ids[i]
    old_logprobs: Tensor,  # (...) of the sampling policy, at the temperature
    advantages: Tensor,  # broadcasts against (...); (B,) against (B, L) is one per sequence
    *,
    loss_mask: Tensor | None = None,  # (...) bool, integer or float, non-zero = trained
    prob_threshold: float | None = 0.9,
    ref_logprobs: Tensor | None = None,  # (...) of the reference policy, at the temperature
    temperature: float | Tensor = 1.0,  # a number, or a tensor that broadcasts as advantages does
    clip_eps_low: float = 0.2,
    clip_eps_high: float = 0.2,
    log_ratio_clamp: float = 10.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_scope: str = "masked",
    policy_norm: float | Tensor | None = None,
    kl_norm: float | Tensor | None = None,
    entropy: bool = False,
    inplace_grad: bool = False,
    backend: str | None = None,
) -> PolicyLoss:
    """Clipped policy loss over the tokens that the sampling policy was unsure of, plus a KL term.

    SPO's loss with its probability mask (arXiv 2505.23564); without the mask, that of PPO and GRPO.
    With M = loss_mask and old_logprob < log(prob_threshold), ratio = exp(logprob - old_logprob)
    clamped to exp(+-log_ratio_clamp), and Z = policy_norm or, if None, the sum of M:

        policy_loss = -sum(M * min(ratio * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A)) / Z
        kl = kl_coef * sum(K * k(logprob, ref_logprob)) / Z_kl
        loss = policy_loss + kl

    K is M for `kl_scope="masked"`, the loss mask for "all". With p and q the two logprobs, k1 is
    p - q, k2 is (p - q)^2 / 2, k3 is exp(d) - d - 1 with d = clamp(q - p, -10, 10); the gradient is
    that of the formula. A norm is a count, a number or a tensor: give the global count of the
    optimiser step. `kl_norm=None` takes the policy's norm. A norm of 0 gives loss 0 and zero
    gradients. `prob_threshold=None` trains the whole loss mask.

    The logits are read once and their gradient is written once. Logits of dropped tokens are not
    read (they may be NaN); their gradient is 0. `entropy=True` adds the entropy as a metric.
    `inplace_grad=True` writes the gradient over the logits: do not use them afterwards.

    Raises TypeError for wrong types; ValueError for wrong shapes or options, for a kept token with
    an id outside [0, V), a temperature that is not positive and finite or an old logprob that is
    NaN (dropped tokens may hold anything), and for a `backend` that cannot run. A backward with
    create_graph=True raises RuntimeError: the kernels have no second derivative.
    """
    _rows.check_floating("logits", logits)
    tokens = objective.prepare(
        logits, logits.shape[:-1], token_ids=token_ids, old_logprobs=old_logprobs,
        advantages=advantages, loss_mask=loss_mask, prob_threshold=prob_threshold,
        ref_logprobs=ref_logprobs, temperature=temperature, clip_eps_low=clip_eps_low,
        clip_eps_high=clip_eps_high, log_ratio_clamp=log_ratio_clamp, kl_coef=kl_coef,
        kl_estimator=kl_estimator, kl_scope=kl_scope, policy_norm=policy_norm, kl_norm=kl_norm,
    )  # fmt: skip
    chosen = dispatch.choose("policy_loss", logits, backend)
    return _loss(logits, tokens, entropy, inplace_grad, chosen)


def _loss(
    logits: Tensor, tokens: Tokens, entropy: bool, inplace_grad: bool, backend: str
) -> PolicyLoss:
    if inplace_grad:
        _check_inplace(logits, backend)
        outputs = _InplaceGrad.apply(logits, entropy, backend, *tokens.arguments())
    elif backend == "reference":
        return masked_ppo_loss_ref(logits, tokens, entropy)
    else:
        needs_grad = torch.is_grad_enabled() and logits.requires_grad
        outputs = _policy_loss(logits, needs_grad, entropy, backend, *tokens.arguments())
    loss, totals, logprobs, row_entropy = outputs[:4]
    shape = logits.shape[:-1]
    return objective.record(loss, totals, logprobs, row_entropy if entropy else None, tokens, shape)


def _check_inplace(logits: Tensor, chosen: str) -> None:
    if chosen == "reference":
        raise ValueError("inplace_grad=True: expected a native or Triton backend, found reference")
    if not (torch.is_grad_enabled() and logits.requires_grad):
        raise ValueError("inplace_grad=True: expected logits that require a gradient")
    same = _rows.strided_rows(logits)[0].data_ptr() == logits.data_ptr()
    if not same or any(
        s == 0 and n > 1 for s, n in zip(logits.stride(), logits.shape, strict=True)
    ):
        raise ValueError(
            "inplace_grad=True: expected logits with a contiguous last dimension and no repeated "
            f"rows, found strides {logits.stride()}"
        )
