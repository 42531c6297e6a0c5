"""batch_invariant=True: a row has the same bits whatever rows and threads stand beside it."""

import pytest
import torch
from kernel_cases import INTERPRETED, needs_fast, on_cpu_tensors, slow_if_interpreted

from spo_kernels import (
    cpu_fixed,
    dispatch,
    linear_masked_ppo_loss,
    linear_token_logprobs,
    masked_ppo_loss,
    token_logprobs,
)
from spo_kernels.testing import DEVICE, FAST, assert_as_good_as_torch, loss_inputs

pytestmark = needs_fast("policy_loss")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROWS, VOCAB, WIDTH = 60 if INTERPRETED else 5000, 211, 37
SIZES = (1, 2, 3, 5, 7, 8, 13, 15, 16, 33, 64, 65, 200, 257, 1000, 2500, 5000)
SIZES = (1, 2, 7, 33) if INTERPRETED else SIZES
PAIRS = [(FP32, FP32), (BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP16)]
ISAS = [isa for isa in ("avx512", "avx2", "portable") if FAST == "cpu"] or [None]
CASES = [
    *((None, *pair, FP32) for pair in PAIRS),
    *((None, *pair, BF16) for pair in PAIRS[:2]),
    *((isa, FP32, FP32, FP32) for isa in ISAS[1:]),
]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    """The CPU kernels run with these instructions."""
    if request.param is not None:
        monkeypatch.setenv("SPO_CPU_ISA", request.param)
        try:
            dispatch.native().cpu_isa()
        except RuntimeError as error:
            pytest.skip(str(error))
    return request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def same_bits(a, b):
    kinds = {4: torch.int32, 2: torch.int16}
    return a.dtype == b.dtype and torch.equal(*(x.view(kinds[x.element_size()]) for x in (a, b)))


class Batch:
    """5000 tokens, and the rows of some of them in any order."""

    def __init__(self, hidden, weight, bias):
        g = torch.Generator(DEVICE).manual_seed(0)
        where = {"generator": g, "device": DEVICE}
        self.hidden = torch.randn(ROWS, WIDTH, **where).to(hidden)
        self.weight = (torch.randn(VOCAB, WIDTH, **where) * 0.3).to(weight)
        self.bias = torch.randn(VOCAB, **where).to(weight) if bias else None
        self.tokens = loss_inputs(ROWS, VOCAB, kept=1.0)

    def common(self, keep):
        return {"bias": self.bias, "loss_mask": keep, "backend": FAST, "entropy": True}

    def states(self, rows, options):
        """Hidden states of the rows alone, or all of them with an index into them; which are
        theirs."""
        if options.pop("indexed", False):
            options["hidden_index"] = rows
            return self.hidden.clone().requires_grad_(), rows
        return self.hidden[rows].requires_grad_(), slice(None)

    def loss(self, rows, keep, **options):
        """Per-token results and dhidden of the loss, of the kept ones of `rows`."""
        (hidden, own), t = self.states(rows, options), self.tokens
        record = linear_masked_ppo_loss(
            *(hidden, self.weight.clone().requires_grad_(), t.token_ids[rows]),
            *(t.old_logprobs[rows], t.advantages[rows]),
            **{"ref_logprobs": t.ref_logprobs[rows], "kl_coef": 0.1, "kl_norm": 77},
            **{"policy_norm": 100, "prob_threshold": None},
            **self.common(keep) | options,
        )
        record.loss.backward()
        return [x[keep] for x in (record.logprobs, record.entropy, hidden.grad[own])]

    def logprobs(self, rows, keep, **options):
        hidden, own = self.states(rows, options)
        results = linear_token_logprobs(
            *(hidden, self.weight.clone().requires_grad_(), self.tokens.token_ids[rows]),
            **self.common(keep) | options,
        )
        weights = (self.tokens.advantages[rows], self.tokens.ref_logprobs[rows])
        sum((r * w).sum() for r, w in zip(results, weights, strict=True)).backward()
        return [x.detach()[keep] for x in (*results, hidden.grad[own])]

    def from_logits(self, rows, keep, memory_budget=None, **options):
        logits = self.tokens.logits[rows].to(self.hidden.dtype).requires_grad_()
        t = self.tokens
        record = masked_ppo_loss(
            *(logits, t.token_ids[rows], t.old_logprobs[rows], t.advantages[rows]),
            **{"loss_mask": keep, "backend": FAST, "policy_norm": 100, "entropy": True},
            **{"prob_threshold": None},
        )
        results = token_logprobs(
            logits, t.token_ids[rows], loss_mask=keep, entropy=True, backend=FAST
        )
        sum(((r * t.advantages[rows]).sum() for r in results), record.loss).backward()
        # The loss's fp16 gradients share a power of two, which may round the smallest.
        grads = () if logits.dtype == FP16 else (logits.grad,)
        kept = (record.logprobs, record.entropy, *results, *grads)
        return [x.detach()[keep] for x in kept]


