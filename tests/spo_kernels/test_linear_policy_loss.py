"""linear_masked_ppo_loss against the fp64 reference and against masked_ppo_loss on its logits."""

import math
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    ELSEWHERE,
    FIGURES,
    INTERPRETED,
    assert_compiles,
    assert_figures_as_good,
    backends_of,
    needs_fast,
    tokens_from,
)
from torch import tensor
from torch.utils._python_dispatch import TorchDispatchMode

from spo_kernels import (
    head,
    linear_masked_ppo_loss,
    linear_policy_loss,
    masked_ppo_loss,
    policy_launch,
    rows,
)
from spo_kernels.testing import DEVICE, FAST, assert_as_good_as_torch, loss_inputs, poison

needs_native, BACKENDS = needs_fast("policy_loss"), backends_of("policy_loss")


def make(rows, vocab, width, dtype=torch.float32, *, states=None, kept=0.4, seed=0, **options):
    """Tensors of a head, and per-token arguments whose old logprobs are near the head's own."""
    g = torch.Generator(DEVICE).manual_seed(seed)
    tensors = {
        "hidden": torch.randn(states or rows, width, generator=g).to(dtype),
        "weight": (2 * torch.randn(vocab, width, generator=g) / width**0.5).to(dtype),
        "bias": torch.randn(vocab, generator=g).to(dtype),
    }
    index = None if states is None else torch.randint(states, (rows,), generator=g)
    x = tensors["hidden"].double() if index is None else tensors["hidden"][index].double()
    logits = x @ tensors["weight"].double().T + tensors["bias"].double()
    tokens = loss_inputs(rows, vocab, kept=kept, seed=seed)
    chosen = logits.log_softmax(-1).gather(1, tokens.token_ids[:, None]).squeeze(1).float()
    old = torch.where(tokens.old_logprobs < math.log(0.9), (chosen + 0.2).clamp(max=-0.2), -0.01)
    arguments = {
        "token_ids": tokens.token_ids,
        "old_logprobs": old,
        "advantages": tokens.advantages,
        "loss_mask": tokens.loss_mask,
        "hidden_index": index,
        **options,
    }
    return tensors, arguments


def evaluate(tensors, arguments, backend, dtype=None, factor=1.0, frozen=(), function=None):
    leaves = {
        name: x.detach().to(dtype or x.dtype).clone().requires_grad_(name not in frozen)
        for name, x in tensors.items()
    }
    out = (function or linear_masked_ppo_loss)(**leaves, **arguments, backend=backend)
    (out.loss * factor).backward()
    return out, {name: x.grad for name, x in leaves.items()}


def compare(tensors, arguments, fast_only=None, **options):
    same, same_grads = evaluate(tensors, arguments, "reference", **options)
    oracle, oracle_grads = evaluate(tensors, arguments, None, dtype=torch.float64, **options)
    got, grads = evaluate(tensors, arguments | (fast_only or {}), FAST, **options)
    assert_figures_as_good(got, same, oracle)
    for name, grad in grads.items():
        assert grad.dtype == tensors[name].dtype
        assert_as_good_as_torch("d" + name, grad, same_grads[name], oracle_grads[name])
    return got, grads


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocab", "width"), [(1, 7, 3), (33, 1003, 17), (65, 32000, 64), (3, 151936, 16)]
)
def test_against_oracle(dtype, rows, vocab, width):
    compare(*make(rows, vocab, width, dtype, entropy=True), factor=3.0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"memory_budget": 4 * 211 * 5},  # chunks of five rows
        {"memory_budget": 1},  # chunks of one row
        {"temperature": 0.5},
        {"prob_threshold": None, "policy_norm": 12},
        {"clip_eps_low": 0.01, "clip_eps_high": 0.02, "log_ratio_clamp": 0.1},
    ],
)
def test_options(dtype, options):
    plain = {k: v for k, v in options.items() if k != "memory_budget"}
    compare(*make(57, 211, 12, dtype, **plain), fast_only=options)


