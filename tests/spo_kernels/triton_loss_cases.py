"""The Triton kernel of the policy loss against the fp64 reference, on a GPU or interpreted.

test_triton.py runs this file in a process of its own: whether Triton interprets is settled when it
is first imported, and no other test shall see the variable that says so.
"""

import dataclasses
import math
import os

import pytest
import torch
import triton
import triton.language as tl
from torch import tensor

from spo_kernels import masked_ppo_loss, objective, policy_loss
from spo_kernels.testing import assert_as_good_as_torch, loss_inputs, poison
from spo_kernels.triton.objective import kl_term, policy_term, token_args

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The step from an empty maximum to the first logit overflows on purpose: its exponential is 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")


def make(rows, vocab, dtype=torch.float32, **options):
    return loss_inputs(rows, vocab, dtype, device=DEVICE, **options)


def evaluate(inputs, backend, *, dtype=None, **options):
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
    out.loss.backward()
    return out, logits.grad


def compare(inputs, clean=None, **options):
    """The kernel against the oracle on `clean` inputs, judged by the reference in fp32."""
    if "kl_coef" in options:
        options["ref_logprobs"] = inputs.ref_logprobs
    got, got_grad = evaluate(inputs, "triton", **options)
    if clean is not None and "kl_coef" in options:
        options["ref_logprobs"] = clean.ref_logprobs
    same, same_grad = evaluate(clean or inputs, "reference", **options)
    oracle, oracle_grad = evaluate(clean or inputs, None, dtype=torch.float64, **options)
    for name in ("loss", "policy_loss", "kl", "clipfrac", "ratio_mean", "logprobs", "entropy"):
        triple = [getattr(record, name) for record in (got, same, oracle)]
        if triple[0] is not None:
            summed = 1.0 if triple[0].ndim == 0 else 0.0  # terms of order one that may cancel
            assert_as_good_as_torch(name, *triple, scale=summed)
    assert got_grad.dtype == inputs.logits.dtype
    assert_as_good_as_torch("dlogits", got_grad, same_grad, oracle_grad)
    return got, got_grad, oracle


SHAPES = [(1, 7), (17, 1003), (3, 32000), (2, 50257), (2, 129920), (2, 151936)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "vocab"), SHAPES)
def test_policy_loss(dtype, rows, vocab):
    inputs = make(rows, vocab, dtype, kept=1.0, seed=1)
    inputs = dataclasses.replace(inputs, loss_mask=None)
    got, _, oracle = compare(inputs, entropy=True, kl_coef=0.2)
    assert got.num_kept == rows and (got.logprobs - oracle.logprobs).abs().max() <= 2e-5


OPTIONS = {
    "defaults": {},
    "hot": {"temperature": 5.0, "entropy": True},
    "cold": {"temperature": 0.2, "entropy": True},
    "temperature per token": {"temperature": torch.linspace(0.3, 3, 20, device=DEVICE)},
    "no threshold": {"prob_threshold": None},
    "clips": {"clip_eps_low": 0.05, "clip_eps_high": 0.4},
    "clamp": {"log_ratio_clamp": 0.1},
    "k1": {"kl_coef": 0.3, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.3, "kl_estimator": "k2"},
    "KL over all": {"kl_coef": 0.3, "kl_scope": "all", "policy_norm": 40, "kl_norm": 7},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option):
    temperature = OPTIONS[option].get("temperature", 1.0)
    near = temperature if isinstance(temperature, float) else 1.0
    got, _, _ = compare(make(20, 517, temperature=near, seed=5), **OPTIONS[option])
    assert got.num_kept > 0 and got.loss != 0


@triton.jit
def objective_kernel(logprobs, tokens, out):
    N: tl.constexpr = 32
    i = tl.arange(0, N)
    logprob = tl.load(logprobs + i)
    advantage = tl.load(tokens.advantages + i)
    policy, clipped, ratio, slope = policy_term(logprob, i, tokens, advantage)
    kl, kl_slope = kl_term(logprob, i, tokens)
    tl.store(out + i, policy)
    tl.store(out + N + i, kl)
    tl.store(out + 2 * N + i, clipped)
    tl.store(out + 3 * N + i, ratio)
    tl.store(out + 4 * N + i, slope + kl_slope)


