"""The head's products on a GPU, run on the CPU under CUDA's rules, and what a call launches."""

import pytest
import torch
from kernel_cases import needs_fast, on_cpu_tensors
from torch import tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from spo_kernels import (
    dispatch,
    head,
    linear_masked_ppo_loss,
    linear_policy_loss,
    linear_token_logprobs,
    masked_ppo_loss,
    policy_loss,
    products,
)
from spo_kernels.testing import loss_inputs

pytestmark = [needs_fast("policy_loss"), on_cpu_tensors]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
VIEWS = {
    *("detach", "view", "_unsafe_view", "reshape", "alias", "slice", "select", "unbind", "t"),
    *("transpose", "expand", "unsqueeze", "squeeze", "as_strided", "split", "lift_fresh"),
    *("empty", "empty_like", "new_empty", "empty_strided", "permute", "_reshape_alias"),
    *("to", "contiguous", "resolve_conj", "resolve_neg", "clone"),  # what they copy is counted
}
OPS = {  # by name, what the dispatcher would call
    "policy_loss": policy_loss._policy_loss,
    "linear_policy_loss": linear_policy_loss._linear_policy_loss,
}
SYNCS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}


class Counter(TorchDispatchMode):
    """What a call launches on a GPU, and how often it waits for one."""

    def __init__(self):
        super().__init__()
        self.launches, self.syncs = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "spo_kernels":
            with self:
                return OPS[name].kernel(*args)
        if name in SYNCS:
            self.syncs.append(name)
        elif name not in VIEWS and func.namespace == "aten":
            self.launches.append(name)
        return func(*args, **(kwargs or {}))


def wide_mm(multiply, calls):
    """`torch.mm` as on CUDA: operands of one dtype; from halves also an fp32 result."""

    def mm(a, b, *, out_dtype=None, out=None):
        calls.append("mm")
        assert a.dtype == b.dtype, "CUDA multiplies operands of one dtype"
        with _disable_current_modes():
            if out_dtype is None:
                assert out is None or out.dtype == a.dtype
                return multiply(a, b) if out is None else out.copy_(multiply(a, b))
            assert a.dtype in (BF16, FP16) and out_dtype == FP32, "out_dtype: fp32 from halves"
            product = multiply(a.float(), b.float())
            return product if out is None else out.copy_(product)

    return mm


def wide_addmm(multiply, calls):
    def addmm(total, a, b, *, out_dtype, out):
        calls.append("addmm")
        assert products.ADDS_WIDE, "before PyTorch 2.10 the sum must have the operands' dtype"
        assert total.dtype == out.dtype == out_dtype == FP32 and a.dtype == b.dtype in (BF16, FP16)
        return out.copy_(total + multiply(a.float(), b.float()))

    return addmm


@pytest.fixture
def gpu(monkeypatch):
    """Products take the way of a GPU; their names."""
    multiply, calls = torch.mm, []
    monkeypatch.setattr(torch, "mm", wide_mm(multiply, calls))
    monkeypatch.setattr(torch, "addmm", wide_addmm(multiply, calls))
    monkeypatch.setattr(products, "on_gpu", lambda x: True)
    return calls


def case(vocab, hidden, weight, width=24, rows=40):
    g = torch.Generator().manual_seed(0)
    states = torch.randn(rows, width, generator=g).to(hidden)
    matrix = (torch.randn(vocab, width, generator=g) * 0.2).to(weight)
    inputs = loss_inputs(rows, vocab, kept=0.7)
    arguments = (inputs.token_ids, inputs.old_logprobs, inputs.advantages)
    return states.requires_grad_(), matrix.requires_grad_(), arguments