@needs_native
@pytest.mark.parametrize("scope", ["masked", "all"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl(scope, estimator):
    tensors, arguments = make(40, 101, 8)
    arguments.update(ref_logprobs=arguments["old_logprobs"] - 0.3, kl_coef=0.2)
    arguments.update(kl_scope=scope, kl_estimator=estimator, kl_norm=9.0)
    compare(tensors, arguments)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_budget", [1 << 30, 4 * 211 * 7])
def test_shared_states(dtype, memory_budget):
    """Many tokens from few states: the sum over a state's tokens is the gradient of the state."""
    tensors, arguments = make(90, 211, 12, dtype, states=11, kept=0.8)
    _, grads = compare(tensors, arguments, {"memory_budget": memory_budget})
    _, again = evaluate(tensors, {**arguments, "memory_budget": memory_budget}, FAST)
    assert all(torch.equal(grads[name], again[name]) for name in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_logits_in(backend):
    """The head is the logits op after a projection, on (B, L) tokens with one advantage each."""
    tensors, arguments = make(12, 50, 6, entropy=True)
    shaped = {k: v.view(3, 4) for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    arguments = {**arguments, **shaped, "advantages": tensor([1.0, -2.0, 0.5])}
    tensors["hidden"] = tensors["hidden"].view(3, 4, 6)

    def by_logits(hidden, weight, bias, hidden_index, backend, **arguments):
        return masked_ppo_loss(hidden @ weight.T + bias, **arguments, backend=backend)

    got, grads = evaluate(tensors, arguments, backend)
    want, want_grads = evaluate(tensors, arguments, backend, function=by_logits)
    for name in (*FIGURES, "num_kept"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), equal_nan=True)
    torch.testing.assert_close(grads, want_grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_idle_rows_are_never_projected(backend):
    """Dropped tokens and those with A = 0: their states may hold NaN; they count as Z says."""
    tensors, arguments = make(40, 60, 5)
    arguments["advantages"][::3] = 0
    kept = arguments["loss_mask"] & (arguments["old_logprobs"] < math.log(0.9))
    used = kept & (arguments["advantages"] != 0)
    assert 0 < used.sum() < kept.sum() < 40
    want, want_grads = evaluate(tensors, arguments, backend)
    dirty = {**tensors, "hidden": poison(tensors["hidden"], ~used)}
    got, grads = evaluate(dirty, {**arguments, "max_active": int(used.sum())}, backend)
    assert got.num_kept == kept.sum()
    torch.testing.assert_close(got.loss, want.loss, rtol=0, atol=0)
    torch.testing.assert_close(grads, want_grads, rtol=0, atol=0)
    assert (grads["hidden"][~used] == 0).all() and got.logprobs[~used].isnan().all()
    with pytest.raises(ValueError, match=f"rows to project, found {int(used.sum())}"):
        evaluate(tensors, {**arguments, "max_active": int(used.sum()) - 1}, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 6])
def test_nothing_kept(backend, rows):
    tensors, arguments = make(rows, 9, 4)
    arguments["loss_mask"] = torch.zeros(rows, dtype=torch.bool)
    tensors["hidden"].fill_(math.nan)
    out, grads = evaluate(tensors, arguments, backend)
    assert out.loss == 0 and out.loss.requires_grad and out.num_kept == 0
    for name, grad in grads.items():
        assert torch.equal(grad, torch.zeros_like(tensors[name])), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "frozen", [("weight",), ("weight", "bias"), ("hidden",), ("hidden", "bias")]
)
def test_frozen_tensors_get_no_gradient(backend, frozen):
    tensors, arguments = make(20, 31, 4)
    _, want = evaluate(tensors, arguments, backend)
    _, grads = evaluate(tensors, arguments, backend, frozen=frozen)
    for name, grad in grads.items():
        if name in frozen:
            assert grad is None
        else:
            torch.testing.assert_close(grad, want[name])


@needs_native
def test_frozen_weight_skips_its_product(monkeypatch):
    monkeypatch.setattr(head.HeadGradients, "_add_weight", lambda *_: pytest.fail("was computed"))
    evaluate(*make(20, 31, 4), FAST, frozen=("weight",))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_grad(backend):
    tensors, arguments = make(20, 31, 4)
    with torch.no_grad():
        out = linear_masked_ppo_loss(**tensors, **arguments, backend=backend)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss, evaluate(tensors, arguments, backend)[0].loss.detach())


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_dtypes_under_autocast(backend):
    """bf16 states with an fp32 master weight; the gradients keep dtypes.

    The head stays in fp32, but on a GPU its products take bf16, as autocast's do.
    """
    tensors, arguments = make(30, 64, 8)
    tensors["hidden"] = tensors["hidden"].bfloat16()
    lowers = DEVICE.type == "cuda" and backend != "reference"
    exact = tensors | ({"weight": tensors["weight"].bfloat16()} if lowers else {})
    oracle, oracle_grads = evaluate(exact, arguments, None, dtype=torch.float64)

    @torch.autocast(DEVICE.type, dtype=torch.bfloat16)
    def under_autocast(**arguments):
        return linear_masked_ppo_loss(**arguments)

    got, grads = evaluate(tensors, arguments, backend, function=under_autocast)
    assert got.loss.dtype == torch.float32
    assert_as_good_as_torch("logprobs", got.logprobs, oracle.logprobs, oracle.logprobs)
    for name, grad in grads.items():
        assert grad.dtype == tensors[name].dtype
        if lowers:
            off = (grad.double() - oracle_grads[name]).norm() / oracle_grads[name].norm()
            assert off < 2**-7, name
        else:
            assert_as_good_as_torch("d" + name, grad, oracle_grads[name], oracle_grads[name])


@needs_native
def test_low_precision_logits():
    """logits_dtype=bfloat16 rounds the logits and nothing else: fp32 logprobs of rounded logits."""
    tensors, arguments = make(30, 64, 8, torch.bfloat16)
    got, grads = evaluate(tensors, {**arguments, "logits_dtype": torch.bfloat16}, FAST)
    fp32, fp32_grads = evaluate(tensors, arguments, FAST)
    assert not torch.equal(got.logprobs, fp32.logprobs)
    torch.testing.assert_close(got.logprobs, fp32.logprobs, rtol=0, atol=0.05, equal_nan=True)
    torch.testing.assert_close(grads, fp32_grads, rtol=0.05, atol=0.02)
    with pytest.raises(ValueError, match="logits_dtype: expected torch.float32 on the reference"):
        evaluate(tensors, {**arguments, "logits_dtype": torch.bfloat16}, "reference")


@needs_native
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 24),
    vocab=st.integers(1, 120),
    width=st.integers(1, 20),
    states=st.one_of(st.none(), st.integers(1, 6)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    kept=st.floats(0, 1),
    threshold=st.one_of(st.none(), st.floats(0.05, 1)),
    seed=st.integers(0, 1000),
)
def test_fuzz(rows, vocab, width, states, dtype, kept, threshold, seed):
    tensors, arguments = make(
        rows, vocab, width, dtype, states=states, kept=kept, seed=seed, prob_threshold=threshold
    )
    compare(tensors, arguments)