@pytest.mark.parametrize("estimator", [1, 2, 3])
@pytest.mark.parametrize("clips", [(0.0, 0.0), (0.2, 0.3)])
@pytest.mark.parametrize("clamp", [0.5, 10.0])
def test_objective(estimator, clips, clamp):
    """Value and slope on, just inside and just outside every bound, at infinity and at NaN."""
    tiny = 2.0**-20
    steps = [
        0,
        tiny,
        -tiny,
        1e-3,
        -1e-3,
        0.1,
        -0.1,
        0.5,
        -0.5,
        0.5 + tiny,
        -0.5 - tiny,
        10,
        -10,
        10.5,
        -10.5,
    ]
    steps = [0.25] * (30 - len(steps)) + steps
    steps = tensor([*steps, -math.inf, math.nan], device=DEVICE)
    for sign in (1.0, -1.0):
        # In fp64, since PyTorch's slope of expm1(d) - d cancels near 0.
        leaf = steps.double().requires_grad_()
        zeros, ones = torch.zeros_like(leaf), torch.ones_like(leaf)
        scales = tensor([0.7, 0.3], device=DEVICE)
        advantages = torch.full_like(steps, 1.5 * sign)
        tokens = objective.Tokens(
            token_ids=zeros.long(),
            old_logprobs=zeros,
            advantages=advantages.double(),
            ref_logprobs=zeros,
            temperature=ones,
            policy_mask=ones.bool(),
            kl_mask=ones.bool(),
            scales=scales.double(),
            clip_eps_low=clips[0],
            clip_eps_high=clips[1],
            log_ratio_clamp=clamp,
            kl_estimator=estimator,
        )
        want = objective.token_objective(leaf, tokens)
        (slope,) = torch.autograd.grad((want[0] + want[1]).sum(), leaf)
        expected = torch.stack([*want, slope]).detach().float()
        expected[4, -1] = math.nan  # a kernel shows it, the derivative of PyTorch's clamp hides it
        got, zeros = torch.full_like(expected, 99.0), torch.zeros_like(steps)
        floats = {"old_logprobs": zeros, "advantages": advantages, "ref_logprobs": zeros}
        tokens = dataclasses.replace(tokens, scales=scales, **floats)
        objective_kernel[(1,)](steps, token_args(**vars(tokens)), got)
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_offsets(shift):
    inputs = make(5, 1003)
    compare(dataclasses.replace(inputs, logits=inputs.logits + shift), entropy=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_impossible_tokens(dtype):
    """-inf logits, also in all of the first block: no probability, no gradient, no entropy."""
    inputs = make(5, 20000, dtype, kept=1.0)
    logits = inputs.logits.clone()
    logits[:, ::3] = -math.inf
    logits[1, :9000] = -math.inf
    ids = (inputs.token_ids // 3 * 3 + 1).clamp(min=9001)
    ids[4] = 0  # a chosen one is clamped
    inputs = dataclasses.replace(inputs, logits=logits, token_ids=ids, loss_mask=None)
    got, grad, _ = compare(inputs, entropy=True, prob_threshold=None)
    assert (grad[:, ::3] == 0).all() and got.logprobs[4] == -math.inf


@pytest.mark.parametrize("kept", [0.3, 0.8])  # with few kept, the buffer is zero beforehand
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_rows_hold_nan(dtype, kept):
    inputs = make(19, 1003, dtype, kept=kept)
    inputs = dataclasses.replace(inputs, advantages=inputs.advantages.clone())
    inputs.advantages[::7] = 0
    used = inputs.loss_mask & (inputs.old_logprobs < math.log(0.9)) & (inputs.advantages != 0)
    dirty = dataclasses.replace(
        inputs,
        logits=poison(inputs.logits, ~used),
        token_ids=inputs.token_ids.masked_fill(~inputs.loss_mask, -100),
        advantages=poison(inputs.advantages, ~inputs.loss_mask),
        ref_logprobs=poison(inputs.ref_logprobs, ~used),
    )
    got, grad, _ = compare(dirty, inputs, entropy=True)
    assert 0 < used.sum() < 19 and (grad[~used] == 0).all() and (grad[used] != 0).any()
    assert (got.logprobs[~used] == 0).all() and (got.entropy[~used] == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_in_a_kept_row_is_seen(value):
    inputs = make(4, 300, kept=1.0)
    inputs = dataclasses.replace(inputs, loss_mask=None)
    inputs.logits[2, 70] = value
    out, grad = evaluate(inputs, "triton")
    assert out.loss.isnan() and out.logprobs.isnan().tolist() == [i == 2 for i in range(4)]
    assert grad.isnan().all(1).tolist() == [i == 2 for i in range(4)]


def run_rows(inputs, dlogits, **changes):
    """The row kernel without the checks of the public function, on all rows."""
    ones = torch.ones_like(inputs.loss_mask)
    tokens = objective.Tokens(
        inputs.token_ids,
        inputs.old_logprobs,
        inputs.advantages,
        None,
        torch.ones(1, device=DEVICE),
        ones,
        None,
        torch.ones(2, device=DEVICE),
        0.2,
        0.2,
        10.0,
        0,
    )
    tokens = dataclasses.replace(tokens, **changes)
    return policy_loss.run_rows("triton", inputs.logits, dlogits, tokens, True)


def test_unknown_ids_are_not_read():
    """Where Python cannot look first, under graph capture: NaN, and no wild read."""
    inputs = make(5, 100)
    ids = inputs.token_ids.clone()
    ids[1], ids[2], ids[3] = -1, 100, 2**45
    dlogits = torch.zeros_like(inputs.logits)
    _, chosen, entropy = run_rows(inputs, dlogits, token_ids=ids)
    unknown = [False, True, True, True, False]
    assert chosen.isnan().tolist() == unknown and not entropy.isnan().any()
    assert dlogits.isnan().all(1).tolist() == unknown
    # The slope of k1 does not depend on the logprob: no column counts as the chosen one.
    zeros, ones = torch.zeros_like(inputs.advantages), torch.ones_like(inputs.loss_mask)
    k1 = {"advantages": zeros, "ref_logprobs": zeros, "kl_mask": ones, "kl_estimator": 1}
    run_rows(inputs, dlogits, token_ids=ids, **k1)
    torch.testing.assert_close(dlogits[1:4], -inputs.logits[1:4].softmax(-1))


def test_bf16_gradient_of_fp32_logits():
    inputs = make(5, 1003, kept=1.0)
    wide = torch.full_like(inputs.logits, math.nan)
    narrow = wide.bfloat16()
    run_rows(inputs, wide)
    run_rows(inputs, narrow)
    assert wide.abs().max() > 0
    error = (narrow.float() - wide).abs()
    assert (error <= wide.abs() * 2**-7 + 1e-38).all()  # the interpreter truncates


@pytest.mark.parametrize("dtype", DTYPES)
def test_inplace_grad(dtype):
    inputs = make(7, 9001, dtype)
    want, want_grad = evaluate(inputs, "triton")
    logits = inputs.logits.clone().requires_grad_() * 1
    arguments = (inputs.token_ids, inputs.old_logprobs, inputs.advantages)
    out = masked_ppo_loss(
        logits, *arguments, loss_mask=inputs.loss_mask, inplace_grad=True, backend="triton"
    )
    out.loss.backward()
    assert want_grad.abs().sum() > 0 and torch.equal(logits, want_grad)
    assert torch.equal(out.loss, want.loss)


def test_views():
    """A shifted slice and a transposed batch need no copy; both answer as their copies do."""
    base = make(20, 96, kept=1.0)
    fields = [f.name for f in dataclasses.fields(base)]
    shaped = {f: getattr(base, f).view(4, 5, *getattr(base, f).shape[1:]) for f in fields}
    for pick in (lambda x: x[:, :-1], lambda x: x.transpose(0, 1), lambda x: x[1:, ::2]):
        inputs = dataclasses.replace(base, **{f: pick(x) for f, x in shaped.items()})
        dense = dataclasses.replace(base, **{f: pick(x).contiguous() for f, x in shaped.items()})
        leaf = inputs.logits.detach().requires_grad_()  # keeps the strides
        arguments = (inputs.token_ids, inputs.old_logprobs, inputs.advantages)
        out = masked_ppo_loss(leaf, *arguments, loss_mask=inputs.loss_mask, backend="triton")
        out.loss.backward()
        want, want_grad = evaluate(dense, "triton")
        assert torch.equal(out.loss, want.loss) and torch.equal(leaf.grad, want_grad)
        assert want_grad.abs().sum() > 0


def test_offsets_over_two_to_the_31():
    """Rows 2^30 elements apart in a buffer of which only the rows are ever touched."""
    rows, vocab, stride = 4, 1003, 2**30
    inputs = make(rows, vocab, torch.bfloat16, kept=1.0)
    base = torch.empty((rows - 1) * stride + vocab, dtype=torch.bfloat16, device=DEVICE)
    far = base.as_strided((rows, vocab), (stride, 1))
    far.copy_(inputs.logits)
    near = torch.zeros_like(inputs.logits)
    want = run_rows(inputs, near)
    got = run_rows(dataclasses.replace(inputs, logits=far), far)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert torch.equal(far, near) and (near[-1] != 0).any()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter needs milliseconds per row")
def test_many_rows():
    compare(make(100_003, 257), entropy=True)


@pytest.mark.parametrize("rows", [0, 5])
def test_nothing_kept(rows):
    inputs = dataclasses.replace(make(rows, 11), loss_mask=torch.zeros(rows, device=DEVICE))
    inputs = dataclasses.replace(inputs, logits=torch.full_like(inputs.logits, math.nan))
    out, grad = evaluate(inputs, "triton")
    assert out.loss == 0 and out.num_kept == 0
    assert torch.equal(grad, torch.zeros_like(grad))