def changes(batch, op, threads, sizes=SIZES, **options):
    """The sizes of batches in which a row has other bits than among all 5000."""
    run, changed = getattr(batch, op), []
    everything = torch.arange(ROWS, device=DEVICE), torch.ones(ROWS, dtype=torch.bool)
    whole = run(*everything, **options)
    drawn = {"generator": torch.Generator().manual_seed(1), "device": "cpu"}
    for size in sizes:
        rows = torch.randperm(ROWS, **drawn)[:size].to(DEVICE)
        keep = torch.rand(size, **drawn) < torch.rand((), **drawn)
        keep[0] = True
        threads(1 + size % 3)
        budget = VOCAB * 4 * int(torch.randint(1, size + 2, (), **drawn))
        parts = run(rows, keep.to(DEVICE), memory_budget=budget, **options)
        kept = rows[keep.to(DEVICE)]
        if not all(same_bits(part, x[kept]) for part, x in zip(parts, whole, strict=True)):
            changed.append(size)
    return changed


@pytest.mark.parametrize("op", ["loss", "logprobs"])
@pytest.mark.parametrize(("isa", "hidden", "weight", "logits_dtype"), CASES, indirect=["isa"])
def test_a_row_has_the_same_bits_in_every_batch(isa, threads, hidden, weight, logits_dtype, op):
    if FAST != "cpu" and op == "loss" and FP16 in (hidden, weight):
        pytest.skip("a GPU's fp16 gradients share a power of two, which may flush the smallest")
    batch = Batch(hidden, weight, bias=logits_dtype == FP32)
    options = {"logits_dtype": logits_dtype, "batch_invariant": True}
    assert changes(batch, op, threads, **options) == []


@slow_if_interpreted
@pytest.mark.parametrize("op", ["loss", "logprobs"])
def test_so_it_has_through_an_index_where_no_other_row_has_its_state(threads, op):
    batch = Batch(BF16, BF16, bias=True)
    sizes = (1, 3, 64, 1000)
    assert changes(batch, op, threads, sizes, batch_invariant=True, indexed=True) == []


@on_cpu_tensors  # on a GPU the order depends on how a row is aligned, with an odd vocabulary
@slow_if_interpreted
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16])
def test_from_logits_it_needs_no_option(threads, dtype):
    assert changes(Batch(dtype, dtype, bias=False), "from_logits", threads) == []


@on_cpu_tensors
@slow_if_interpreted
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="another BLAS library")
@pytest.mark.parametrize("op", ["loss", "logprobs"])
def test_without_it_a_row_has_other_bits_in_small_batches(threads, op):
    assert changes(Batch(FP32, FP32, False), op, threads, sizes=range(1, 9)) != []


@pytest.mark.parametrize("op", ["loss", "logprobs"])
@pytest.mark.parametrize(("hidden", "weight"), PAIRS)
def test_it_is_as_accurate(isa, hidden, weight, op):
    batch, rows = Batch(hidden, weight, bias=True), torch.arange(40, device=DEVICE)
    keep = torch.rand(40, generator=torch.Generator(DEVICE).manual_seed(2), device=DEVICE) < 0.6
    run = getattr(batch, op)
    got, same = (run(rows, keep, batch_invariant=flag) for flag in (True, False))
    batch.hidden, batch.weight, batch.bias = (
        x.double() for x in (batch.hidden, batch.weight, batch.bias)
    )
    oracle = run(rows, keep, backend="reference")
    for name, *triple in zip(("logprobs", "entropy", "dhidden"), got, same, oracle, strict=True):
        assert_as_good_as_torch(name, *triple)