@needs_native
@pytest.mark.parametrize("vocab", [7, 64, 1003])
def test_bf16_gradient_of_fp32_logits(vocab):
    """What the head asks of the row kernel where bf16 products are fast: fp32 in, bf16 out."""
    inputs = loss_inputs(9, vocab, kept=0.7)
    tokens = tokens_from(inputs, loss_mask=inputs.loss_mask, log_threshold=math.log(0.9))
    wide = torch.full((9, vocab), math.nan)
    narrow = torch.full((9, vocab), math.nan, dtype=torch.bfloat16)
    figures = []
    for out in (wide, narrow):
        call = policy_launch.Launch(FAST, inputs.logits, vocab, tokens, False, True, scaled=False)
        call.over_rows("step", inputs.logits, out)
        figures.append(call.figures)
    torch.testing.assert_close(*figures, rtol=1e-6, atol=0)  # Triton's are two kernels
    assert wide.count_nonzero() > 0
    if INTERPRETED:  # it truncates
        assert ((narrow.float() - wide).abs() <= wide.abs() * 2**-7 + 1e-38).all()
    else:
        assert torch.equal(narrow, wide.bfloat16())


def test_gradcheck_of_reference():
    tensors, arguments = make(5, 6, 3, torch.float64, states=3, kept=0.9)

    def loss(hidden, weight, bias):
        return linear_masked_ppo_loss(hidden, weight, bias=bias, **arguments).loss

    leaves = [x.requires_grad_() for x in tensors.values()]
    assert torch.autograd.gradcheck(loss, leaves)


