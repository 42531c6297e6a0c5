"""Probability-masked PPO loss from hidden states: the head runs only on the rows that train.

Reference, op schema with its fake and autograd, public function, in that order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spo_kernels import dispatch, gradients, head, products, rows, static
from spo_kernels.entry import entry
from spo_kernels.library import define
from spo_kernels.objective import PolicyLoss
from spo_kernels.policy_launch import OUTPUTS, Launch, fake_outputs, record
from spo_kernels.policy_loss import reference
from spo_kernels.tokens import SCHEMA, TYPES, Tokens, prepare

BAD_TOKEN, BAD_STATE, BAD_NORM = 1, 2, 4  # kBadToken and so on in csrc/ops.h
IN_A_TERM = 3  # kInPolicy | kInKl there


def linear_masked_ppo_loss_ref(
    hidden: Tensor,  # (..., D), or (H, D) with hidden_index
    weight: Tensor,  # (V, D)
    bias: Tensor | None,  # (V,)
    hidden_index: Tensor | None,  # (N,) int64
    tokens: Tokens,  # N rows, from `tokens.prepare`
    shape: tuple[int, ...],
    entropy: bool = False,
    max_active: int | None = None,
) -> PolicyLoss:
    """`linear_masked_ppo_loss` in differentiable PyTorch: keep rows, project, reference loss."""
    if rows.is_unreadable(hidden):
        states = static.all_states(head.flatten(hidden), hidden_index)
        logits = head.linear_ref(states, weight, bias)
        return static.policy_loss(reference, logits, tokens, shape, entropy)
    tokens.check(weight.shape[0])
    index = tokens.runs().nonzero().squeeze(1)
    _check_room(index.numel(), max_active)
    states = head.select_states(hidden, hidden_index, index)
    logits = head.linear_ref(head.flatten(hidden)[states], weight, bias)
    return reference(logits, tokens, index, shape, entropy)


def _check_room(active: int, max_active: int | None) -> None:
    if max_active is not None and active > max_active:
        raise ValueError(
            f"max_active: expected at most {max_active} rows to project, found {active}"
        )


def _read_active(call: Launch, hidden_index: Tensor | None, states: int, vocab: int) -> int:
    """The number of rows to project, in the only wait for a GPU; ValueError for bad input."""
    _, _, active, bad, *_ = call.counts.tolist()
    if bad & (BAD_TOKEN | BAD_NORM):
        call.tokens.check(vocab)
    if bad & BAD_STATE and hidden_index is not None:
        head.check_states(hidden_index, states, call.tokens.runs().nonzero().squeeze(1))
    return active


def _left_by_late_mask(call: Launch, index: Tensor) -> Tensor | None:
    """The rows of a chunk, tokens `index` (c,), that may have a gradient; None if most have.

    Looking waits for a GPU, and saves it most of two products.
    """
    if not call.tokens.masks_late:
        return None
    left = (call.fields["uses"][index] & IN_A_TERM).nonzero().squeeze(1)
    return left if 2 * left.numel() < index.numel() else None


def _take(
    rows_left: Tensor | None, dlogits: Tensor, x: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Only these rows, of all three; None takes all."""
    if rows_left is None:
        return dlogits, x, states
    taken = dlogits[rows_left]
    if products.on_gpu(x):  # rows that start where its products want them
        count, vocab = taken.shape
        taken = products.columns(count, vocab, taken.dtype, taken.device).copy_(taken)
    return taken, x[rows_left], states[rows_left]