@pytest.mark.parametrize("op", ["loss", "logprobs"])
def test_shared_states_are_summed_in_order(threads, op):
    """A state's gradient is the sum of its rows', in their order, in any chunks and threads."""
    batch = Batch(FP32, FP32, bias=False)
    index = torch.arange(60, device=DEVICE) // 3
    keep = torch.ones(60, dtype=torch.bool, device=DEVICE)
    run, rows = getattr(batch, op), torch.arange(60, device=DEVICE)
    options = {"hidden_index": index, "batch_invariant": True}
    results = []
    for count, budget in ((1, 1 << 30), (2, VOCAB * 4 * 7), (3, 1)):
        threads(count)
        results.append(run(rows, keep, memory_budget=budget, **options))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(other, results[0], strict=True))


def test_the_reference_refuses():
    x = torch.zeros(3, 4)
    for op, more in ((linear_masked_ppo_loss, (x[:, 0], x[:, 0])), (linear_token_logprobs, ())):
        with pytest.raises(ValueError, match="batch_invariant: expected False on the reference"):
            op(x, x, torch.zeros(3, dtype=torch.int64), *more, batch_invariant=True,
               backend="reference")  # fmt: skip


def framed(rows, columns, dtype, seed):
    """A matrix among NaN, its rows at odd addresses."""
    around = torch.full((rows + 2, columns + 5), torch.nan, dtype=dtype)
    inside = around[1 : 1 + rows, 3 : 3 + columns]
    inside.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))
    return inside


@on_cpu_tensors
@pytest.mark.parametrize("weight", [FP32, BF16, FP16, torch.float64])
@pytest.mark.parametrize("states", [FP32, BF16, FP16])
@pytest.mark.parametrize(
    ("n", "vocab", "width"), [(1, 1, 1), (15, 33, 16), (13, 31, 259), (29, 700, 17), (57, 257, 520)]
)
def test_products(isa, n, vocab, width, states, weight):
    x, w, dz = (
        framed(n, width, states, 0),
        framed(vocab, width, weight, 1),
        framed(n, vocab, FP32, 2),
    )
    for dtype in (FP32, BF16):
        out = framed(n, vocab, dtype, 3)
        cpu_fixed.logits(x, w, out)
        want = x.double() @ w.double().T
        assert_as_good_as_torch("logits", out, (x.float() @ w.float().T).to(dtype), want)
        dlogits = dz.to(dtype)
        found, want = cpu_fixed.states_gradient(dlogits, w), dlogits.double() @ w.double()
        assert_as_good_as_torch("dhidden", found, dlogits.float() @ w.float(), want)


@on_cpu_tensors
@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_empty_products(isa, shape):
    n, vocab, width = shape
    out = torch.full((n, vocab), torch.nan)
    cpu_fixed.logits(torch.ones(n, width), torch.ones(vocab, width), out)
    assert (out == 0).all()
    assert (cpu_fixed.states_gradient(torch.ones(n, vocab), torch.ones(vocab, width)) == 0).all()


@on_cpu_tensors
def test_products_of_views_and_of_numbers_that_are_not_finite(isa):
    x, w = torch.randn(20, 40), torch.randn(40, 70).T  # a weight whose columns are contiguous
    x[3, 7], w[5, 9] = torch.inf, torch.nan
    out = torch.empty(20, 70)
    cpu_fixed.logits(torch._neg_view(x), w, out)
    bad = torch.zeros(20, 70, dtype=torch.bool)
    bad[3], bad[:, 5] = True, True
    assert torch.equal(~out.isfinite(), bad)
    torch.testing.assert_close(out[~bad], (-x @ w.T)[~bad])