@needs_native
@pytest.mark.parametrize("states", [None, 4])
def test_opcheck(states):
    tensors, arguments = make(8, 19, 5, states=states)
    # Every row is computed: the check takes two NaN for different.
    tokens = tokens_from(types.SimpleNamespace(**arguments)).arguments()
    leaves = [x.requires_grad_() for x in tensors.values()]
    op = torch.ops.spo_kernels.linear_policy_loss.default
    for room in ((None, False, False), (8, True, True)):
        sizes = ([True, True, True], True, torch.float32, 1 << 20, *room, FAST)
        torch.library.opcheck(op, (*leaves, arguments["hidden_index"], *sizes, *tokens))


@needs_native
def test_no_hidden_width():
    """D = 0: every logit is the bias."""
    old, advantages = torch.full((6,), -3.0), torch.ones(6)
    states, weight = torch.zeros(6, 0, requires_grad=True), torch.zeros(20, 0)
    out = linear_masked_ppo_loss(states, weight, torch.arange(6), old, advantages, backend=FAST)
    out.loss.backward()
    torch.testing.assert_close(out.logprobs, torch.full((6,), -math.log(20)))
    assert states.grad.shape == (6, 0)


@needs_native
def test_views_as_arguments():
    """Every other entry of longer tensors: the kernels take addresses, so views are copied."""
    tensors, arguments = make(24, 40, 6, states=5, kept=0.7, temperature=torch.linspace(1, 2, 24))
    want, grads = evaluate(tensors, arguments, FAST)

    def spread(x):
        if not isinstance(x, torch.Tensor):
            return x
        return torch.stack([x, torch.full_like(x, 3)], -1)[..., 0]

    views = {name: spread(x) for name, x in arguments.items()}
    assert not views["hidden_index"].is_contiguous() and not views["token_ids"].is_contiguous()
    got, view_grads = evaluate({n: spread(x) for n, x in tensors.items()}, views, FAST)
    assert torch.equal(got.loss, want.loss)
    assert torch.equal(got.logprobs.nan_to_num(), want.logprobs.nan_to_num())
    torch.testing.assert_close(view_grads, grads)


