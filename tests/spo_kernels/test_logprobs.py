"""token_logprobs and linear_token_logprobs: by hand, then against the fp64 reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    ELSEWHERE,
    assert_compiles,
    backends_of,
    needs_fast,
    slow_if_interpreted,
)
from torch import tensor

import spo_kernels
from spo_kernels import linear_token_logprobs, logprobs, token_logprobs
from spo_kernels.testing import DEVICE, FAST, assert_as_good_as_torch, poison

needs_native, BACKENDS = needs_fast("logprobs"), backends_of("logprobs")


def make(rows, vocab, dtype=torch.float32, width=6, seed=0):
    g = torch.Generator(DEVICE).manual_seed(seed)
    tensors = {
        "hidden": torch.randn(rows, width, generator=g).to(dtype),
        "weight": torch.randn(vocab, width, generator=g).to(dtype),
        "bias": torch.randn(vocab, generator=g).to(dtype),
    }
    logits = (2 * torch.randn(rows, vocab, generator=g)).to(dtype)
    ids = torch.randint(vocab, (rows,), generator=g)
    weights = torch.randn(2, rows, generator=g)  # of the two results in the loss
    return tensors, logits, ids, weights


def evaluate(function, tensors, ids, weights, backend, dtype=None, **options):
    """Results and the gradients of their weighted sum."""
    leaves = {
        k: x.detach().to(dtype or x.dtype).clone().requires_grad_() for k, x in tensors.items()
    }
    results = function(**leaves, token_ids=ids, backend=backend, **options)
    results = results if isinstance(results, tuple) else (results,)
    sum((r * w.view_as(r)).sum() for r, w in zip(results, weights, strict=False)).backward()
    return [r.detach() for r in results], {k: x.grad for k, x in leaves.items()}


def compare(function, tensors, ids, weights, **options):
    same, same_grads = evaluate(function, tensors, ids, weights, "reference", **options)
    oracle, oracle_grads = evaluate(function, tensors, ids, weights, None, torch.float64, **options)
    got, grads = evaluate(function, tensors, ids, weights, FAST, **options)
    for name, *triple in zip(("logprobs", "entropy"), got, same, oracle, strict=False):
        assert triple[0].dtype == torch.float32
        assert_as_good_as_torch(name, *triple)
    for name in tensors:
        assert grads[name].dtype == tensors[name].dtype
        assert_as_good_as_torch("d" + name, grads[name], same_grads[name], oracle_grads[name])
    return got, grads


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Softmax (1/4, 3/4) at temperature 1/2 from logits (0, log(3) / 2)."""
    logits = tensor([[0.0, math.log(3) / 2]], requires_grad=True)
    logprobs, entropy = token_logprobs(
        logits, tensor([1]), temperature=0.5, entropy=True, backend=backend
    )
    h = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert logprobs.item() == pytest.approx(math.log(0.75))
    assert entropy.item() == pytest.approx(h)
    (grad,) = torch.autograd.grad(logprobs, logits, retain_graph=True)
    torch.testing.assert_close(grad, tensor([[-0.25, 0.25]]) / 0.5)
    (grad,) = torch.autograd.grad(entropy, logits)
    slope = [-p * (math.log(p) + h) / 0.5 for p in (0.25, 0.75)]
    torch.testing.assert_close(grad, tensor([slope]))


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(
    ("rows", "vocab"),
    [(0, 5), (1, 7), (33, 1003), (5, 32000), (4, 50257), (2, 129920), (2, 151936)]
    + [pytest.param(65_537, 3, marks=slow_if_interpreted)],
)
def test_against_oracle(dtype, entropy, rows, vocab):
    _, logits, ids, weights = make(rows, vocab, dtype)
    got, _ = compare(token_logprobs, {"logits": logits}, ids, weights, entropy=entropy)
    if rows:
        error = got[0] - logits.double().log_softmax(-1).gather(1, ids[:, None]).squeeze(1)
        assert error.abs().max() <= 2e-5


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [0.1, 5.0, torch.linspace(0.2, 3, 15)])
def test_temperature(dtype, temperature):
    tensors, logits, ids, weights = make(15, 300, dtype)
    options = {"temperature": temperature, "entropy": True}
    compare(token_logprobs, {"logits": logits}, ids, weights, **options)
    compare(linear_token_logprobs, tensors, ids, weights, **options)


