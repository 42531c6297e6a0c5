"""torch.func, forward-mode AD, meta and fake tensors, and bad numbers in compiled code."""

import contextlib
import math

import pytest
import torch
from kernel_cases import needs_fast, on_cpu_tensors
from torch import tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from spo_kernels import (
    linear_masked_ppo_loss,
    linear_token_logprobs,
    masked_ppo_loss,
    token_logprobs,
)
from spo_kernels.testing import DEVICE, FAST

V, D, N = 7, 3, 5


def arguments(batch=(), dtype=torch.float64, seed=0):
    """Of the four functions; ids and numbers of rows that the mask drops are not valid."""
    where = {"generator": torch.Generator(DEVICE).manual_seed(seed), "device": DEVICE}
    uniform, normal = (
        lambda *shape: torch.rand(*batch, *shape, **where, dtype=dtype),
        lambda *shape: torch.randn(*batch, *shape, **where, dtype=dtype),
    )
    mask = uniform(N) < 0.7
    return {
        "logits": normal(N, V),
        "hidden": normal(N, D),
        "weight": normal(V, D),
        "bias": normal(V),
        "ids": torch.where(mask, torch.randint(V, (*batch, N), **where), -100),
        "old": torch.where(mask, -0.2 - uniform(N), math.nan),
        "advantages": normal(N),
        "mask": mask,
        "heat": torch.where(mask, 0.5 + uniform(N), 0.0),
    }


def masked(x, backend="reference"):
    out = masked_ppo_loss(
        x["logits"], x["ids"], x["old"], x["advantages"], loss_mask=x["mask"], backend=backend,
        temperature=x["heat"], ref_logprobs=x["old"], kl_coef=0.3, kl_scope="all",
    )  # fmt: skip
    return out.loss + out.logprobs.nansum() + out.num_kept


def linear_masked(x, backend="reference"):
    out = linear_masked_ppo_loss(
        x["hidden"], x["weight"], x["ids"], x["old"], x["advantages"], bias=x["bias"],
        loss_mask=x["mask"], temperature=x["heat"], backend=backend,
    )  # fmt: skip
    return out.loss + out.logprobs.nansum() + out.num_kept


def logprobs(x, backend="reference"):
    options = {"loss_mask": x["mask"], "temperature": x["heat"], "backend": backend}
    found, entropy = token_logprobs(x["logits"], x["ids"], entropy=True, **options)
    return (found + 0.3 * entropy).square().sum()


def linear_logprobs(x, backend="reference"):
    options = {"loss_mask": x["mask"], "temperature": x["heat"], "backend": backend}
    found, entropy = linear_token_logprobs(
        x["hidden"], x["weight"], x["ids"], bias=x["bias"], entropy=True, **options
    )
    return (found + 0.3 * entropy).square().sum()


CASES = [
    pytest.param(masked, "logits", id="masked_ppo_loss"),
    pytest.param(linear_masked, "weight", id="linear_masked_ppo_loss"),
    pytest.param(logprobs, "logits", id="token_logprobs"),
    pytest.param(linear_logprobs, "hidden", id="linear_token_logprobs"),
]


def by(function, name, x, **options):
    """`function` of the argument `name` alone."""
    return lambda leaf: function(x | {name: leaf}, **options)


def autograd(function, name, x):
    leaf = x[name].clone().requires_grad_()
    (grad,) = torch.autograd.grad(by(function, name, x)(leaf), leaf)
    return grad


@pytest.mark.parametrize(("function", "name"), CASES)
def test_the_reference_has_all_transforms(function, name):
    x = arguments()
    of_leaf, want = by(function, name, x), autograd(function, name, x)
    assert want.abs().sum() > 0.1
    torch.testing.assert_close(torch.func.grad(of_leaf)(x[name]), want)
    tangent = arguments(seed=1)[name]
    value, change = torch.func.jvp(of_leaf, (x[name],), (tangent,))
    torch.testing.assert_close(value, of_leaf(x[name]))
    torch.testing.assert_close(change, (want * tangent).sum())
    with forward_ad.dual_level():
        dual = of_leaf(forward_ad.make_dual(x[name], tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, change)
    hessian = torch.func.hessian(of_leaf)(x[name])
    both = torch.func.jvp(torch.func.grad(of_leaf), (x[name],), (tangent,))[1]
    size = x[name].numel()
    torch.testing.assert_close(both.reshape(-1), hessian.reshape(size, size) @ tangent.reshape(-1))


@pytest.mark.parametrize(("function", "name"), CASES)
def test_the_reference_maps_over_every_argument(function, name):
    batch = arguments((4,))
    singles = [{k: v[i] for k, v in batch.items()} for i in range(4)]
    want = torch.stack([function(x) for x in singles])
    torch.testing.assert_close(torch.vmap(function)(batch), want)
    found = torch.vmap(torch.func.grad(lambda leaf, x: function(x | {name: leaf})))(
        batch[name], batch
    )
    torch.testing.assert_close(found, torch.stack([autograd(function, name, x) for x in singles]))


@needs_fast("policy_loss")
@pytest.mark.parametrize(("function", "name"), CASES)
def test_the_kernels_refuse_transforms(function, name):
    x = arguments(dtype=torch.float32)
    of_leaf, leaf = by(function, name, x, backend=FAST), x[name]
    refused = pytest.raises(RuntimeError, match="no torch.func transforms.*backend='reference'")
    for transformed in (
        lambda: torch.func.jvp(of_leaf, (leaf,), (leaf,)),
        lambda: torch.func.grad(of_leaf)(leaf),
        lambda: torch.vmap(of_leaf)(leaf[None]),
        lambda: torch.func.hessian(of_leaf)(leaf),
    ):
        with refused:
            transformed()
    with forward_ad.dual_level(), refused:
        of_leaf(forward_ad.make_dual(leaf, leaf))
    with forward_ad.dual_level():
        assert of_leaf(leaf) == of_leaf(leaf)  # nothing carries a tangent
    constant = torch.func.grad(lambda y: y * of_leaf(leaf))(tensor(1.0, device=DEVICE))
    torch.testing.assert_close(constant, of_leaf(leaf))


def no_data(kind, x):
    """The arguments without their data, and the mode in which they exist."""
    if kind == "meta":
        return {k: v.to("meta") for k, v in x.items()}, contextlib.nullcontext()
    mode = FakeTensorMode()
    return {k: mode.from_tensor(v) for k, v in x.items()}, mode


@on_cpu_tensors
@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("function", "name"), CASES)
def test_tensors_without_data_give_shapes(function, name, backend, kind):
    x = arguments(dtype=torch.float32)
    empty, mode = no_data(kind, x)
    with mode:
        leaf = empty[name].detach().requires_grad_()
        value = by(function, name, empty, backend=backend)(leaf)
        value.backward()
    want = function(x)
    assert (value.shape, value.dtype) == (want.shape, want.dtype)
    assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype)
    assert value.device == leaf.grad.device == leaf.device