class Unsynced(TorchDispatchMode):
    """Runs the kernels of this package and refuses what looks at data or has shapes from data."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        looks = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique_consecutive")
        assert func.overloadpacket.__name__ not in looks, f"{func} waits for the device"
        if func.namespace != "spo_kernels":
            return func(*args, **(kwargs or {}))
        with self:
            return linear_policy_loss._linear_policy_loss.kernel(*args)


@needs_native
@pytest.mark.parametrize("states", [None, 4])
@pytest.mark.parametrize("budget", [1 << 30, 40 * 4 * 4])
def test_fixed_capacity(monkeypatch, states, budget):
    """What is recorded for replay reads no data, and gives what eager mode gives."""
    tensors, arguments = make(24, 40, 6, states=states, entropy=True)
    arguments |= {"memory_budget": budget, "temperature": torch.linspace(0.5, 2, 24)}
    want, grads = evaluate(tensors, arguments, FAST)
    active = int(want.logprobs.isfinite().sum())
    assert 2 < active < 20
    monkeypatch.setattr(rows, "is_captured", lambda _: True)
    for room in (20, active):
        with Unsynced():
            leaves = {n: x.clone().requires_grad_() for n, x in tensors.items()}
            got = linear_masked_ppo_loss(**leaves, **arguments, max_active=room, backend=FAST)
        got.loss.backward()
        assert not got.overflow
        for name in FIGURES:
            torch.testing.assert_close(getattr(got, name), getattr(want, name), equal_nan=True)
        torch.testing.assert_close({n: x.grad for n, x in leaves.items()}, grads)


@needs_native
@pytest.mark.parametrize("kept", [0, 3])
def test_free_rows_of_a_capacity_read_no_state(monkeypatch, kept):
    """They have the first state, which may be padding: NaN."""
    tensors, arguments = make(6, 9, 4)
    arguments |= {"prob_threshold": None, "loss_mask": torch.arange(6) > 5 - kept}
    _, want = evaluate(tensors, arguments, FAST)
    tensors["hidden"][0] = math.nan
    monkeypatch.setattr(rows, "is_captured", lambda _: True)
    _, grads = evaluate(tensors, {**arguments, "max_active": 6}, FAST)
    torch.testing.assert_close(grads, want)


@needs_native
def test_fixed_capacity_overflows(monkeypatch):
    """Beyond the capacity the flag is set and the first rows are what is trained."""
    tensors, arguments = make(24, 40, 6)
    want, _ = evaluate(tensors, arguments, FAST)
    first = want.logprobs.isfinite().nonzero().flatten()[:3]
    monkeypatch.setattr(rows, "is_captured", lambda _: True)
    got = linear_masked_ppo_loss(**tensors, **arguments, max_active=3, backend=FAST)
    assert got.overflow
    torch.testing.assert_close(got.logprobs[first], want.logprobs[first])
    assert int(got.logprobs.isfinite().sum()) == 3
    none = linear_masked_ppo_loss(**tensors, **arguments, max_active=0, backend=FAST)
    assert none.overflow and none.loss == 0


@needs_native
@pytest.mark.parametrize("name", ["token_ids", "hidden_index"])
def test_bad_indices_under_capture_are_nan(monkeypatch, name):
    tensors, arguments = make(24, 40, 6, states=5)
    want = evaluate(tensors, arguments, FAST)[0].logprobs.isfinite()
    row = int(want.nonzero()[2, 0])
    monkeypatch.setattr(rows, "is_captured", lambda _: True)
    for bad in (-1, 40):
        changed = {**arguments, name: arguments[name].clone()}
        changed[name][row] = bad
        got = linear_masked_ppo_loss(**tensors, **changed, max_active=20, backend=FAST)
        lost = want & got.logprobs.isnan()
        assert got.loss.isnan() and lost.nonzero().flatten().tolist() == [row]


@needs_native
@pytest.mark.parametrize("room", [None, 12])
def test_compiles_into_one_graph(room):
    tensors, arguments = make(12, 40, 6, kept=0.6, max_active=room)

    def step(hidden, weight, bias):
        out = linear_masked_ppo_loss(hidden.tanh(), weight, bias=bias, **arguments)
        return (out.loss * 0.5,)

    assert_compiles(step, *tensors.values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(9, 5)}, ValueError, "with the same D"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias: expected shape \(9,\)"),
        ({"hidden": torch.zeros(4, 6, dtype=torch.int64)}, TypeError, "hidden: expected floating"),
        ({"hidden_index": torch.zeros(4)}, TypeError, "hidden_index: expected a 1-D"),
        ({"hidden_index": torch.full((4,), 4)}, ValueError, r"hidden_index: .* in \[0, 4\)"),
        ({"hidden_index": torch.zeros(3, dtype=torch.int64)}, ValueError, r"shape \(3,\)"),
        ({"token_ids": torch.full((4,), 9)}, ValueError, r"\[0, 9\)"),
        ({"logits_dtype": torch.float16}, ValueError, "logits_dtype: expected"),
        ({"backend": ELSEWHERE}, ValueError, f"backend='{ELSEWHERE}' cannot run policy_loss"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "hidden": torch.zeros(4, 6),
        "weight": torch.zeros(9, 6),
        "token_ids": torch.zeros(4, dtype=torch.int64),
        "old_logprobs": torch.full((4,), -1.0),
        "advantages": torch.ones(4),
    }
    with pytest.raises(error, match=message):
        linear_masked_ppo_loss(**{**arguments, **change})
