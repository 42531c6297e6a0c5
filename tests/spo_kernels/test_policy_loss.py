"""masked_ppo_loss: hand-worked numbers, then every backend here against the fp64 reference."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    assert_compiles,
    assert_figures_as_good,
    backends_of,
    needs_fast,
    slow_if_interpreted,
    tokens_from,
)
from torch import tensor

import spo_kernels
from spo_kernels import masked_ppo_loss, policy_loss, rows
from spo_kernels.testing import FAST, assert_as_good_as_torch, loss_inputs, poison

needs_native, BACKENDS = needs_fast("policy_loss"), backends_of("policy_loss")
EXACT = {"rtol": 0, "atol": 0, "equal_nan": True}
FIELDS = ("logits", "token_ids", "old_logprobs", "advantages", "loss_mask", "ref_logprobs")


def evaluate(inputs, backend, *, dtype=None, factor=1.0, **options):
    """Loss record and dlogits; `dtype` casts the logits first (fp64 gives the oracle)."""
    logits = inputs.logits.detach().to(dtype or inputs.logits.dtype).clone().requires_grad_()
    out = masked_ppo_loss(
        logits,
        inputs.token_ids,
        inputs.old_logprobs,
        inputs.advantages,
        backend=backend,
        **{"loss_mask": inputs.loss_mask, **options},
    )
    (out.loss * factor).backward()
    return out, logits.grad


def compare(inputs, *, oracle_inputs=None, factor=1.0, **options):
    """The kernel against the oracle, judged by the reference in the same dtype."""
    same, same_grad = evaluate(oracle_inputs or inputs, "reference", factor=factor, **options)
    oracle, oracle_grad = evaluate(
        oracle_inputs or inputs, None, dtype=torch.float64, factor=factor, **options
    )
    got, got_grad = evaluate(inputs, FAST, factor=factor, **options)
    assert got_grad.dtype == inputs.logits.dtype
    assert_figures_as_good(got, same, oracle)
    assert_as_good_as_torch("dlogits", got_grad, same_grad, oracle_grad)
    return got, got_grad


# Two tokens of a vocabulary of two with equal logits: every logprob is log(1/2).
HAND = {
    "token_ids": tensor([0, 1, 0]),
    "old_logprobs": tensor([math.log(0.5), math.log(0.25), math.log(0.95)]),
    "advantages": tensor([1.0, 2.0, 5.0]),
}


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    logits = torch.zeros(3, 2, requires_grad=True)
    out = masked_ppo_loss(logits, **HAND, backend=backend, entropy=True)
    out.loss.backward()
    # Ratios 1 and 2, the second clipped to 1.2; the third token was sampled at p >= 0.9.
    assert out.loss.item() == pytest.approx(-(1.0 + 2.4) / 2)
    assert out.num_kept == 2
    assert out.clipfrac.item() == 0.5
    assert out.ratio_mean.item() == pytest.approx(1.5)
    assert (out.clipfrac_low, out.clipfrac_high, out.clipfrac_max) == (0, 0.5, 0)
    missing = math.nan  # the third row is not computed
    for found, value in ((out.logprobs, math.log(0.5)), (out.entropy, math.log(2))):
        torch.testing.assert_close(found, tensor([value, value, missing]), equal_nan=True)
    # d(-ratio A / 2)/dlogprob = -1/2 on the first row only, times (onehot - p).
    torch.testing.assert_close(logits.grad, tensor([[-0.25, 0.25], [0.0, 0.0], [0.0, 0.0]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [
        ("k1", -math.log(2), 1.0),
        ("k2", math.log(2) ** 2 / 2, -math.log(2)),
        ("k3", 2 - math.log(2) - 1, 1 - 2),
    ],
)
def test_kl_by_hand(backend, estimator, value, slope):
    """A policy logprob of log(1/2) against a reference logprob of 0; advantage 0: the KL alone."""
    logits = torch.zeros(1, 2, requires_grad=True)
    out = masked_ppo_loss(
        logits,
        tensor([0]),
        tensor([-1.0]),
        tensor([0.0]),
        ref_logprobs=tensor([0.0]),
        kl_coef=0.5,
        kl_estimator=estimator,
        kl_norm=4,
        backend=backend,
    )
    out.loss.backward()
    assert out.kl.item() == pytest.approx(0.5 / 4 * value)
    torch.testing.assert_close(logits.grad, 0.5 / 4 * slope * tensor([[0.5, -0.5]]))


VOCABULARIES = [(1, 7), (33, 7), (17, 1003), (9, 32000), (5, 50257), (3, 129920), (3, 151936)]


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), VOCABULARIES)
def test_against_oracle(dtype, rows, vocab):
    compare(loss_inputs(rows, vocab, dtype, seed=rows), entropy=True)


OPTIONS = {
    "no mask": {"prob_threshold": None},
    "threshold": {"prob_threshold": 0.3},
    "cold": {"temperature": 0.1, "entropy": True},
    "hot": {"temperature": 5.0, "entropy": True},
    "clips": {"clip_eps_low": 0.05, "clip_eps_high": 0.4},
    "clamp": {"log_ratio_clamp": 0.1},
    "k1": {"kl_coef": 0.3, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.3, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.3, "kl_estimator": "k3"},
    "KL over all": {"kl_coef": 0.3, "kl_scope": "all"},
    "norms": {"kl_coef": 0.3, "policy_norm": 40, "kl_norm": tensor(7.5)},
    "tensor norm": {"kl_coef": 0.3, "policy_norm": tensor(40)},
    "entropy": {"entropy": True},
}


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, dtype):
    options = OPTIONS[option]
    temperature = options.get("temperature", 1.0)
    inputs = loss_inputs(21, 517, dtype, temperature=temperature, seed=5)
    if "kl_coef" in options:
        options = {**options, "ref_logprobs": inputs.ref_logprobs}
    got, _ = compare(inputs, factor=3.0, **options)
    assert got.num_kept > 0 and got.loss != 0


@needs_native
def test_temperature_per_token():
    inputs = loss_inputs(24, 99)
    temperature = torch.linspace(0.3, 3, 24)
    compare(inputs, temperature=temperature, entropy=True)
    # One temperature per sequence of eight tokens.
    shaped = dataclasses.replace(
        inputs, **{f: getattr(inputs, f).view(3, 8, *getattr(inputs, f).shape[1:]) for f in FIELDS}
    )
    got, grad = evaluate(shaped, FAST, temperature=tensor([0.5, 1.0, 2.0]))
    want, want_grad = evaluate(
        inputs, FAST, temperature=tensor([0.5, 1.0, 2.0]).repeat_interleave(8)
    )
    torch.testing.assert_close(got.logprobs.flatten(), want.logprobs, **EXACT)
    assert torch.equal(grad.view(24, 99), want_grad)


@needs_native
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_offsets(shift):
    inputs = loss_inputs(9, 1003)
    compare(dataclasses.replace(inputs, logits=inputs.logits + shift), entropy=True)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_impossible_tokens(dtype):
    """-inf logits, also in all of a block: no probability, no gradient, no part in the entropy."""
    inputs = loss_inputs(9, 20_000, dtype, kept=1.0)
    logits = inputs.logits.clone()
    logits[:, ::3] = -math.inf
    logits[1, :9000] = -math.inf
    ids = (inputs.token_ids // 3 * 3 + 1).clamp(min=9001)
    ids[4] = 0  # a chosen one is clamped
    inputs = dataclasses.replace(inputs, logits=logits, token_ids=ids, loss_mask=None)
    got, grad = compare(inputs, entropy=True, prob_threshold=None)
    assert (grad[:, ::3] == 0).all() and got.logprobs[4] == -math.inf


@needs_native
@pytest.mark.parametrize("kept", [0.3, 0.8])  # with few kept, the buffer is zero beforehand
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_rows_hold_nan(dtype, kept):
    inputs = loss_inputs(37, 1003, dtype, kept=kept)
    inputs = dataclasses.replace(inputs, advantages=inputs.advantages.clone())
    inputs.advantages[::5] = 0
    used = inputs.loss_mask & (inputs.old_logprobs < math.log(0.9)) & (inputs.advantages != 0)
    dirty = dataclasses.replace(
        inputs,
        logits=poison(inputs.logits, ~used),
        token_ids=inputs.token_ids.masked_fill(~inputs.loss_mask, -100),
        advantages=poison(inputs.advantages, ~inputs.loss_mask),
        ref_logprobs=poison(inputs.ref_logprobs, ~used),
    )
    got, grad = compare(dirty, oracle_inputs=inputs, entropy=True)
    assert 0 < used.sum() < 37 and (grad[used] != 0).any()
    assert (grad[~used] == 0).all()
    assert torch.equal(got.logprobs.isnan(), ~used) and torch.equal(got.entropy.isnan(), ~used)
    # The reference withstands the same.
    ref, ref_grad = evaluate(dirty, "reference")
    assert torch.isfinite(ref_grad).all() and torch.isfinite(ref.loss)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 5])
@pytest.mark.parametrize("options", [{}, {"kl_coef": 0.1, "kl_scope": "all"}])
def test_nothing_kept(backend, rows, options):
    """Z = 0: loss 0, zero gradients, no NaN, though the logits hold nothing else."""
    inputs = loss_inputs(rows, 11)
    if options:
        options = {**options, "ref_logprobs": inputs.ref_logprobs}
        inputs = dataclasses.replace(inputs, old_logprobs=torch.zeros(rows))
    else:
        inputs = dataclasses.replace(
            inputs,
            logits=torch.full_like(inputs.logits, math.nan),
            loss_mask=torch.zeros(rows, dtype=torch.bool),
        )
    out, grad = evaluate(inputs, backend, **options)
    assert out.loss == 0 and out.num_kept == 0 and out.clipfrac == 0 and out.ratio_mean == 0
    assert torch.equal(grad, torch.zeros(rows, 11))


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_finite_in_a_kept_row_is_seen(backend):
    inputs = dataclasses.replace(loss_inputs(6, 300, kept=1.0), loss_mask=None)
    for value in (math.nan, math.inf)[: 1 if backend == "reference" else 2]:
        inputs.logits[2, 70] = value
        out, grad = evaluate(inputs, backend)
        assert out.loss.isnan() and out.logprobs.isnan().tolist() == [i == 2 for i in range(6)]
        assert grad.isnan().all(1).tolist() == [i == 2 for i in range(6)]


@needs_native
def test_views():
    """Slices, a transposed batch, a strided vocabulary and four leading dimensions."""
    base = loss_inputs(40, 96)
    shaped = {f: getattr(base, f).view(5, 8, *getattr(base, f).shape[1:]) for f in FIELDS}
    views = {
        "shifted": {f: x[:, :-1] for f, x in shaped.items()},
        "transposed": {f: x.transpose(0, 1) for f, x in shaped.items()},
        "every other": {f: x[1:, ::2] for f, x in shaped.items()},
        "deep": {f: x.view(5, 2, 2, 2, *x.shape[2:])[:, :, :, :1] for f, x in shaped.items()},
    }
    wide = base.logits.repeat_interleave(2, 1).view(5, 8, 192)[..., ::2]
    views["strided"] = {**shaped, "logits": wide}
    for name, view in views.items():
        inputs = dataclasses.replace(base, **view)
        dense = dataclasses.replace(base, **{f: x.contiguous() for f, x in view.items()})
        leaf = inputs.logits.detach().requires_grad_()  # keeps the strides
        tokens = [getattr(inputs, f) for f in FIELDS[1:4]]
        out = masked_ppo_loss(leaf, *tokens, loss_mask=inputs.loss_mask, backend=FAST)
        out.loss.backward()
        want, want_grad = evaluate(dense, FAST)
        assert torch.equal(out.loss, want.loss), name
        assert torch.equal(leaf.grad, want_grad), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_advantages_broadcast(backend):
    base = loss_inputs(12, 31)
    inputs = dataclasses.replace(
        base, **{f: getattr(base, f).view(3, 4, -1).squeeze(-1) for f in FIELDS}
    )
    inputs = dataclasses.replace(inputs, logits=base.logits.view(3, 4, 31))
    each = tensor([0.5, -1.0, 2.0])
    grads = []
    for advantages in (each, each[:, None], each[:, None].expand(3, 4)):
        grads.append(evaluate(dataclasses.replace(inputs, advantages=advantages), backend)[1])
    assert torch.equal(grads[0], grads[2]) and torch.equal(grads[1], grads[2])
    square = dataclasses.replace(
        base, **{f: getattr(inputs, f)[:, :3] for f in FIELDS if f != "advantages"}, advantages=each
    )
    got = evaluate(square, backend)[1]
    want = evaluate(dataclasses.replace(square, advantages=each[:, None].expand(3, 3)), backend)[1]
    assert torch.equal(got, want)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_grad(dtype):
    inputs = loss_inputs(13, 9001, dtype)
    want, want_grad = evaluate(inputs, FAST, factor=2.0)
    leaf = inputs.logits.clone().requires_grad_()
    logits = leaf * 1
    out = masked_ppo_loss(
        logits,
        *(getattr(inputs, f) for f in FIELDS[1:4]),
        loss_mask=inputs.loss_mask,
        inplace_grad=True,
        backend=FAST,
    )
    (out.loss * 2.0).backward()
    assert torch.equal(leaf.grad, want_grad)
    assert torch.equal(out.loss, want.loss)
    assert logits.data_ptr() != leaf.data_ptr() and torch.equal(logits, want_grad)


@needs_native
def test_inplace_grad_guards_other_uses():
    inputs = loss_inputs(4, 16)
    logits = inputs.logits.clone().requires_grad_() * 1
    saved = logits.square().sum()
    arguments = [getattr(inputs, f) for f in FIELDS[1:4]]
    loss = masked_ppo_loss(logits, *arguments, inplace_grad=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + saved).backward()
    with pytest.raises(ValueError, match="require a gradient"):
        masked_ppo_loss(inputs.logits, *arguments, inplace_grad=True)
    repeated = inputs.logits[:1].clone().requires_grad_().expand(4, 16)
    with pytest.raises(ValueError, match="rows that share no memory"):
        masked_ppo_loss(repeated, *arguments, inplace_grad=True)


@needs_native
def test_backward_twice():
    inputs = loss_inputs(4, 16, kept=1.0)
    logits = inputs.logits.clone().requires_grad_()
    tokens = [getattr(inputs, f) for f in FIELDS[1:4]]
    loss = masked_ppo_loss(logits, *tokens, backend=FAST).loss
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits, tensor(-0.5), retain_graph=True)
    (third,) = torch.autograd.grad(loss, logits)
    assert first.abs().sum() > 0
    assert torch.equal(third, first) and torch.equal(second, first * -0.5)


@needs_native
@slow_if_interpreted
def test_more_rows_than_a_grid_dimension():
    compare(loss_inputs(65_537, 5))


def tokens_of(inputs, **changes):
    """What the kernels are told of all rows, without the checks of the public function."""
    given = {"policy_norm_value": 1.5, "kl_norm_value": 1.0, "log_threshold": math.inf}
    return tokens_from(inputs, **given | changes)


def run_rows(logits, dlogits, tokens):
    """All phases, as while a CUDA graph is captured; figures, logprobs, entropy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "is_captured", lambda _: True)
        _, figures, _, logprobs, entropy, _ = policy_loss._run(
            logits, dlogits, True, True, FAST, tokens
        )
    return figures, logprobs, entropy


