"""Probability-masked PPO loss from logits; also what the loss from hidden states uses.

Reference, op schemas with their fake and autograd, public functions, in that order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spo_kernels import dispatch, gradients, memory, objective, static
from spo_kernels import rows as _rows
from spo_kernels.entry import entry
from spo_kernels.library import define
from spo_kernels.objective import PolicyLoss
from spo_kernels.policy_launch import OUTPUTS, Launch, fake_outputs, record
from spo_kernels.tokens import SCHEMA, Tokens, prepare


def masked_ppo_loss_ref(
    logits: Tensor,  # (..., V)
    tokens: Tokens,  # N rows, from `tokens.prepare`
    entropy: bool = False,
) -> PolicyLoss:
    """`masked_ppo_loss` in differentiable PyTorch; fp64 throughout for fp64 logits."""
    shape = logits.shape[:-1]
    if _rows.is_unreadable(logits):
        flat = logits.reshape(-1, logits.shape[-1])
        return static.policy_loss(reference, flat, tokens, shape, entropy)
    tokens.check(logits.shape[-1])
    index = tokens.runs().nonzero().squeeze(1)
    # Rows are picked before the view is flattened: flattening a slice would copy all of it.
    kept = logits[torch.unravel_index(index, shape)] if len(shape) else logits[None][index]
    return reference(kept, tokens, index, shape, entropy)


def reference(
    logits: Tensor,  # (n, V) of the rows `index` only
    tokens: Tokens,  # N rows
    index: Tensor,  # (n,) int64
    shape: tuple[int, ...],
    entropy: bool,
    known: Tensor | None = None,  # (N,) bool, the rows that count; None: those of `index`
) -> PolicyLoss:
    heat = tokens.temperatures()
    heat = heat if heat.shape[0] == 1 else heat[index]
    ids = tokens.token_ids[index].long()
    cap = tokens.logit_softcap if tokens.logit_softcap < math.inf else None
    logprobs, row_entropy = _rows.logprobs_of(logits, ids, heat, entropy, tokens.logit_scale, cap)
    empty = logprobs.new_zeros(tokens.token_ids.shape)
    if row_entropy is not None:
        row_entropy = empty.index_put((index,), row_entropy)
    if known is None:
        known = torch.zeros_like(tokens.token_ids, dtype=torch.bool).index_fill(0, index, True)
    logprobs = empty.index_put((index,), logprobs)
    return objective.evaluate(logprobs, row_entropy, tokens, known, shape)


def _run(
    logits: Tensor,  # (..., V)
    dlogits: Tensor | None,  # (..., V), may be the logits; None: allocate it if `needs_grad`
    needs_grad: bool,
    entropy: bool,
    backend: str,
    tokens: Tokens,
) -> tuple[Tensor, ...]:
    """All phases from logits: `OUTPUTS` and dlogits.

    Bad input is an error; while a CUDA graph is captured nothing can be read, so it gives NaN.
    """
    strict, vocab = not _rows.is_captured(logits), logits.shape[-1]
    scaled = needs_grad and logits.dtype == torch.float16
    call = Launch(backend, logits, vocab, tokens, entropy, strict, scaled=scaled)
    in_pages = logits.device.type == "cpu" and logits.nbytes >= memory.SMALLEST
    allocates = needs_grad and dlogits is None
    if in_pages and allocates:
        call.run("prepare")
        call.raise_if_bad(vocab)
        # Pages of zeros are free where nothing writes. What is written is best a reused buffer.
        zeroed = 2 * int(call.counts[2]) < tokens.token_ids.numel()
        allocate = memory.zeros if zeroed else memory.empty
        dlogits = allocate(logits.shape, logits.dtype, logits.device)
        call.over_rows("loss", logits, dlogits, dlogits_zeroed=zeroed)
        call.run("finish")
        return *call.outputs(), dlogits
    if allocates:
        dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    if logits.is_cuda and strict:
        call.run("prepare")
        counts, arrival = _copy_to_host(call.counts)
        call.over_rows("loss", logits, dlogits)
        call.run("finish")
        arrival.synchronize()  # the only wait for a GPU, which has the rows to work on
        call.raise_if_bad(vocab, counts)
    else:
        call.over_rows("step", logits, dlogits)
        if strict:
            call.raise_if_bad(vocab)
    return *call.outputs(), logits.new_empty(0) if dlogits is None else dlogits


def _copy_to_host(counts: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy of a few numbers, in stream order, and the event of its arrival."""
    host = torch.empty(counts.shape, dtype=counts.dtype, device="cpu", pin_memory=True)
    host.copy_(counts, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record(torch.cuda.current_stream(counts.device))
    return host, arrival


@define(
    f"policy_loss(Tensor logits, bool needs_grad, bool entropy, str backend, {SCHEMA})"
    f" -> ({OUTPUTS}, Tensor dlogits)",
)
def _policy_loss(logits, needs_grad, entropy, backend, *arguments):
    return _run(logits, None, needs_grad, entropy, backend, Tokens(*arguments))


@_policy_loss.register_fake
def _(logits, needs_grad, entropy, backend, token_ids, *arguments):
    dlogits = logits.new_empty(logits.shape if needs_grad else (0,))
    return *fake_outputs(logits, token_ids, entropy), dlogits


_differentiable = gradients.one_pass(_policy_loss, {0: 5})


@define(
    f"policy_loss_inplace(Tensor(a!) logits, bool entropy, str backend, {SCHEMA}) -> ({OUTPUTS})",
)
def _policy_loss_inplace(logits, entropy, backend, *arguments):
    outputs = _run(logits, logits, True, entropy, backend, Tokens(*arguments))[:-1]
    # An op that saved the logits now raises in its backward, instead of reading the gradient.
    torch.autograd.graph.increment_version(logits)
    return outputs


@_policy_loss_inplace.register_fake
def _(logits, entropy, backend, token_ids, *arguments):
    return fake_outputs(logits, token_ids, entropy)


class _InplaceGrad(torch.autograd.Function):
    """The loss whose dlogits overwrite the logits."""

    @staticmethod
    def forward(ctx, logits, entropy, backend, *arguments):
        loss, *others = _policy_loss_inplace(logits, entropy, backend, *arguments)
        ctx.dlogits = logits.detach()
        ctx.unscale = gradients.unscale(others[0])
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        return loss, *others

    @staticmethod
    def backward(ctx, *grad_outputs):
        dlogits = gradients.hand_out_overwritten(ctx, grad_outputs[0])
        return dlogits, *[None] * (len(ctx.needs_input_grad) - 1)


@entry
def masked_ppo_loss(
    logits: Tensor,  # (..., V) fp32, bf16, fp16 or fp64, raw: not divided by the temperature
    token_ids: Tensor,  # (...) int32 or int64, logits[i] predicts token_ids[i]
    old_logprobs: Tensor | None,  # (...) of the sampling policy, at the temperature
    advantages: Tensor,  # broadcasts against (...); (B,) against (B, L) is one per sequence
    *,
    weights: Tensor | None = None,  # broadcasts as advantages do
    loss_mask: Tensor | None = None,  # (...) bool or integer, not 0 = trained
    prob_threshold: float | None = 0.9,
    ref_logprobs: Tensor | None = None,  # (...) of the reference policy, at the temperature
    temperature: float | Tensor = 1.0,  # a number, or a tensor that broadcasts as advantages does
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    clip_eps_low: float | None = 0.2,
    clip_eps_high: float | None = 0.2,
    clip_ratio_max: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_scope: str = "masked",
    kl_weights: Tensor | None = None,  # broadcasts as advantages do
    kl_clamp: float | None = 10.0,
    kl_ratio: bool = False,
    entropy_coef: float = 0.0,
    policy_norm: float | Tensor | None = None,
    kl_norm: float | Tensor | None = None,
    nan_logprobs: str = "error",
    entropy: bool = False,
    metrics: bool = False,
    inplace_grad: bool = False,
    backend: str | None = None,
) -> PolicyLoss:
    """Clipped policy loss over the tokens that the sampling policy was unsure of, plus a KL term.

    SPO's loss with its probability mask (arXiv 2505.23564); without it, that of PPO and GRPO. With
    M = loss_mask and old_logprob < log(prob_threshold), ratio = exp(logprob - old_logprob) clamped
    to exp(+-log_ratio_clamp), and Z = policy_norm or, if None, the sum of M:

        policy_loss = -sum(M * w * min(ratio * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A)) / Z
        kl = kl_coef * sum(K * v * k(logprob, ref_logprob)) / Z_kl
        entropy_loss = -entropy_coef * sum(M * H) / Z
        loss = policy_loss + kl + entropy_loss

    Logprobs are those of softmax(z / temperature), z = logits * logit_scale, with a cap
    z = logit_softcap * tanh(z / logit_softcap). w = `weights` and v = `kl_weights`, 1 if None. For
    A < 0 the policy term is at most -clip_ratio_max * A (dual clip, arXiv 1912.09729). H is the
    entropy. K is M for `kl_scope="masked"`, the loss mask for "all". With p and q the two logprobs,
    k1 is p - q, k2 is (p - q)^2 / 2, k3 is exp(d) - d - 1 with d = clamp(q - p, +-kl_clamp); with
    `kl_ratio=True` they are multiplied by the ratio. The gradient is that of the formula. A norm is
    a number or a tensor: give the count of the whole optimiser step, over the number of processes
    where DDP or FSDP averages gradients; 0 gives loss 0. `kl_norm=None` takes the policy's. None
    for a threshold, a clip, a clamp or a maximum sets no bound.

    `old_logprobs=None` is on-policy: the ratio is 1, with the gradient of the logprob. The mask
    then takes the probabilities of this pass, so every row of the loss mask is read, and without
    `policy_norm` the backward multiplies the gradient by 1 / Z in a pass of its own.
    `nan_logprobs="drop"` drops and counts tokens with an old logprob of NaN. The logits
    of dropped tokens are not read; their gradient is 0.

    `entropy=True` returns that of the rows that were computed; `metrics=True` computes all kept
    rows, and their entropy. `inplace_grad=True` writes the gradient over the logits; other uses
    raise in the backward, except those without a gradient (`argmax`).

    Raises TypeError for wrong types; ValueError for wrong shapes or options, a kept token with an
    id outside [0, V), a temperature that is not positive and finite or an old logprob of NaN, and a
    `backend` that cannot run; RuntimeError for create_graph and torch.func without the reference.
    """
    _rows.check_floating("logits", logits)
    tokens = prepare(
        logits, logits.shape[:-1], token_ids=token_ids, old_logprobs=old_logprobs,
        advantages=advantages, weights=weights, loss_mask=loss_mask, ref_logprobs=ref_logprobs,
        prob_threshold=prob_threshold, temperature=temperature, logit_scale=logit_scale,
        logit_softcap=logit_softcap, clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high,
        clip_ratio_max=clip_ratio_max, log_ratio_clamp=log_ratio_clamp, kl_coef=kl_coef,
        kl_estimator=kl_estimator, kl_scope=kl_scope, kl_weights=kl_weights, kl_clamp=kl_clamp,
        kl_ratio=kl_ratio, entropy_coef=entropy_coef, policy_norm=policy_norm, kl_norm=kl_norm,
        nan_logprobs=nan_logprobs, metrics=metrics,
    )  # fmt: skip
    chosen = dispatch.choose("policy_loss", logits, backend)
    return _loss(logits, tokens, tokens.wants_entropy(entropy), inplace_grad, chosen)


def _loss(
    logits: Tensor, tokens: Tokens, entropy: bool, inplace_grad: bool, backend: str
) -> PolicyLoss:
    if inplace_grad and not logits.is_meta:
        _check_inplace(logits, backend)
        outputs = _InplaceGrad.apply(logits, entropy, backend, *tokens.arguments())
        gradients.guard_overwritten(outputs[0], logits)
    elif backend == "reference":
        return masked_ppo_loss_ref(logits, tokens, entropy)
    else:
        needs_grad = torch.is_grad_enabled() and logits.requires_grad
        outputs = _differentiable(logits, needs_grad, entropy, backend, *tokens.arguments())
    loss, figures, counts, logprobs, row_entropy = outputs[:5]
    row_entropy = row_entropy if entropy else None
    return record(loss, figures, counts, logprobs, row_entropy, logits.shape[:-1])


def _check_inplace(logits: Tensor, chosen: str) -> None:
    if torch.compiler.is_compiling():
        raise ValueError("inplace_grad=True: expected no torch.compile; leave inplace_grad out")
    if chosen == "reference":
        raise ValueError("inplace_grad=True: expected a native or Triton backend, found reference")
    if not (torch.is_grad_enabled() and logits.requires_grad):
        raise ValueError("inplace_grad=True: expected logits that require a gradient")
    same = _rows.strided_rows(logits)[0].untyped_storage() is logits.untyped_storage()
    if not same or _overlaps(logits):
        raise ValueError(
            "inplace_grad=True: expected logits with a contiguous last dimension and rows that "
            f"share no memory, found strides {logits.stride()}"
        )
    if logits.is_leaf or (logits._base is not None and logits._base.is_leaf):
        raise ValueError(
            "inplace_grad=True: expected logits that an op computed, found a leaf or a view of one"
        )


def _overlaps(tensor: Tensor) -> bool:
    """Whether elements may share memory: those of a smaller stride reach the next larger one."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False