@define(
    "linear_policy_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor? hidden_index, "
    "bool[] needs_grad, bool entropy, ScalarType logits_dtype, int? memory_budget, "
    "int? max_active, bool fixed, bool batch_invariant, str backend, "
    f"{SCHEMA}) -> ({OUTPUTS}, "
    "Tensor dhidden, Tensor dweight, Tensor dbias)"
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
    batch_invariant,
    backend,
    *arguments,
):
    """Computes the gradients too, chunk by chunk, while the chunk's logits are in memory.

    `fixed`: neither shapes nor errors depend on the data, so a CUDA graph can capture the work.
    Then `max_active` rows are projected; those behind the last used token belong to none.
    """
    tokens, vocab = Tokens(*arguments), weight.shape[0]
    flat, n = head.flatten(hidden), tokens.token_ids.shape[0]
    hidden_index = None if hidden_index is None else hidden_index.contiguous()
    operand = head.operand_of(hidden, weight)
    halves = products.on_gpu(hidden) and operand.dtype == torch.float16
    capacity = max_active if fixed else n
    # Never without an address: that would mean that rows are not gathered.
    shape = (3, max(capacity, 1))
    index, states, sources = torch.empty(shape, dtype=torch.int64, device=hidden.device)
    call = Launch(
        *(backend, hidden, vocab, tokens, entropy, not fixed),
        **{"scaled": halves and any(needs_grad), "index": index, "states": states},
        **{"sources": sources, "capacity": capacity},
        **{"hidden_index": hidden_index, "num_states": flat.shape[0]},
    )
    call.run("prepare")
    active = capacity
    if not (fixed and (hidden.is_cuda or rows.is_captured(hidden))):  # a GPU would have to wait
        used = _read_active(call, hidden_index, flat.shape[0], vocab)
        active = capacity if fixed else used
    _check_room(active, max_active)
    states = states[:active]
    room = head.budget(memory_budget, hidden.device, active * vocab * logits_dtype.itemsize)
    parts = list(head.chunks(active, vocab, logits_dtype, room)) if flat.shape[0] else []
    grads = head.HeadGradients(hidden, weight, operand, bias, needs_grad, batch_invariant)
    added = [states[:0]]
    with torch.autocast(hidden.device.type, enabled=False):
        for part in parts:
            x = flat.index_select(0, sources[part])
            logits = head.project(x, operand, bias, logits_dtype, batch_invariant)
            dlogits = head.gradient_buffer(logits, x, operand, backend) if any(needs_grad) else None
            call.over_rows("loss", logits, dlogits, index=index[part])
            if dlogits is not None:
                if fixed:  # rows of no token have a state that may be NaN, and 0 * NaN is no 0
                    x.nan_to_num_()
                left = None if fixed else _left_by_late_mask(call, index[part])
                dlogits, x, own = _take(left, dlogits, x, states[part])
                grads.add(dlogits, x, only=len(parts) == 1)
                added.append(own)
        states = torch.cat(added) if len(added) > 2 else added[-1]
        formed = grads.finish(hidden, states, shared=hidden_index is not None, spare=fixed)
    call.run("finish")
    return *call.outputs(), *formed


@_linear_policy_loss.register_fake
def _(hidden, weight, bias, hidden_index, needs_grad, entropy, *others):
    ids = others[-len(TYPES)]
    grads = head.empty_gradients(hidden, weight, bias, needs_grad)
    return *fake_outputs(hidden, ids, entropy), *grads


_differentiable = gradients.one_pass(_linear_policy_loss, {0: 5, 1: 6, 2: 7})