@pytest.mark.parametrize("adds_wide", [True, False])
@pytest.mark.parametrize("rows", [1 << 30, 11])  # one chunk, several
@pytest.mark.parametrize("vocab", [96, 101, 7])
@pytest.mark.parametrize("logits_dtype", [FP32, BF16])
@pytest.mark.parametrize(
    ("hidden", "weight"),
    [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, BF16), (FP16, FP32)]
    + [(BF16, FP16), (FP16, BF16), (FP32, FP16)],
)
def test_every_dtype(gpu, monkeypatch, hidden, weight, logits_dtype, vocab, rows, adds_wide):
    """Loss and gradients are those of fp32, up to the rounding of the operands and results."""
    monkeypatch.setattr(products, "ADDS_WIDE", adds_wide)
    states, matrix, arguments = case(vocab, hidden, weight)
    budget = rows * vocab * logits_dtype.itemsize
    options = {"logits_dtype": logits_dtype, "memory_budget": budget}
    linear_masked_ppo_loss(states, matrix, *arguments, **options).loss.backward()
    exact = [x.detach().float().requires_grad_() for x in (states, matrix)]
    linear_masked_ppo_loss(*exact, *arguments, backend="reference").loss.backward()
    for leaf, want in zip((states, matrix), exact, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        off = (leaf.grad.float() - want.grad).norm() / want.grad.norm()
        assert off < (1e-5 if {hidden, weight, logits_dtype} == {FP32} else 0.02)
    results = linear_token_logprobs(states, matrix, arguments[0], **options)
    want = linear_token_logprobs(*exact, arguments[0], backend="reference")
    torch.testing.assert_close(results, want, rtol=0, atol=0.06)
    for x in (states, matrix, *exact):
        x.grad = None
    (results * arguments[2]).sum().backward()
    (want * arguments[2]).sum().backward()
    for leaf, want in zip((states, matrix), exact, strict=True):
        assert (leaf.grad.float() - want.grad).norm() / want.grad.norm() < 0.02


def test_an_odd_vocabulary_is_split(gpu, monkeypatch):
    """Every product of halves has dimensions of a multiple of 8, or is one of the last columns."""
    shapes, multiply = [], torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda a, b, **k: shapes.append((*a.shape, b.shape[1])) or multiply(a, b, **k)
    )
    states, matrix, arguments = case(101, BF16, BF16)
    linear_masked_ppo_loss(states, matrix, *arguments)
    assert {96, 5} <= {size for shape in shapes for size in shape} and len(shapes) >= 5
    assert not any(101 in shape for shape in shapes)


@pytest.mark.parametrize("budget", [1 << 30, 11 * 101 * 4])  # one chunk, several
@pytest.mark.parametrize("rows", [1, 16, 40])
@pytest.mark.parametrize("vocab", [96, 101])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_invariant_products_have_one_shape(gpu, monkeypatch, dtype, vocab, rows, budget):
    """Each has FIXED_ROWS rows of one stride, those that are missing zeros; the results agree."""
    monkeypatch.setattr(products, "FIXED_ROWS", 16)
    shapes = []

    def noted(product):
        def run(*arguments, out, **others):
            a = arguments[-2]
            shapes.append((a.shape[0], out.shape[0], a.stride(), out.stride()))
            return product(*arguments, out=out, **others)

        return run

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, noted(getattr(torch, name)))
    states, matrix, (ids, old, advantages) = case(vocab, dtype, dtype, rows=rows)
    matrix.requires_grad_(False)
    results = []
    for invariant in (True, False):
        options = {"batch_invariant": invariant, "memory_budget": budget}
        shapes.clear()
        record = linear_masked_ppo_loss(
            states, matrix, ids, old.clamp(max=-0.2), advantages, policy_norm=4, **options
        )
        logprobs = linear_token_logprobs(states, matrix, ids, **options)
        gradients = (torch.autograd.grad(x, states)[0] for x in (record.loss, logprobs.sum()))
        results.append((record.logprobs, logprobs, *gradients))
        if invariant:
            assert {shape[:2] for shape in shapes} == {(16, 16)}
            assert len({shape[2:] for shape in shapes}) == 2  # logits, dhidden
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("norm", [1e3, 1e5, 1e7])
@pytest.mark.parametrize("from_logits", [True, False])
def test_fp16_with_a_loss_scaler(gpu, from_logits, norm, scale):
    """The scaler's factor comes in the backward: what the forward forms must not be flushed."""
    states, matrix, arguments = case(400, FP16, FP16, width=64)
    leaves = [x.detach().clone().requires_grad_() for x in (states, matrix)]
    wide = [x.detach().double().requires_grad_() for x in (states, matrix)]
    if from_logits:
        logits = (states.detach().float() @ matrix.detach().float().T).half()
        leaves, wide = [logits.requires_grad_()], [logits.detach().double().requires_grad_()]
    eager = [x.detach().clone().requires_grad_() for x in leaves]

    def loss(inputs, backend):
        op = masked_ppo_loss if from_logits else linear_masked_ppo_loss
        return op(*inputs, *arguments, policy_norm=norm, backend=backend).loss * scale

    loss(leaves, None).backward()
    loss(wide, None).backward()
    loss(eager, "reference").backward()  # fp32 inside, rounded to fp16 at the end
    for got, same, want in zip(leaves, eager, wide, strict=True):
        exact = want.grad
        off, own = ((x.grad.double() - exact).norm() / exact.norm() for x in (got, same))
        assert off <= 2 * own + 1e-3, f"{off:.2%} off, PyTorch {own:.2%}"


