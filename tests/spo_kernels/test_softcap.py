"""logit_scale and logit_softcap of token_logprobs and linear_token_logprobs, against PyTorch."""

import math

import pytest
import torch
from kernel_cases import DTYPES, assert_compiles, backends_of, needs_fast, slow_if_interpreted
from test_logprobs import compare, evaluate, make
from torch import tensor

from spo_kernels import linear_token_logprobs, logprobs, rows, token_logprobs
from spo_kernels.testing import FAST, SLACK, assert_as_good_as_torch, poison

needs_native, BACKENDS = needs_fast("logprobs"), backends_of("logprobs")
SCALES, CAPS = [1, 0.0625, 3], [None, 30, 50, 1e4, 0.5]


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_hand(backend):
    """Cap 2 log 3 and scale 1/2 turn logits 0 and 4 log(3) atanh(1/2) into 0 and log 3."""
    cap = 2 * math.log(3)
    logits = tensor([[0.0, 2 * cap * math.atanh(0.5)]], requires_grad=True)
    options = {"logit_scale": 0.5, "logit_softcap": cap, "backend": backend}
    logprobs, entropy = token_logprobs(logits, tensor([1]), entropy=True, **options)
    h = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert logprobs.item() == pytest.approx(math.log(0.75))
    assert entropy.item() == pytest.approx(h)
    slopes = (0.5, 0.5 * (1 - 0.5**2))  # of the capped logits
    (grad,) = torch.autograd.grad(logprobs, logits, retain_graph=True)
    torch.testing.assert_close(grad, tensor([[-0.25 * slopes[0], 0.25 * slopes[1]]]))
    (grad,) = torch.autograd.grad(entropy, logits)
    by_z = [-p * (math.log(p) + h) for p in (0.25, 0.75)]
    torch.testing.assert_close(grad, tensor([[x * y for x, y in zip(by_z, slopes, strict=True)]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("cap", CAPS)
def test_is_the_formula(backend, scale, cap):
    """The public formula in plain PyTorch in fp64, not the reference of the package."""
    _, logits, ids, weights = make(9, 70)
    logits, heat = 4 * logits, torch.linspace(0.3, 3, 9)
    options = {"logit_scale": scale, "logit_softcap": cap, "temperature": heat, "entropy": True}
    got, grads = evaluate(token_logprobs, {"logits": logits}, ids, weights, backend, **options)
    leaf = logits.double().requires_grad_()
    z = scale * leaf if cap is None else cap * torch.tanh(scale * leaf / cap)
    each = (z / heat[:, None]).log_softmax(1)
    want = (each.gather(1, ids[:, None])[:, 0], -(each.exp() * each).sum(1))
    sum((w * x).sum() for w, x in zip(weights, want, strict=True)).backward()
    for found, expected in zip((*got, grads["logits"]), (*want, leaf.grad), strict=True):
        torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=2e-5)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("cap", CAPS)
def test_against_oracle(dtype, scale, cap):
    """Temperatures per token, a vocabulary with a rest in every vector, from logits and states."""
    tensors, logits, ids, weights = make(11, 1003, dtype)
    options = {"logit_scale": scale, "logit_softcap": cap, "entropy": True}
    options["temperature"] = torch.linspace(0.3, 3, 11)
    got, _ = compare(token_logprobs, {"logits": logits}, ids, weights, **options)
    oracle = token_logprobs(logits.double(), ids, **options)
    assert (got[0] - oracle[0]).abs().max() <= 2e-5
    compare(linear_token_logprobs, tensors, ids, weights, **options)


@needs_native
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("count", "vocab"),
    [(0, 5), (1, 1), (1, 7), (3, 8), (33, 1024), (5, 1025), (4, 50257)]
    + [pytest.param(2, 151936, marks=slow_if_interpreted)],
)
def test_sizes(dtype, entropy, count, vocab):
    _, logits, ids, weights = make(count, vocab, dtype)
    options = {"entropy": entropy, "logit_softcap": 5.0, "logit_scale": 1.5}
    compare(token_logprobs, {"logits": logits}, ids, weights, **options)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [0.5, 30, 50, 1e4])