@entry
def linear_masked_ppo_loss(
    hidden: Tensor,  # (..., D), or (H, D) with hidden_index; fp32, bf16, fp16 or fp64
    weight: Tensor,  # (V, D), the vocabulary projection
    token_ids: Tensor,  # (...), or (N,) with hidden_index, as are the other per-token arguments
    old_logprobs: Tensor | None,  # (...)
    advantages: Tensor,  # broadcasts against (...)
    *,
    bias: Tensor | None = None,  # (V,)
    hidden_index: Tensor | None = None,  # (N,) int64, the hidden state that predicts each token
    weights: Tensor | None = None,
    loss_mask: Tensor | None = None,
    prob_threshold: float | None = 0.9,
    ref_logprobs: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    clip_eps_low: float | None = 0.2,
    clip_eps_high: float | None = 0.2,
    clip_ratio_max: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    kl_scope: str = "masked",
    kl_weights: Tensor | None = None,
    kl_clamp: float | None = 10.0,
    kl_ratio: bool = False,
    entropy_coef: float = 0.0,
    policy_norm: float | Tensor | None = None,
    kl_norm: float | Tensor | None = None,
    nan_logprobs: str = "error",
    entropy: bool = False,
    metrics: bool = False,
    max_active: int | None = None,
    logits_dtype: torch.dtype = torch.float32,
    memory_budget: int | None = None,  # bytes of logits at a time
    batch_invariant: bool = False,
    backend: str | None = None,
) -> PolicyLoss:
    """`masked_ppo_loss(hidden @ weight.T + bias, ...)` without the logits of unused tokens.

    Unused tokens are removed before the projection: those that the masks drop, and those with
    advantage 0 that no KL term, entropy bonus or `metrics` needs. The loss is the same; the three
    matrix products run over the other tokens only. Several tokens may share a hidden state through
    `hidden_index`; their gradients are summed in fp32, in order.

    `old_logprobs=None` with a `prob_threshold` projects all of the loss mask, and masks afterwards.

    hidden and weight may differ in dtype, as under autocast. Logits are fp32, or bf16 with
    `logits_dtype=torch.bfloat16` (faster where the CPU has bf16 instructions; costs up to 4e-3 in a
    logprob). At most `memory_budget` bytes of logits exist at a time; None is 1 GiB, and on a GPU a
    quarter of what is free, 1 to 6 GiB. `masked_ppo_loss` has the other arguments and errors.
    A DTensor as `weight` is shared over the vocabulary if all processes of its mesh have the same
    hidden states and tokens, else gathered; its gradient is the mean of theirs (sharded.py).

    `batch_invariant=True`: at a given `policy_norm` and `kl_norm`, the logprob, the entropy, the
    loss term and the gradient of a hidden state have the same bits whatever other tokens, masks,
    chunks and threads stand beside it, as long as one token uses it. (On a GPU with float16, up to
    gradients of logits 2^-29 times the largest.) docs/kernels.md says what that costs.

    Raises ValueError if there are more than `max_active` rows to project. While a CUDA graph is
    captured, and under torch.compile, always `max_active` rows are projected, without a host sync;
    if there are more, the rest is left out and `overflow` is True. A bad id, index, temperature or
    norm, or an old logprob of NaN, then makes the loss NaN on a GPU; on a CPU it still raises.
    """
    shape = head.check_head(hidden, weight, bias, hidden_index)
    head.check_options(hidden, weight, bias, hidden_index, logits_dtype)
    rows.check_floating("hidden", hidden)
    tokens = prepare(
        hidden, shape, token_ids=token_ids, old_logprobs=old_logprobs, advantages=advantages,
        weights=weights, loss_mask=loss_mask, prob_threshold=prob_threshold,
        ref_logprobs=ref_logprobs, temperature=temperature, logit_scale=logit_scale,
        logit_softcap=logit_softcap, clip_eps_low=clip_eps_low, clip_eps_high=clip_eps_high,
        clip_ratio_max=clip_ratio_max, log_ratio_clamp=log_ratio_clamp, kl_coef=kl_coef,
        kl_estimator=kl_estimator, kl_scope=kl_scope, kl_weights=kl_weights, kl_clamp=kl_clamp,
        kl_ratio=kl_ratio, entropy_coef=entropy_coef, policy_norm=policy_norm, kl_norm=kl_norm,
        nan_logprobs=nan_logprobs, metrics=metrics,
    )  # fmt: skip
    sizes = (tokens.wants_entropy(entropy), logits_dtype, memory_budget, max_active)
    tensors = (hidden, weight, bias, hidden_index)
    return _loss(*tensors, tokens, shape, sizes, batch_invariant, backend)


def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden_index: Tensor | None,
    tokens: Tokens,
    shape: tuple[int, ...],
    sizes: tuple[bool, torch.dtype, int | None, int | None],
    batch_invariant: bool,
    backend: str | None,
) -> PolicyLoss:
    chosen = dispatch.choose("policy_loss", hidden, backend)
    entropy, logits_dtype, _, max_active = sizes
    if chosen == "reference":
        head.check_reference(hidden, logits_dtype, batch_invariant)
        return linear_masked_ppo_loss_ref(
            hidden, weight, bias, hidden_index, tokens, shape, entropy, max_active
        )
    fixed = max_active is not None and rows.is_captured(hidden)
    needs_grad = head.needs_grad(hidden, weight, bias)
    outputs = _differentiable(
        *(hidden, weight, bias, hidden_index, needs_grad, *sizes, fixed, batch_invariant, chosen),
        *tokens.arguments(),
    )
    loss, figures, counts, logprobs, row_entropy = outputs[:5]
    row_entropy = row_entropy if entropy else None
    return record(loss, figures, counts, logprobs, row_entropy, shape, overflows=True)