def launches(call, monkeypatch):
    """Launches and host syncs of a call, the kernels of this package included."""
    run, mode = dispatch.run_native, Counter()

    def counted(kernel, *arguments):
        mode.launches += [kernel] * (3 if kernel == "policy_step" else 1)
        return run(kernel, *arguments)

    monkeypatch.setattr(dispatch, "run_native", counted)
    with mode:
        call()
    return mode


OPTIONS = {
    "plain": {},
    "mask": {"loss_mask": torch.ones(40, dtype=torch.bool)},
    "integers": {"loss_mask": torch.ones(40, dtype=torch.int64), "policy_norm": tensor(7.0)},
    "KL": {"ref_logprobs": torch.full((40,), -3.0), "kl_coef": 0.1, "kl_norm": tensor([3])},
    "temperature": {"temperature": torch.ones(1), "entropy": True},
    "everything": {
        "ref_logprobs": torch.full((40,), -3.0),
        "loss_mask": torch.ones(40, dtype=torch.int32),
        **{"kl_coef": 0.1, "policy_norm": tensor(9.0), "temperature": torch.ones(40)},
    },
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("captured", [True, False])
def test_launches_and_syncs(gpu, monkeypatch, captured, from_logits, name):
    """At most six launches besides the products, and one wait; none where a graph is captured.

    There a seventh launch clears the hidden state of rows that no token has.
    """
    inputs = loss_inputs(40, 96, BF16, kept=0.5)
    arguments = (inputs.token_ids.int(), inputs.old_logprobs, inputs.advantages[:1])
    states, matrix, _ = case(96, BF16, BF16)
    if captured:
        monkeypatch.setattr("spo_kernels.rows.is_captured", lambda _: True)
    options = OPTIONS[name] | ({"max_active": 40} if captured and not from_logits else {})
    leaves = (inputs.logits.requires_grad_(),) if from_logits else (states, matrix)
    op = masked_ppo_loss if from_logits else linear_masked_ppo_loss
    mode = launches(lambda: op(*leaves, *arguments, **options), monkeypatch)
    assert len(mode.syncs) <= (0 if captured else 1), mode.syncs
    assert len(gpu) == (0 if from_logits else 3)
    assert len(mode.launches) <= 6 + (captured and not from_logits), mode.launches


def test_the_budget_of_a_gpu(monkeypatch):
    """A quarter of what is free, from 1 to 6 GiB; what the user gives; 1 GiB under capture."""
    gib, device = 1 << 30, torch.device("cuda")
    free = [40 * gib]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda d: (free[0], 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda d: 9 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda d: 5 * gib)
    assert head.budget(None, device, 100 * gib) == 6 * gib
    assert head.budget(123, device, 100 * gib) == 123
    assert head.budget(None, torch.device("cpu"), 100 * gib) == gib
    free[0] = 8 * gib
    assert head.budget(None, device, 100 * gib) == 3 * gib
    free[0] = 0
    assert head.budget(None, device, 100 * gib) == gib
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert head.budget(None, device, 100 * gib) == gib
    assert head.budget(None, device, 5) == gib
