"""Probability-masked PPO loss from logits; also what the loss from hidden states uses.

Reference, op schemas with their fake and autograd, public functions, in that order.
"""

from __future__ import annotations

from typing import Any

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
    ids, heat = kept.token_ids.long(), kept.temperatures()
    logprobs, row_entropy = _rows.logprobs_of(logits, ids, heat, entropy)
    terms = objective.token_objective(logprobs, kept, tokens.scales())
    totals = torch.stack([term.sum() for term in terms])
    empty = logprobs.new_zeros(tokens.token_ids.shape)
    if row_entropy is not None:
        row_entropy = empty.index_put((index,), row_entropy.detach())
    logprobs = empty.index_put((index,), logprobs.detach())
    means = totals[2:] / tokens.has_policy().sum().clamp(min=1)
    figures = torch.cat([totals[:2], means]).detach()
    num_kept = tokens.policy_mask().sum()
    return objective.record(totals[0] + totals[1], figures, num_kept, logprobs, row_entropy, shape)


class Launch:
    """The buffers of one call and the arguments of its kernels (`PolicyLossArgs` in csrc/ops.h)."""

    def __init__(
        self,
        backend: str,
        like: Tensor,  # logits or hidden states
        vocab: int,
        tokens: Tokens,  # N tokens
        entropy: bool,
        strict: bool,  # bad tokens are an error, not NaN
        **fields: Any,
    ):
        n, self.backend, self.tokens = tokens.token_ids.shape[0], backend, tokens
        empty, device = torch.empty, like.device
        self.loss = empty((), device=device)
        self.figures = empty(5, device=device)
        self.counts = empty(5, dtype=torch.int64, device=device)
        self.logprobs = empty(n, device=device)
        self.entropy = empty(n if entropy else 0, device=device)
        heat, mask = tokens.temperature, tokens.loss_mask
        self.fields = fields | vars(tokens)
        self.fields |= {
            "tokens": n,
            "vocab": vocab,
            "id_bytes": tokens.token_ids.element_size(),
            "mask_bytes": 1 if mask is None else mask.element_size(),
            "temperature_stride": int(heat is not None and heat.shape[0] > 1),
            "policy_norm_is_integer": _is_integer(tokens.policy_norm),
            "kl_norm_is_integer": _is_integer(tokens.kl_norm),
            "strict": strict,
            "uses": empty(n, dtype=torch.uint8, device=device),
            "scales": empty(3, device=device),
            "stats": empty((n, 4), device=device),
            "counts": self.counts,
            "loss": self.loss,
            "figures": self.figures,
            "logprobs": self.logprobs,
            "entropy": self.entropy if entropy else None,
        }
        if backend != "triton":
            self.args = dispatch.native().PolicyLossArgs()
            self.device = dispatch.assign(self.args, self.fields)

    def run(self, phase: str, **fields: Any) -> None:
        """`policy_prepare`, `policy_finish`, or of `over_rows`."""
        if self.backend == "triton":
            return dispatch.run_triton("policy_" + phase, self.fields | fields)
        dispatch.assign(self.args, fields)
        dispatch.run_native("policy_" + phase, self.backend, self.args, self.device)

    def over_rows(
        self,
        phase: str,  # "loss", or "step" for all three phases
        logits: Tensor,  # (..., V)
        dlogits: Tensor | None,  # (..., V) of the logits' dtype or half as wide, may be the logits
        **fields: Any,
    ) -> None:
        """The row kernel, which fills dlogits."""
        rows = logits.numel() // max(logits.shape[-1], 1)
        fields |= {"dlogits": None} if dlogits is None else _rows.gradient_rows(dlogits, logits)
        logits, layout = _rows.strided_rows(logits)
        dtype = _rows.DTYPES.index(logits.dtype)
        self.run(phase, rows=rows, logits=logits, logits_layout=layout, dtype=dtype, **fields)

    def raise_if_bad(self, vocab: int, counts: Tensor | None = None) -> None:
        """ValueError for a bad token or norm. `counts`: a copy that has arrived."""
        if (self.counts if counts is None else counts)[3].item():
            self.tokens.check(vocab)

    def outputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.loss, self.figures, self.counts, self.logprobs, self.entropy


def _is_integer(norm: Tensor | None) -> bool:
    return norm is not None and norm.dtype == torch.int64


OUTPUTS = "Tensor loss, Tensor figures, Tensor counts, Tensor logprobs, Tensor entropy"


def fake_outputs(like: Tensor, ids: Tensor, entropy: bool) -> tuple[Tensor, ...]:
    """As `Launch.outputs`, for torch.compile."""
    n = ids.shape[0]
    shapes = ((), (5,), (5,), (n,), (n if entropy else 0,))
    dtypes = (torch.float32, torch.float32, torch.int64, torch.float32, torch.float32)
    return tuple(like.new_empty(s, dtype=t) for s, t in zip(shapes, dtypes, strict=True))


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
    host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    host.copy_(counts, non_blocking=True)
    arrival = torch.cuda.Event()
    arrival.record(torch.cuda.current_stream(counts.device))
    return host, arrival


@define(
    f"policy_loss(Tensor logits, bool needs_grad, bool entropy, str backend, {objective.SCHEMA})"
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
    f"policy_loss_inplace(Tensor(a!) logits, bool entropy, str backend, {objective.SCHEMA})"
    f" -> ({OUTPUTS})",
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
        ctx.save_for_backward(logits)
        ctx.unscale = gradients.unscale(others[0], logits)
        ctx.mark_non_differentiable(*others)
        ctx.set_materialize_grads(False)
        return loss, *others

    @staticmethod
    def backward(ctx, *grad_outputs):
        grad_output = grad_outputs[0]
        gradients.refuse_second_order(grad_output)
        (logits,) = ctx.saved_tensors
        dlogits = logits.detach()
        gradients.scale(dlogits, grad_output, ctx.unscale)
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
        outputs = _differentiable(logits, needs_grad, entropy, backend, *tokens.arguments())
    loss, figures, counts, logprobs, row_entropy = outputs[:5]
    row_entropy = row_entropy if entropy else None
    return objective.record(loss, figures, counts[0], logprobs, row_entropy, logits.shape[:-1])


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