@on_cpu_tensors
@needs_fast("policy_loss")
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_records_and_options_without_data(kind):
    x, mode = no_data(kind, arguments(dtype=torch.bfloat16))
    tokens = x["ids"], x["old"], x["advantages"]
    with mode:
        leaves = [x[k].detach().requires_grad_() for k in ("logits", "hidden", "weight")]
        logits, hidden, weight = leaves
        first = masked_ppo_loss(logits * 1, *tokens, inplace_grad=True, entropy=True)
        second = linear_masked_ppo_loss(
            hidden, weight, *tokens, hidden_index=torch.arange(N, device=hidden.device),
            logits_dtype=torch.bfloat16, max_active=1, policy_norm=x["heat"][0], entropy=True,
        )  # fmt: skip
        (first.loss + second.loss).backward()
    for record in (first, second):
        assert record.logprobs.shape == record.entropy.shape == (N,)
        assert record.num_kept.dtype == torch.int64 and record.logprobs.dtype == torch.float32
    assert all(leaf.grad.shape == leaf.shape for leaf in leaves)
    with mode:
        for backend in (None, "reference"):
            names = ["is_top1", "top_ids"]
            more = linear_token_logprobs(
                hidden.float(), weight.float(), x["ids"], extras=names, top_k=3, backend=backend
            )[-1]
            assert (more.is_top1.shape, more.top_ids.shape) == ((N,), (N, 3))


@needs_fast("policy_loss")
@pytest.mark.parametrize("room", [None, N], ids=["rows", "max_active"])
def test_bad_numbers_in_compiled_code(room):
    """An error on the CPU; on a GPU, where `max_active` waits for nothing, a loss of NaN."""
    x = arguments(dtype=torch.float32) | {"mask": torch.ones(N, dtype=torch.bool, device=DEVICE)}
    good = {
        "ids": torch.arange(N, device=DEVICE),
        "old": tensor([-1.0] * N, device=DEVICE),
        "heat": tensor([1.0] * N, device=DEVICE),
        "norm": tensor(2.0, device=DEVICE),
        "kl_norm": tensor(3.0, device=DEVICE),
    }

    def loss(ids, old, heat, norm, kl_norm):
        return linear_masked_ppo_loss(
            x["hidden"], x["weight"], ids, old, x["advantages"], temperature=heat, kl_coef=0.1,
            ref_logprobs=old, policy_norm=norm, kl_norm=kl_norm, max_active=room, backend=FAST,
        ).loss  # fmt: skip

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(**good), loss(**good))
    for name, values in {
        "norm": (-1.0, math.nan, math.inf),
        "kl_norm": (-1.0, math.nan, math.inf),
        "heat": (0.0, -1.0, math.nan, math.inf),
        "ids": (-1, V),
        "old": (math.nan,),
    }.items():
        for value in values:
            bad = good | {name: torch.full_like(good[name], value)}
            if room is not None and DEVICE.type != "cpu":
                assert compiled(**bad).isnan()
                continue
            with pytest.raises(ValueError, match="expected .*, found|found NaN"):
                compiled(**bad)


@needs_fast("policy_loss")
@pytest.mark.parametrize("name", ["policy_norm", "kl_norm"])
@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_a_bad_norm_under_capture_is_nan(monkeypatch, name, value):
    x = arguments(dtype=torch.float32)
    monkeypatch.setattr("spo_kernels.rows.is_captured", lambda _: True)
    options = {"ref_logprobs": x["advantages"], "kl_coef": 0.1, "backend": FAST}
    options |= {"policy_norm": 1.0, "kl_norm": 1.0, name: tensor(value, device=DEVICE)}
    options |= {"loss_mask": x["mask"]}
    tokens = x["ids"], x["old"], x["advantages"]
    hidden = x["hidden"].requires_grad_()
    out = linear_masked_ppo_loss(hidden, x["weight"], *tokens, max_active=N, **options)
    out.loss.backward()
    assert out.loss.isnan() and hidden.grad[x["mask"]].isnan().all()
    assert masked_ppo_loss(x["logits"], *tokens, **options).loss.isnan()
