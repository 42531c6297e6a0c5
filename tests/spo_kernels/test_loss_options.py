"""The options of the policy losses that other trainers have: by hand, and against fp64."""

import math
import random

import pytest
import torch
from kernel_cases import (
    DTYPES,
    FIGURES,
    assert_compiles,
    assert_figures_as_good,
    backends_of,
    examples,
    needs_fast,
)
from torch import tensor

from spo_kernels import linear_masked_ppo_loss, masked_ppo_loss, policy_objective, token_logprobs
from spo_kernels.testing import FAST, assert_as_good_as_torch, loss_inputs

needs_native, BACKENDS = needs_fast("policy_loss"), backends_of("policy_loss")
HALF = math.log(0.5)  # the logprob of every token where a vocabulary of two has equal logits


def two_way(rows, old, advantages, backend, **options):
    """The loss of `rows` tokens with logprob log(1/2), and its derivatives by their logprobs."""
    logits = torch.zeros(rows, 2, requires_grad=True)
    old = None if old is None else tensor(old)
    options = {"prob_threshold": None, "policy_norm": 1, "log_ratio_clamp": None, **options}
    out = masked_ppo_loss(
        logits, torch.zeros(rows).long(), old, tensor(advantages), backend=backend, **options
    )
    out.loss.backward()
    return out, logits.grad[:, 0] * 2  # d logprob / d logit is 1/2


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_policy_by_hand(backend):
    """The ratio is 1, inside every clip; its gradient is that of the logprob."""
    out, grads = two_way(2, None, [3.0, -2.0], backend, clip_eps_low=0.0, clip_eps_high=0.0)
    assert out.loss.item() == -(3 - 2) and out.ratio_mean == 1 and out.clipfrac == 0
    torch.testing.assert_close(grads, tensor([-3.0, 2.0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("norm", [None, 4])
def test_on_policy_mask_is_that_of_this_pass(backend, norm):
    """p is 1/2 and 0.9: a threshold between them drops the second token from M and from Z."""
    logits = tensor([[0.0, 0.0], [math.log(9), 0.0], [0.0, 0.0]], requires_grad=True)
    arguments = logits, torch.zeros(3).long(), None, tensor([1.0, 1.0, 0.0])
    out = masked_ppo_loss(*arguments, prob_threshold=0.8, policy_norm=norm, backend=backend)
    z = norm or 2  # the third token counts
    (out.loss * 3).backward()
    assert out.num_kept == 2 and out.loss.item() == pytest.approx(-1 / z)
    want = tensor([[-0.5, 0.5], [0.0, 0.0], [0.0, 0.0]]) * 3 / z
    torch.testing.assert_close(logits.grad, want)
    want = tensor([HALF, math.log(0.9), HALF])  # every token of the loss mask is computed
    torch.testing.assert_close(out.logprobs, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dual_clip_by_hand(backend):
    """Ratios 4, 2, 1.15 and 4 at A = -1, -1, -1 and 1, with c = 3 and then with c = 1.1."""
    old = [HALF - math.log(ratio) for ratio in (4, 2, 1.15, 4)]
    advantages = [-1.0, -1.0, -1.0, 1.0]
    out, grads = two_way(4, old, advantages, backend, clip_ratio_max=3.0)
    assert out.loss.item() == pytest.approx(3 + 2 + 1.15 - 1.2)
    torch.testing.assert_close(grads, tensor([0.0, 2, 1.15, 0]))
    fractions = (out.clipfrac, out.clipfrac_low, out.clipfrac_high, out.clipfrac_max)
    assert [x.item() for x in fractions] == [0.25, 0, 0.25, 0.25]
    out, grads = two_way(4, old, advantages, backend, clip_ratio_max=1.1)
    assert out.loss.item() == pytest.approx(3 * 1.1 - 1.2)
    torch.testing.assert_close(grads, torch.zeros(4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_clips(backend):
    """None is no bound: REINFORCE with an importance weight."""
    old = [HALF - math.log(ratio) for ratio in (4, 0.1)]
    clips = {"clip_eps_low": None, "clip_eps_high": None}
    out, grads = two_way(2, old, [1.0, -1.0], backend, **clips)
    assert out.loss.item() == pytest.approx(-4 + 0.1) and out.clipfrac == 0
    torch.testing.assert_close(grads, tensor([-4.0, 0.1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_by_hand(backend):
    """They multiply their terms; Z does not know them, and a negative one turns its term around."""
    weights = tensor([2.0, 0.0, -1.0])
    ref = torch.zeros(3)
    kl = {"ref_logprobs": ref, "kl_coef": 1.0, "kl_estimator": "k1", "kl_norm": 1}
    old, advantages = [HALF] * 3, [1.0, 1.0, 1.0]
    out, grads = two_way(3, old, advantages, backend, weights=weights, policy_norm=None)
    assert out.loss.item() == pytest.approx(-(2 - 1) / 3) and out.num_kept == 3
    torch.testing.assert_close(grads, -weights / 3)
    out, grads = two_way(3, old, [0.0] * 3, backend, kl_weights=weights, **kl)
    assert out.loss.item() == pytest.approx((2 - 1) * HALF)
    assert out.kl_mean.item() == pytest.approx(HALF)  # without weights
    torch.testing.assert_close(grads, weights)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clamp", [None, 0.3])
def test_kl_options_by_hand(backend, clamp):
    """k3 of d = log 2, clamped at 0.3 or not, times a ratio of 2 or not."""
    kl = {"ref_logprobs": tensor([0.0]), "kl_coef": 1.0, "kl_clamp": clamp, "kl_norm": 1}
    d = -HALF if clamp is None else clamp
    value, slope = math.exp(d) - d - 1, 1 - math.exp(d) if clamp is None else 0.0
    out, grads = two_way(1, [HALF - math.log(2)], [0.0], backend, **kl)
    assert out.loss.item() == pytest.approx(value)
    assert grads.item() == pytest.approx(slope)
    out, grads = two_way(1, [HALF - math.log(2)], [0.0], backend, kl_ratio=True, **kl)
    assert out.loss.item() == pytest.approx(2 * value)
    assert grads.item() == pytest.approx(2 * slope + 2 * value)
    assert out.kl_mean.item() == pytest.approx(value)
    out, grads = two_way(1, None, [0.0], backend, kl_ratio=True, **kl)  # on-policy: r = 1, r' = 1
    assert out.loss.item() == pytest.approx(value)
    assert grads.item() == pytest.approx(slope + value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_entropy_bonus_by_hand(backend):
    """Of p and 1 - p: H' by the first logit is -p (1 - p) log(p / (1 - p))."""
    p = 0.8
    logits = tensor([[math.log(4), 0.0], [0.0, 0.0], [5.0, 0.0]], requires_grad=True)
    out = masked_ppo_loss(
        *(logits, torch.zeros(3).long(), tensor([-1.0, -1.0, -0.01]), torch.zeros(3)),
        entropy_coef=0.5,
        backend=backend,
    )
    out.loss.backward()
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p))
    assert out.entropy_loss.item() == pytest.approx(-0.5 * (entropy + math.log(2)) / 2)
    assert out.loss.item() == out.entropy_loss.item()
    slope = 0.25 * p * (1 - p) * math.log(4)
    want = tensor([[slope, -slope], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(logits.grad, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_compute_every_kept_row(backend):
    """Also where A = 0: without them those rows are NaN, and the mean ratio leaves them out."""
    inputs = loss_inputs(90, 12, kept=0.8)
    advantages = inputs.advantages.masked_fill(torch.arange(90) % 4 == 0, 0)
    arguments = inputs.logits, inputs.token_ids, inputs.old_logprobs, advantages
    options = {"loss_mask": inputs.loss_mask, "ref_logprobs": inputs.ref_logprobs}
    kept = inputs.loss_mask & (inputs.old_logprobs < math.log(0.9))
    few, all_kept = (
        masked_ppo_loss(*arguments, **options, entropy=True, metrics=metrics, backend=backend)
        for metrics in (False, True)
    )
    assert torch.equal(few.logprobs.isfinite(), kept & (advantages != 0))
    assert torch.equal(all_kept.logprobs.isfinite(), kept)
    logprobs, entropy = token_logprobs(inputs.logits.double(), inputs.token_ids, entropy=True)
    ratio = (logprobs - inputs.old_logprobs).exp()
    d = inputs.ref_logprobs - logprobs
    torch.testing.assert_close(all_kept.entropy[kept].double(), entropy[kept], rtol=1e-5, atol=1e-5)
    for out, rows in ((few, kept & (advantages != 0)), (all_kept, kept)):
        assert out.ratio_mean.item() == pytest.approx(ratio[rows].mean().item(), rel=1e-5)
        k3 = (d.exp() - d - 1)[rows].mean().item()
        assert out.kl_mean.item() == pytest.approx(k3, rel=1e-5) and out.kl == 0
        low = kept & (ratio < 0.8) & (advantages < 0)
        high = kept & (ratio > 1.2) & (advantages > 0)
        for figure, rows in ((out.clipfrac_low, low), (out.clipfrac_high, high)):
            assert 0 < figure.item() == pytest.approx(rows.sum().item() / kept.sum().item())
        assert out.clipfrac.item() == pytest.approx((out.clipfrac_low + out.clipfrac_high).item())
    torch.testing.assert_close(few.loss, all_kept.loss)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_logprobs_are_dropped_and_counted(backend):
    inputs = loss_inputs(12, 20, kept=0.6)
    lost = torch.arange(12) % 4 == 0
    old = inputs.old_logprobs.masked_fill(lost, math.nan)
    kl = {"ref_logprobs": inputs.ref_logprobs, "kl_coef": 0.3, "kl_scope": "all"}

    def run(old, mask, **options):
        logits = inputs.logits.clone().requires_grad_()
        arguments = logits, inputs.token_ids, old, inputs.advantages
        out = masked_ppo_loss(*arguments, loss_mask=mask, backend=backend, **kl, **options)
        out.loss.backward()
        return out, logits.grad

    got, grad = run(old, inputs.loss_mask, nan_logprobs="drop")
    want, want_grad = run(inputs.old_logprobs, inputs.loss_mask & ~lost)
    assert torch.equal(got.loss, want.loss) and torch.equal(grad, want_grad)
    assert got.num_nan == (lost & inputs.loss_mask).sum() > 0 and want.num_nan == 0
    with pytest.raises(ValueError, match="old_logprobs: expected no NaN"):
        run(old, inputs.loss_mask)


def random_options(inputs, seed):
    """A few of the options at once, and what takes the place of the old logprobs."""
    pick, g = random.Random(seed), torch.Generator(inputs.logits.device).manual_seed(seed)
    n = inputs.advantages.shape[0]

    def numbers():
        return torch.rand(n, generator=g, device=inputs.logits.device)

    old = inputs.old_logprobs
    options = {
        "prob_threshold": pick.choice([None, 0.9, 0.3]),
        "clip_ratio_max": pick.choice([None, 1.1, 3.0]),
        "log_ratio_clamp": pick.choice([None, 0.2, 10.0]),
        "entropy_coef": pick.choice([0.0, 0.0, 0.2, -0.1]),
        "temperature": pick.choice([1.0, 0.7]),
        "logit_scale": pick.choice([1.0, 1.0, 0.3]),
        "logit_softcap": pick.choice([None, None, 3.0, 30.0]),
        "policy_norm": pick.choice([None, 7.0, tensor(5), tensor(3.0)]),
        "weights": pick.choice([None, numbers()]),
        "loss_mask": pick.choice([None, inputs.loss_mask]),
        "metrics": pick.random() < 0.4,
    }
    if pick.random() < 0.3:
        old = None
    elif pick.random() < 0.3:
        old, options["nan_logprobs"] = old.masked_fill(numbers() < 0.3, math.nan), "drop"
    if pick.random() < 0.7:
        options |= {
            "ref_logprobs": inputs.ref_logprobs,
            "kl_coef": pick.choice([0.0, 0.3]),
            "kl_estimator": pick.choice(["k1", "k2", "k3"]),
            "kl_scope": pick.choice(["masked", "all"]),
            "kl_clamp": pick.choice([None, 0.5, 10.0]),
            "kl_ratio": pick.random() < 0.5,
            "kl_weights": pick.choice([None, numbers()]),
            "kl_norm": None if options["policy_norm"] is None else pick.choice([None, 2.0]),
        }
    return old, options


@needs_native
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", [False, True])
def test_options_together(dtype, head):
    for seed in range(examples(80)):
        inputs = loss_inputs(1 + seed % 19, 2 + seed % 50, dtype, seed=seed, kept=0.6)
        old, options = random_options(inputs, seed)
        advantages = inputs.advantages.masked_fill(inputs.advantages.abs() < 0.3, 0)
        weight = 0.5 * torch.eye(inputs.logits.shape[1]).to(dtype) if head else None
        states = inputs.logits * 2 if head else inputs.logits
        results = []
        for kind, backend in ((None, FAST), (None, "reference"), (torch.float64, "reference")):
            leaves = [
                x.to(kind or dtype).clone().requires_grad_() for x in (states, weight)[: 1 + head]
            ]
            function = linear_masked_ppo_loss if head else masked_ppo_loss
            out = function(*leaves, inputs.token_ids, old, advantages, backend=backend, **options)
            (out.loss * 2).backward()
            results.append((out, [leaf.grad for leaf in leaves]))
        assert_figures_as_good(*(out for out, _ in results))
        for triple in zip(*(grads for _, grads in results), strict=True):
            assert_as_good_as_torch(f"gradient of case {seed}", *triple)


@pytest.mark.parametrize("shape", [(12,), (3, 4)])
def test_objective_is_the_loss_from_logprobs(shape):
    """Every figure and every gradient, as a foreign head's logprobs and entropy give them."""
    for seed in range(40):
        inputs = loss_inputs(12, 9, torch.float64, seed=seed, kept=0.6)
        old, options = random_options(inputs, seed)
        options = {k: x for k, x in options.items() if k != "metrics"}
        of_logits = ("temperature", "logit_scale", "logit_softcap")
        of_logits = {name: options.pop(name) for name in of_logits}
        shaped = {k: x.view(shape) if getattr(x, "ndim", 0) else x for k, x in options.items()}
        old = None if old is None else old.view(shape)
        ids, advantages = inputs.token_ids.view(shape), inputs.advantages.view(shape)
        leaves = [inputs.logits.view(*shape, 9).clone().requires_grad_() for _ in range(2)]
        want = masked_ppo_loss(leaves[0], ids, old, advantages, **of_logits, metrics=True, **shaped)
        logprobs, entropy = token_logprobs(leaves[1], ids, **of_logits, entropy=True)
        got = policy_objective(logprobs, old, advantages, entropy=entropy, **shaped)
        want.loss.backward()
        got.loss.backward()
        torch.testing.assert_close(leaves[1].grad, leaves[0].grad)
        for name in FIGURES[:-2]:
            torch.testing.assert_close(getattr(got, name), getattr(want, name))
        assert got.num_kept == want.num_kept and got.num_nan == want.num_nan
        assert got.logprobs.shape == shape


def test_objective_takes_nan_where_nothing_is_kept():
    logprobs = tensor([-1.0, math.nan, -2.0], requires_grad=True)
    arguments = tensor([-1.0, -1.0, -0.01]), torch.ones(3)
    out = policy_objective(logprobs, *arguments, loss_mask=tensor([True, False, True]))
    out.loss.backward()
    assert out.loss == -1 and logprobs.grad.tolist() == [-1, 0, 0]


def test_objective_compiles_and_has_second_derivatives():
    inputs = loss_inputs(8, 5, kept=0.8)

    def step(logprobs):
        out = policy_objective(logprobs, inputs.old_logprobs, inputs.advantages)
        return out.loss, out.ratio_mean

    assert_compiles(step, inputs.old_logprobs + 0.1)
    leaf = (inputs.old_logprobs.double() + 0.1).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: step(x)[0], leaf)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_infinite_ratio_that_is_clipped_has_no_gradient(backend, advantage):
    """Nor has a weight that is not finite where the advantage is 0."""
    options = {"clip_ratio_max": 3.0, "policy_norm": 2}
    out, grads = two_way(2, [-120.0, HALF], [advantage, 1.0], backend, **options)
    assert out.loss.item() == pytest.approx(-(1.2 + 1) / 2 if advantage > 0 else (3 - 1) / 2)
    torch.testing.assert_close(grads, tensor([0.0, -0.5]))
    weights = tensor([math.inf, 1.0])
    out, grads = two_way(2, [HALF, HALF], [0.0, 1.0], backend, weights=weights, metrics=True)
    assert out.loss == -1
    torch.testing.assert_close(grads, tensor([0.0, -1.0]))
    kl = {"ref_logprobs": tensor([-math.inf, 0.0]), "kl_coef": 1.0, "kl_clamp": None}
    norms = {"policy_norm": 0, "kl_norm": 0}  # a norm of 0 gives loss 0, whatever the terms are
    out, grads = two_way(2, [-120.0, HALF], [-1.0, 1.0], backend, **norms, **kl)
    assert out.loss == 0 and (grads == 0).all()


def test_objective_of_tensors_without_data():
    old, advantages = torch.zeros(4, device="meta"), torch.zeros(4, device="meta")
    logprobs = torch.zeros(4, device="meta", requires_grad=True)
    out = policy_objective(logprobs, old, advantages)
    out.loss.backward()
    assert out.loss.shape == () and logprobs.grad.is_meta
    many = torch.rand(3, 4) - 2
    one_by_one = [policy_objective(x, x.roll(1), torch.ones(4)).loss for x in many]
    found = torch.vmap(lambda x: policy_objective(x, x.roll(1), torch.ones(4)).loss)(many)
    torch.testing.assert_close(found, torch.stack(one_by_one))


@needs_native
def test_annealed_numbers_do_not_compile_again():
    """torch.compile makes a number dynamic as soon as it changes."""
    inputs = loss_inputs(6, 9)
    arguments = [getattr(inputs, f) for f in ("token_ids", "old_logprobs", "advantages")]
    names = (
        "entropy_coef",
        "clip_eps_high",
        "kl_clamp",
        "temperature",
        "policy_norm",
        "logit_scale",
    )

    def step(logits, value):
        return masked_ppo_loss(logits, *arguments, **dict.fromkeys(names, value)).loss

    compiled = torch.compile(step, fullgraph=True, backend="eager", dynamic=True)
    for value in (0.5, 0.4, 0.3):
        torch.testing.assert_close(compiled(inputs.logits, value), step(inputs.logits, value))


@needs_native
@pytest.mark.parametrize("name", ["entropy_coef", "clip_eps_low", "clip_ratio_max", "kl_clamp"])
def test_a_tensor_is_no_number(name):
    """A kernel would take its address for one."""
    inputs = loss_inputs(4, 5)
    arguments = inputs.logits, inputs.token_ids, inputs.old_logprobs, inputs.advantages
    with pytest.raises(
        TypeError, match=rf"{name}: expected a number, found a tensor: use .item\(\)"
    ):
        masked_ppo_loss(*arguments, **{name: tensor(1.5)})
    for flag in ("metrics", "kl_ratio"):
        with pytest.raises(TypeError, match=f"{flag}: expected True or False, found 'yes'"):
            masked_ppo_loss(*arguments, **{flag: "yes"})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logprobs": torch.zeros(3).long()}, TypeError, "logprobs: expected floating-point"),
        ({"entropy_coef": 0.1}, ValueError, "entropy: expected a tensor with entropy_coef=0.1"),
        ({"entropy": torch.zeros(2)}, ValueError, r"entropy: expected shape \(3,\)"),
        ({"old_logprobs": tensor([0.0, math.nan, 0])}, ValueError, "old_logprobs: .* NaN at row 1"),
        ({"policy_norm": tensor(-1)}, ValueError, "policy_norm: expected a finite count"),
        ({"clip_ratio_max": 0.5}, ValueError, "clip_ratio_max: expected a number above 1"),
    ],
)
def test_objective_errors(change, error, message):
    arguments = {"logprobs": -torch.ones(3), "old_logprobs": -torch.ones(3)}
    arguments |= {"advantages": torch.ones(3)}
    with pytest.raises(error, match=message):
        policy_objective(**{**arguments, **change})


@needs_native
@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.1}, {"kl_ratio": True}])
def test_on_policy_compiles(options):
    """A norm that is known only after the rows is no data-dependent shape."""
    inputs = loss_inputs(9, 40)
    kl = {"ref_logprobs": inputs.ref_logprobs, "kl_coef": 0.2}

    def step(scaled):
        out = masked_ppo_loss(
            scaled * 1.5, inputs.token_ids, None, inputs.advantages, **kl, **options
        )
        return out.loss * 2, out.num_kept

    assert_compiles(step, inputs.logits)


@needs_native
@pytest.mark.parametrize("threshold", [1e-6, 0.05, 0.3])  # none, few and most are kept
@pytest.mark.parametrize("options", [{}, {"memory_budget": 4 * 5 * 3}, {"batch_invariant": True}])
def test_on_policy_is_off_policy_with_its_own_logprobs(options, threshold):
    """The head projects every token of the loss mask, and gives the loss of the masked ones."""
    inputs = loss_inputs(14, 5, kept=1.0)
    index = torch.arange(14) % 9  # some hidden states have two tokens
    old = token_logprobs(inputs.logits[index], inputs.token_ids, backend=FAST)
    results = []
    for given in (None, old):
        hidden, weight = inputs.logits[:9].clone().requires_grad_(), torch.eye(5).requires_grad_()
        arguments = hidden, weight, inputs.token_ids, given, inputs.advantages
        head = {"hidden_index": index, "bias": torch.zeros(5), **options}
        out = linear_masked_ppo_loss(*arguments, prob_threshold=threshold, backend=FAST, **head)
        out.loss.backward()
        results.append((out, hidden.grad, weight.grad))
    (late, *late_grads), (early, *grads) = results
    kept = int((old < math.log(threshold)).sum())
    assert late.num_kept == early.num_kept == kept and (kept == 0) == (threshold == 1e-6)
    assert (2 * kept < 14) == (threshold < 0.3) and kept < 14
    assert late.logprobs.isfinite().all() and early.logprobs.isnan().any()
    torch.testing.assert_close(late.loss, early.loss)
    torch.testing.assert_close(late_grads, grads)


@needs_native
def test_fp16_gradients_of_an_on_policy_mask_keep_small_ones():
    """The power of two and the late norm are taken out together."""
    inputs = loss_inputs(16, 500, torch.float16, kept=1.0)
    grads = []
    for dtype, backend in ((None, FAST), (None, "reference"), (torch.float64, None)):
        leaf = inputs.logits.to(dtype or torch.float16).clone().requires_grad_()
        arguments = leaf, inputs.token_ids, None, inputs.advantages
        (masked_ppo_loss(*arguments, backend=backend).loss * 1024).backward()
        grads.append(leaf.grad)
    assert_as_good_as_torch("dlogits", *grads)