@needs_native
def test_rows_that_lie_far_apart():
    """Rows 2^30 elements apart in a buffer of which only the rows are ever touched."""
    count, vocab, stride = 4, 1003, 2**30
    inputs = loss_inputs(count, vocab, torch.bfloat16, kept=1.0)
    base = torch.empty((count - 1) * stride + vocab, dtype=torch.bfloat16)
    far = base.as_strided((count, vocab), (stride, 1))
    far.copy_(inputs.logits)
    near, tokens = torch.zeros_like(inputs.logits), tokens_of(inputs)
    want = run_rows(inputs.logits, near, tokens)
    got = run_rows(far, far, tokens)
    if FAST == "triton":  # its lanes hold other columns where rows are aligned otherwise
        torch.testing.assert_close((*got, far), (*want, near))
    else:
        assert all(torch.equal(a, b) for a, b in zip((*got, far), (*want, near), strict=True))
    assert (near[-1] != 0).any()


@needs_native
def test_unknown_ids_are_not_read():
    """Where Python cannot look first, under graph capture: NaN, and no wild read."""
    inputs = loss_inputs(5, 100)
    ids = inputs.token_ids.clone()
    ids[1], ids[2], ids[3] = -1, 100, 2**45
    dlogits = torch.zeros_like(inputs.logits)
    tokens = tokens_of(inputs, token_ids=ids)
    _, chosen, entropy = run_rows(inputs.logits, dlogits, tokens)
    unknown = [False, True, True, True, False]
    assert chosen.isnan().tolist() == unknown and not entropy.isnan().any()
    assert dlogits.isnan().all(1).tolist() == unknown
    # The slope of k1 does not depend on the logprob: no column counts as the chosen one.
    zeros = torch.zeros(5)
    k1 = {"advantages": zeros, "ref_logprobs": zeros, "kl_coef": 1.0, "kl_estimator": 1}
    run_rows(inputs.logits, dlogits, tokens_of(inputs, token_ids=ids, **k1))
    torch.testing.assert_close(dlogits[1:4], -inputs.logits[1:4].softmax(-1))