def test_large_logits(dtype, cap):
    """Logits of 1e4: nearly all lie at the cap, where the derivative vanishes.

    There fp64 rounds 1 - tanh^2 to 0 and the kernels do not, so a gradient counts by its size
    before the factor.
    """
    _, logits, ids, weights = make(12, 501, dtype)
    options = {"logit_softcap": cap, "entropy": True, "temperature": 2.0}
    tensors = {"logits": (5e3 * logits).clamp(-6e4, 6e4)}
    got, grads = evaluate(token_logprobs, tensors, ids, weights, FAST, **options)
    same, same_grads = evaluate(token_logprobs, tensors, ids, weights, "reference", **options)
    oracle, oracle_grads = evaluate(
        token_logprobs, tensors, ids, weights, None, torch.float64, **options
    )
    for name, *triple in zip(("logprobs", "entropy"), got, same, oracle, strict=True):
        assert_as_good_as_torch(name, *triple)
    triple = (grads["logits"], same_grads["logits"], oracle_grads["logits"])
    assert_as_good_as_torch("dlogits", *triple, scale=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivative_near_the_cap(backend):
    """1 - tanh(4)^2 = 1.34e-3 to 2e-6 of it; as 1 - y^2 in fp32 it would be off by 4e-5."""
    logits = tensor([[0.0, 4.0]], requires_grad=True)
    token_logprobs(logits, tensor([1]), logit_softcap=1.0, backend=backend).backward()
    assert logits.grad is not None
    p = 1 / (1 + math.exp(math.tanh(4)))
    want = p / math.cosh(4) ** 2
    assert logits.grad[0, 1].item() == pytest.approx(want, rel=2e-6 if backend == FAST else 2e-4)


@needs_native
@pytest.mark.parametrize("cap", [1e4, 1e12])
def test_a_high_cap_loses_no_digits(cap):
    """A cap far above the logits changes nothing but the third order, and no gradient's digit."""
    _, logits, ids, weights = make(16, 400)
    plain, plain_grads = evaluate(
        token_logprobs, {"logits": logits}, ids, weights, FAST, entropy=True
    )
    third = 10**3 / (3 * cap**2)  # x - c tanh(x / c) of a logit of 10
    options = {"entropy": True, "logit_softcap": cap}
    got, grads = evaluate(token_logprobs, {"logits": logits}, ids, weights, FAST, **options)
    for found, want in zip(got, plain, strict=True):
        torch.testing.assert_close(found, want, rtol=0, atol=5e-6 + 2 * third)
    torch.testing.assert_close(
        grads["logits"], plain_grads["logits"], rtol=4e-6 + 10 * third, atol=SLACK[torch.float32]
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chosen", [0, 2, 3])
def test_infinite_logits_lie_at_the_cap(backend, chosen):
    """-inf and inf become -c and c, as PyTorch has it; their own gradient is exactly 0."""
    logits = tensor([[-math.inf, 1.0, math.inf, -math.inf, 0.5]], requires_grad=True)
    options = {"logit_softcap": 2.0, "entropy": True, "backend": backend}
    logprobs, entropy = token_logprobs(logits, tensor([chosen]), **options)
    z = 2 * torch.tanh(logits.detach().double() / 2)
    want = z.log_softmax(1)[0]
    assert logprobs.item() == pytest.approx(want[chosen].item(), abs=1e-6)
    assert entropy.item() == pytest.approx(-(want.exp() * want).sum().item(), abs=1e-6)
    (logprobs + 0.3 * entropy).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[0, [0, 2, 3]] == 0).all() and (logits.grad[0, [1, 4]] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_infinities(backend):
    """All -inf is a flat row under a cap, with no gradient; without a cap it is NaN."""
    logits = torch.full((1, 37), -math.inf, requires_grad=True)
    got = token_logprobs(logits, tensor([5]), logit_softcap=3.0, backend=backend)
    assert got.item() == pytest.approx(-math.log(37), abs=1e-6)
    got.backward()
    assert logits.grad is not None and (logits.grad == 0).all()
    assert token_logprobs(logits, tensor([5]), backend=backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("column", [0, 17, 299])
def test_nan_shows_in_its_row_only(backend, column):
    logits = torch.zeros(3, 300)
    logits[1, column] = math.nan
    leaf = logits.requires_grad_()
    got = token_logprobs(leaf, tensor([0, 5, 9]), logit_softcap=3.0, backend=backend)
    got.sum().backward()
    assert got.isnan().tolist() == [False, True, False]
    assert leaf.grad is not None and leaf.grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_rows_and_views(backend):
    tensors, logits, ids, weights = make(30, 45)
    mask = torch.arange(30) % 3 == 0
    options = {"logit_scale": 2.0, "logit_softcap": 4.0, "entropy": True}
    want, want_grads = evaluate(
        token_logprobs, {"logits": logits[mask]}, ids[mask], weights[:, mask], backend, **options
    )
    dirty = poison(logits, ~mask).view(5, 6, 45).transpose(0, 1)
    got, grads = evaluate(
        token_logprobs,
        {"logits": dirty},
        ids.masked_fill(~mask, -100).view(5, 6).t(),
        [w.view(5, 6).t() for w in weights],
        backend,
        loss_mask=mask.view(5, 6).t(),
        **options,
    )
    for found, expected in zip(got, want, strict=True):
        torch.testing.assert_close(found.t().reshape(-1)[mask], expected)
        assert (found.t().reshape(-1)[~mask] == 0).all()
    grad = grads["logits"].transpose(0, 1).reshape(30, 45)
    torch.testing.assert_close(grad[mask], want_grads["logits"])
    assert (grad[~mask] == 0).all()


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory_budget", [1 << 30, 4 * 300 * 4])
def test_head_in_chunks_with_shared_states(dtype, memory_budget):
    tensors, _, _, _ = make(7, 300, dtype)
    _, _, ids, weights = make(40, 300, seed=1)
    options = {"entropy": True, "logit_scale": 2.0, "logit_softcap": 3.0}
    options |= {"temperature": torch.linspace(0.5, 2, 40), "loss_mask": torch.arange(40) % 5 != 1}

    def function(backend, **arguments):
        sizes = {} if backend == "reference" else {"memory_budget": memory_budget}
        return linear_token_logprobs(**arguments, **sizes, backend=backend)

    index = torch.arange(40) * 5 % 7
    compare(function, tensors, ids, weights, hidden_index=index, **options)


@needs_native
def test_scale_is_a_temperature():
    """Bit for bit, where the quotient of temperature and scale is exact."""
    _, logits, ids, weights = make(8, 333)
    leaves = {"logits": logits}
    want = evaluate(token_logprobs, leaves, ids, weights, FAST, entropy=True, temperature=6.0)
    options = {"logit_scale": 0.25, "temperature": 1.5, "entropy": True}
    got = evaluate(token_logprobs, leaves, ids, weights, FAST, **options)
    assert all(torch.equal(a, b) for a, b in zip(got[0], want[0], strict=True))
    assert torch.equal(got[1]["logits"], want[1]["logits"])


def test_scaling():
    assert rows.scaling(1.0, None) == (1.0, 0.0)
    assert rows.scaling(3, None) == (3.0, 0.0)
    assert rows.scaling(3.0, 30) == (30.0, 0.1)


@needs_native
def test_the_saved_maximum_is_a_tanh():
    """The backward reads it as the forward left it."""
    _, logits, ids, _ = make(5, 100)
    results = {name: torch.zeros(5) for name in ("logprobs", "row_max", "row_logsum")}
    options = {"temperature": torch.ones(1), "entropy": None, "logit_softcap": 7.0}
    logprobs.run_rows("logprobs", FAST, logits, ids, **options, **results)
    torch.testing.assert_close(results["row_max"], torch.tanh(logits.max(1)[0] / 7))


def test_gradcheck_of_reference():
    tensors, logits, ids, _ = make(4, 5, torch.float64)
    options = {"logit_scale": 1.5, "logit_softcap": 2.5, "entropy": True, "temperature": 0.7}

    def by_states(hidden, weight, bias):
        return linear_token_logprobs(hidden, weight, ids, bias=bias, **options)

    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_logprobs(x, ids, **options), leaf)
    assert torch.autograd.gradcheck(by_states, [x.requires_grad_() for x in tensors.values()])


@needs_native
@pytest.mark.parametrize("scaling", [(2.0, None), (1.0, 3.0)])
def test_opcheck(scaling):
    tensors, logits, ids, weights = make(6, 19)
    leaves = [x.clone().requires_grad_() for x in tensors.values()]
    tokens = (ids, torch.ones(6, dtype=torch.bool), torch.ones(1), *scaling, True, FAST)
    sizes = ([True, True, True], torch.float32, 1 << 20, False)
    ops = torch.ops.spo_kernels
    torch.library.opcheck(ops.logprobs.default, (logits.clone().requires_grad_(), *tokens))
    extras = (["mean_logits"], 1)
    torch.library.opcheck(ops.linear_logprobs.default, (*leaves, None, *sizes, *extras, *tokens))
    saved = ops.logprobs(logits, *tokens)
    torch.library.opcheck(ops.logprobs_backward.default, (logits, *tokens, *saved, *weights))
    arguments = (*tensors.values(), None, *sizes, *tokens, *saved, *weights)
    torch.library.opcheck(ops.linear_logprobs_backward.default, arguments)


@needs_native
def test_compiles_into_one_graph():
    tensors, logits, ids, _ = make(6, 30)

    def step(logits, hidden, weight, bias):
        options = {"logit_scale": 0.5, "logit_softcap": 3.0}
        logprobs, entropy = token_logprobs(logits * 2, ids, entropy=True, **options)
        by_states = linear_token_logprobs(hidden, weight, ids, bias=bias, **options)
        return ((logprobs - entropy + by_states).sum(),)

    assert_compiles(step, logits, *tensors.values())


@needs_native
@pytest.mark.parametrize(
    ("family", "settings", "options"),
    [
        ("Gemma2", {"head_dim": 16}, lambda c: {"logit_softcap": c.final_logit_softcapping}),
        ("Cohere", {"pad_token_id": 0}, lambda c: {"logit_scale": c.logit_scale}),
        ("Granite", {"logits_scaling": 8.0}, lambda c: {"logit_scale": 1 / c.logits_scaling}),
    ],
    ids=["gemma2", "cohere", "granite"],
)
def test_hidden_states_of_models(family, settings, options):
    """The head of a tiny model of random weights, against the logits that the model returns."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, family + "Config")(
        **{"vocab_size": 257, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "attn_implementation": "eager"},
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = getattr(transformers, family + "ForCausalLM")(config).eval()
        ids = torch.randint(1, 257, (2, 9))
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head.mul_(80)  # embeddings too, which the norms take back
        logits = model(ids).logits.double()
        hidden = model.model(ids).last_hidden_state
        raw = (hidden @ head.t()).abs().max()
        assert raw > 30 and raw > 1.2 * logits.abs().max()  # so that cap and scale matter
        found = options(config)
        got = linear_token_logprobs(hidden[:, :-1], head, ids[:, 1:], backend=FAST, **found)
    want = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


NUMBER = "expected a positive finite number"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logit_scale": 0.0}, ValueError, f"logit_scale: {NUMBER}, 1e-18 to 1e.18, found 0.0"),
        ({"logit_scale": -1}, ValueError, f"logit_scale: {NUMBER}, .* found -1"),
        ({"logit_scale": math.inf}, ValueError, f"logit_scale: {NUMBER}, .* found inf"),
        ({"logit_scale": math.nan}, ValueError, f"logit_scale: {NUMBER}, .* found nan"),
        ({"logit_scale": None}, TypeError, f"logit_scale: {NUMBER}, found NoneType"),
        ({"logit_scale": torch.ones(())}, TypeError, f"logit_scale: {NUMBER}, found Tensor"),
        ({"logit_softcap": 0}, ValueError, f"logit_softcap: {NUMBER} or None, .* found 0"),
        ({"logit_softcap": -30.0}, ValueError, f"logit_softcap: {NUMBER} or None, .* found -30.0"),
        ({"logit_softcap": 1e30}, ValueError, f"logit_softcap: {NUMBER} or None, .* found 1e.30"),
        ({"logit_softcap": math.nan}, ValueError, f"logit_softcap: {NUMBER} or None, .* found nan"),
        ({"logit_softcap": "30"}, TypeError, f"logit_softcap: {NUMBER} or None, found str"),
    ],
)
def test_errors(change, error, message):
    ids = tensor([0, 1, 2])
    for call in (
        lambda: token_logprobs(torch.zeros(3, 5), ids, **change),
        lambda: linear_token_logprobs(torch.zeros(3, 2), torch.zeros(5, 2), ids, **change),
    ):
        with pytest.raises(error, match=message) as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_temperature_is_named_as_it_was_given(backend):
    heat = tensor([1.0, -3.0])
    with pytest.raises(ValueError, match=r"temperature: .* found -3.0 at row 1"):
        options = {"logit_scale": 7.0, "logit_softcap": 30.0, "backend": backend}
        token_logprobs(torch.zeros(2, 5), tensor([0, 1]), temperature=heat, **options)