@needs_native
@pytest.mark.parametrize("shift", [1e4, -1e4])
def test_offsets_and_impossible_tokens(shift):
    _, logits, ids, weights = make(12, 500)
    logits = logits + shift
    logits[:, 1::2] = -math.inf
    ids = ids // 2 * 2
    _, grads = compare(token_logprobs, {"logits": logits}, ids, weights, entropy=True)
    assert (grads["logits"][:, 1::2] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_choice(backend):
    logits = tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
    logprobs = token_logprobs(logits, tensor([1]), backend=backend)
    assert logprobs.item() == -math.inf


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_hold_nan(backend):
    tensors, logits, ids, weights = make(20, 90)
    mask = torch.arange(20) % 3 == 0
    options = {"loss_mask": mask, "entropy": True, "temperature": torch.linspace(0.5, 2, 20)}
    want, want_grads = evaluate(
        token_logprobs, {"logits": logits}, ids, weights, backend, **options
    )
    dirty = {"logits": poison(logits, ~mask)}
    ids = ids.masked_fill(~mask, -100)
    got, grads = evaluate(token_logprobs, dirty, ids, weights, backend, **options)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert (got[0][~mask] == 0).all() and (got[1][~mask] == 0).all() and (got[0][mask] != 0).all()
    assert torch.equal(grads["logits"], want_grads["logits"])
    assert (grads["logits"][~mask] == 0).all() and (grads["logits"][mask] != 0).any(1).all()
    tensors["hidden"] = poison(tensors["hidden"], ~mask)
    _, grads = evaluate(linear_token_logprobs, tensors, ids, weights, backend, **options)
    assert all(grad.isfinite().all() for grad in grads.values())
    assert (grads["hidden"][~mask] == 0).all()


@pytest.mark.skipif(FAST == "cpu", reason="there every id is looked at beforehand")
@needs_native
def test_unknown_ids_are_not_read():
    """Where Python cannot look first, under graph capture: NaN, and no wild read."""
    _, logits, ids, _ = make(5, 100)
    ids[1], ids[2], ids[3] = -1, 100, 2**45
    results = {name: torch.zeros(5) for name in ("logprobs", "row_max", "row_logsum")}
    options = {"temperature": torch.ones(1), "entropy": None}
    logprobs.run_rows("logprobs", FAST, logits, ids, **options, **results)
    assert results["logprobs"].isnan().tolist() == [False, True, True, True, False]


@needs_native
def test_views():
    _, logits, ids, weights = make(30, 40)
    base = logits.view(5, 6, 40)
    leaf = base[:, :-1].detach().requires_grad_()
    got = token_logprobs(leaf, ids.view(5, 6)[:, 1:], backend=FAST)
    got.sum().backward()
    dense = base[:, :-1].clone().requires_grad_()
    want = dense.log_softmax(-1).gather(-1, ids.view(5, 6)[:, 1:, None]).squeeze(-1)
    want.sum().backward()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(leaf.grad, dense.grad)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("memory_budget", [1 << 30, 4 * 300 * 4])
def test_linear(dtype, entropy, memory_budget):
    tensors, _, ids, weights = make(23, 300, dtype)

    def function(backend, **arguments):
        sizes = {} if backend == "reference" else {"memory_budget": memory_budget}
        return linear_token_logprobs(**arguments, **sizes, backend=backend)

    compare(function, tensors, ids, weights, entropy=entropy)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_states(dtype):
    tensors, _, _, _ = make(7, 50, dtype)
    _, _, ids, weights = make(60, 50, seed=1)
    index = torch.arange(60) * 5 % 7
    compare(linear_token_logprobs, tensors, ids, weights, hidden_index=index)


@needs_native
def test_large_weight_is_widened_in_blocks(monkeypatch):
    monkeypatch.setattr(spo_kernels.head, "BLOCK_ELEMENTS", 64)
    tensors, _, ids, weights = make(23, 301, torch.bfloat16)
    compare(linear_token_logprobs, tensors, ids, weights, entropy=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_some_rows(backend):
    """A loss over a few tokens only, as in DPO's pairs; the rest gets exact zeros."""
    tensors, _, ids, _ = make(10, 30)
    weights = torch.zeros(1, 10)
    weights[0, 3:5] = tensor([1.0, -1.0])
    _, grads = evaluate(linear_token_logprobs, tensors, ids, weights, backend)
    used = weights[0] != 0
    assert (grads["hidden"][~used] == 0).all() and (grads["hidden"][used] != 0).any(1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad(backend):
    tensors, _, ids, _ = make(10, 30)
    with torch.no_grad():
        got = linear_token_logprobs(**tensors, token_ids=ids, backend=backend)
    want = (tensors["hidden"] @ tensors["weight"].T + tensors["bias"]).log_softmax(-1)
    assert not got.requires_grad
    torch.testing.assert_close(got, want.gather(1, ids[:, None]).squeeze(1))


@needs_native
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 20),
    vocab=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    temperature=st.floats(0.1, 5),
    entropy=st.booleans(),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_fuzz(rows, vocab, dtype, temperature, entropy, masked, seed):
    tensors, logits, ids, weights = make(rows, vocab, dtype, seed=seed)
    mask = torch.arange(rows) % 3 != 1 if masked else None
    options = {"temperature": temperature, "entropy": entropy, "loss_mask": mask}
    compare(token_logprobs, {"logits": logits}, ids, weights, **options)
    compare(linear_token_logprobs, tensors, ids, weights, **options)


def test_gradcheck_of_reference():
    tensors, logits, ids, _ = make(4, 5, torch.float64)

    def by_logits(logits):
        return token_logprobs(logits, ids, temperature=0.7, entropy=True)

    def by_states(hidden, weight, bias):
        return linear_token_logprobs(hidden, weight, ids, bias=bias, entropy=True)

    assert torch.autograd.gradcheck(by_logits, logits.requires_grad_())
    assert torch.autograd.gradcheck(by_states, [x.requires_grad_() for x in tensors.values()])


@needs_native
@pytest.mark.parametrize("entropy", [False, True])
def test_opcheck(entropy):
    tensors, logits, ids, weights = make(6, 19)
    leaves = [x.clone().requires_grad_() for x in tensors.values()]
    tokens = (ids, torch.ones(6, dtype=torch.bool), torch.ones(1), 1.0, None, entropy, FAST)
    sizes = ([True, True, True], torch.float32, 1 << 20, entropy)  # batch_invariant: either
    extras = (["is_top1", "top_ids"], 3) if entropy else ([], 1)
    ops = torch.ops.spo_kernels
    torch.library.opcheck(ops.logprobs.default, (logits.clone().requires_grad_(), *tokens))
    torch.library.opcheck(ops.linear_logprobs.default, (*leaves, None, *sizes, *extras, *tokens))
    saved = ops.logprobs(logits, *tokens)
    grads = (weights[0].contiguous(), weights[1].contiguous() if entropy else None)
    torch.library.opcheck(ops.logprobs_backward.default, (logits, *tokens, *saved, *grads))
    arguments = (*tensors.values(), None, *sizes, *tokens, *saved, *grads)
    torch.library.opcheck(ops.linear_logprobs_backward.default, arguments)


@needs_native
def test_compiles_into_one_graph():
    tensors, logits, ids, _ = make(6, 30)

    def step(logits, hidden, weight, bias):
        logprobs, entropy = token_logprobs(logits * 2, ids, entropy=True)
        by_states, extras = linear_token_logprobs(
            hidden, weight, ids, bias=bias, extras=["mean_logits", "top_ids"], top_k=2
        )
        return (logprobs - entropy + by_states).sum(), extras.mean_logits, extras.top_ids

    assert_compiles(step, logits, *tensors.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"token_ids": torch.zeros(3)}, TypeError, "token_ids: expected int32 or int64"),
        ({"token_ids": tensor([0, 1, 5])}, ValueError, r"\[0, 5\).*found 5 at row 2"),
        ({"token_ids": tensor([0, 1])}, ValueError, r"token_ids: .* shape \(3,\)"),
        ({"logits": torch.zeros(3, 5, dtype=torch.int32)}, TypeError, "logits: expected float32"),
        ({"loss_mask": torch.ones(2).bool()}, ValueError, "loss_mask: expected the tokens' shape"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a positive finite"),
        ({"backend": ELSEWHERE}, ValueError, f"backend='{ELSEWHERE}' cannot run logprobs"),
    ],
)
def test_errors(change, error, message):
    arguments = {"logits": torch.zeros(3, 5), "token_ids": tensor([0, 1, 2])}
    with pytest.raises(error, match=message):
        token_logprobs(**{**arguments, **change})