@needs_native
@pytest.mark.parametrize(
    ("temperature", "clamp", "far", "norm"),
    [(0.25, 10.0, 9.7, 4000.0), (0.1, 10.0, 8.8, 1e4), (1.0, 20.0, 15.0, 1e6), (1.0, 10.0, 5, 1.0)],
)
def test_fp16_gradients_do_not_overflow(temperature, clamp, far, norm):
    """The largest ratio that a token can have is known from its old logprob."""
    logits = tensor([[2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]).half()
    logprobs = (logits.float() / temperature).log_softmax(-1)[:, 2]
    inputs = (tensor([2, 2]), logprobs - tensor([far, 0.1]), tensor([-1.0, 1.0]))
    options = {"temperature": temperature, "log_ratio_clamp": clamp, "policy_norm": norm}
    grads = []
    for dtype, backend in ((torch.float16, FAST), (torch.float64, None)):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        out = masked_ppo_loss(leaf, *inputs, prob_threshold=None, backend=backend, **options)
        out.loss.backward()
        grads.append(leaf.grad.double())
    torch.testing.assert_close(*grads, rtol=2**-9, atol=2**-10 * grads[1].abs().max().item())


@needs_native
def test_an_outlier_does_not_flush_fp16_gradients():
    inputs = loss_inputs(64, 500, torch.float16, kept=1.0)
    advantages = torch.ones(64)
    advantages[0] = 1e4
    changed = dataclasses.replace(inputs, advantages=advantages)
    got, same, exact = (
        evaluate(changed, backend, dtype=dtype, policy_norm=1.0)[1][1:].double()
        for backend, dtype in ((FAST, None), ("reference", None), (None, torch.float64))
    )
    assert (got - exact).norm() <= 2 * (same - exact).norm() + 1e-6 * exact.norm()


@needs_native
def test_negative_views_are_read_as_their_values():
    inputs = loss_inputs(6, 20, kept=1.0)
    want, grad = evaluate(inputs, FAST)
    negated = {
        name: torch._neg_view(-getattr(inputs, name))
        for name in ("logits", "old_logprobs", "advantages")
    }
    got, other = evaluate(dataclasses.replace(inputs, **negated), FAST)
    assert torch.equal(got.loss, want.loss) and torch.equal(grad, other)


@needs_native
def test_deterministic_for_any_thread_count():
    inputs = loss_inputs(67, 3001)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(evaluate(inputs, FAST, entropy=True))
    finally:
        torch.set_num_threads(threads)
    for out, grad in results[1:]:
        assert torch.equal(grad, results[0][1]) and torch.equal(out.loss, results[0][0].loss)


@needs_native
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 20),
    vocab=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
    kept=st.floats(0, 1),
    threshold=st.one_of(st.none(), st.floats(0.05, 1)),
    temperature=st.floats(0.1, 5),
    kl_coef=st.sampled_from([0.0, 0.2]),
    estimator=st.sampled_from(["k1", "k2", "k3"]),
    scope=st.sampled_from(["masked", "all"]),
    entropy=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_fuzz(
    rows, vocab, dtype, kept, threshold, temperature, kl_coef, estimator, scope, entropy, seed
):
    inputs = loss_inputs(rows, vocab, dtype, kept=kept, seed=seed, temperature=temperature)
    compare(
        inputs,
        prob_threshold=threshold,
        temperature=temperature,
        kl_coef=kl_coef,
        kl_estimator=estimator,
        kl_scope=scope,
        ref_logprobs=inputs.ref_logprobs,
        entropy=entropy,
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradcheck_of_reference(estimator):
    inputs = loss_inputs(6, 5, torch.float64, kept=0.8)

    def loss(logits):
        return masked_ppo_loss(
            logits,
            *(getattr(inputs, f) for f in FIELDS[1:4]),
            ref_logprobs=inputs.ref_logprobs,
            kl_coef=0.3,
            kl_estimator=estimator,
            temperature=0.8,
        ).loss

    assert torch.autograd.gradcheck(loss, inputs.logits.requires_grad_())


@needs_native
@pytest.mark.parametrize("needs_grad", [True, False])
def test_opcheck(needs_grad):
    inputs = loss_inputs(5, 23)
    options = {"log_threshold": math.log(0.9), "kl_coef": 0.5, "kl_estimator": 3}
    tokens = tokens_of(inputs, ref_logprobs=inputs.ref_logprobs, **options).arguments()
    logits = inputs.logits.clone().requires_grad_(needs_grad)
    ops = torch.ops.spo_kernels
    torch.library.opcheck(ops.policy_loss.default, (logits, needs_grad, True, FAST, *tokens))
    torch.library.opcheck(
        ops.policy_loss_inplace.default, (inputs.logits.clone(), True, FAST, *tokens)
    )
    for unscale in (None, tensor(0.5)):
        torch.library.opcheck(ops.scale.default, (inputs.logits.clone(), tensor(2.0), unscale))


@needs_native
def test_compiles_into_one_graph():
    inputs = loss_inputs(6, 50, kept=0.7)
    arguments = [getattr(inputs, f) for f in FIELDS[1:4]]

    def step(scaled):
        out = masked_ppo_loss(scaled * 1.5, *arguments, entropy=True)
        return out.loss * 2, out.entropy

    assert_compiles(step, inputs.logits)


def test_a_mask_holds_bool_or_integers():
    """A float would be cut to 0 and 1: fractions, and NaN, which trained its token."""
    old = tensor([-1.0, -1.0, -0.01, -1.0])
    for mask in (tensor([2, 0, 1, 1]), tensor([True, False, True, True])):
        assert spo_kernels.policy_mask(old, mask, 0.9).tolist() == [True, False, False, True]
        assert spo_kernels.policy_mask(old, mask, None).tolist() == [True, False, True, True]
    for wrong in (None, [1, 0, 1, 1]):
        with pytest.raises(TypeError, match="loss_mask: expected a tensor"):
            spo_kernels.policy_mask(old, wrong, 0.9)
    logits, ids = torch.zeros(4, 8), torch.arange(4)
    for wrong in (torch.ones(4), tensor([1.0, math.nan, 0.5, 0]).bfloat16(), torch.ones(4) * 1j):
        for call in (
            lambda mask: spo_kernels.policy_mask(old, mask, 0.9),
            lambda mask: masked_ppo_loss(logits, ids, old, old, loss_mask=mask),
            lambda mask: spo_kernels.policy_objective(old, old, old, loss_mask=mask),
            lambda mask: spo_kernels.linear_masked_ppo_loss(
                logits, torch.zeros(9, 8), ids, old, old, loss_mask=mask
            ),
            lambda mask: spo_kernels.token_logprobs(logits, ids, loss_mask=mask),
        ):
            with pytest.raises(TypeError, match="loss_mask: expected bool or .* as `weights`"):
                call(wrong)


@needs_native
def test_second_derivatives_are_refused():
    """A gradient penalty over the formed gradient would count as zero."""
    x = torch.randn(4, 16)
    hidden, weight = torch.randn(4, 8), torch.randn(16, 8)
    others = torch.arange(4), torch.full((4,), -2.0), torch.ones(4)
    for leaf, value in (
        (x, lambda x: masked_ppo_loss(x, *others).loss),
        (x, lambda x: masked_ppo_loss(x * 1, *others, inplace_grad=True).loss),
        (x, lambda x: spo_kernels.token_logprobs(x, others[0]).sum()),
        (hidden, lambda h: spo_kernels.linear_masked_ppo_loss(h, weight, *others).loss),
        (hidden, lambda h: spo_kernels.linear_token_logprobs(h, weight, others[0]).sum()),
    ):
        leaf = leaf.clone().requires_grad_()
        (want,) = torch.autograd.grad(value(leaf), leaf)
        loss = value(leaf)
        with pytest.raises(RuntimeError, match="do not have; use backend='reference'"):
            torch.autograd.grad(loss, leaf, create_graph=True)
        (again,) = torch.autograd.grad(value(leaf), leaf)
        assert torch.equal(again, want)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"token_ids": torch.zeros(4)}, TypeError, "token_ids: expected int32 or int64"),
        ({"token_ids": torch.full((4,), 16)}, ValueError, r"\[0, 16\).*found 16 at row 0"),
        ({"logits": torch.zeros(4, 16, dtype=torch.int64)}, TypeError, "logits: expected float32"),
        ({"old_logprobs": torch.zeros(5)}, ValueError, r"old_logprobs: .* shape \(4,\)"),
        ({"advantages": torch.zeros(3)}, ValueError, "advantages: expected a shape"),
        ({"loss_mask": torch.ones(4, 1).long()}, ValueError, "loss_mask: expected the tokens' sh"),
        ({"weights": torch.ones(3)}, ValueError, "weights: expected a shape"),
        ({"kl_weights": [1.0] * 4}, TypeError, "kl_weights: expected a tensor"),
        ({"clip_ratio_max": 1.0}, ValueError, "clip_ratio_max: expected a number above 1"),
        ({"clip_ratio_max": math.nan}, ValueError, "clip_ratio_max: expected a number above 1"),
        ({"clip_eps_low": -0.1}, ValueError, "clip_eps_low: expected a number >= 0"),
        ({"kl_clamp": 0.0}, ValueError, "kl_clamp: expected a positive number or None"),
        ({"entropy_coef": math.inf}, ValueError, "entropy_coef: expected a finite number"),
        ({"nan_logprobs": "keep"}, ValueError, "nan_logprobs: expected 'error' or 'drop'"),
        ({"old_logprobs": None, "kl_norm": 2}, ValueError, "kl_norm: expected policy_norm beside"),
        ({"old_logprobs": torch.zeros(4) * 1j}, TypeError, "old_logprobs: expected real"),
        ({"logits": tensor(1.0)}, ValueError, "logits: expected at least one dimension"),
        ({"kl_coef": 0.1}, ValueError, "ref_logprobs: expected a tensor"),
        ({"kl_coef": -0.1}, ValueError, "kl_coef: expected a finite number >= 0"),
        ({"kl_estimator": "k4"}, ValueError, "k1, k2 or k3"),
        ({"kl_scope": "some"}, ValueError, "'masked' or 'all'"),
        ({"prob_threshold": 0.0}, ValueError, r"prob_threshold: expected \(0, 1\]"),
        ({"temperature": 0.0}, ValueError, "temperature: expected a positive finite"),
        ({"temperature": torch.zeros(4)}, ValueError, "temperature: expected a positive finite"),
        ({"temperature": tensor(math.inf)}, ValueError, "temperature: expected a positive finite"),
        ({"old_logprobs": tensor([-1.0, -1, math.nan, -1])}, ValueError, "NaN .* at row 2"),
        ({"logits": [[0.0] * 16] * 4}, TypeError, "logits: expected a tensor, found list"),
        ({"advantages": 1.0}, TypeError, "advantages: expected a tensor, found float"),
        ({"loss_mask": [1] * 4}, TypeError, "loss_mask: expected a tensor, found list"),
        ({"policy_norm": -1}, ValueError, "policy_norm: expected a finite count"),
        ({"policy_norm": tensor(-1.0)}, ValueError, "policy_norm: expected a finite count"),
        ({"policy_norm": tensor(math.nan)}, ValueError, "policy_norm: expected a finite count"),
        ({"policy_norm": torch.ones(2)}, ValueError, "policy_norm: expected one number"),
        ({"log_ratio_clamp": 0}, ValueError, "log_ratio_clamp: expected a positive number"),
        ({"kl_coef": None}, TypeError, "kl_coef: expected a number, found NoneType"),
        ({"entropy_coef": "1"}, TypeError, "entropy_coef: expected a number, found str"),
        ({"clip_eps_low": [0.2]}, TypeError, "clip_eps_low: expected a number, found list"),
        ({"prob_threshold": "x"}, TypeError, "prob_threshold: expected a number, found str"),
        ({"temperature": [0.5]}, TypeError, "temperature: expected a number or a tensor"),
        ({"token_ids": torch.zeros(3).long()}, ValueError, "token_ids: expected the tokens' shape"),
        ({"backend": "gpu"}, ValueError, "backend: expected one of"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "logits": torch.zeros(4, 16),
        "token_ids": torch.zeros(4, dtype=torch.int64),
        "old_logprobs": torch.full((4,), -1.0),
        "advantages": torch.ones(4),
    }
    with pytest.raises(error, match=message):
        masked_ppo_loss(**{**arguments, **change})
