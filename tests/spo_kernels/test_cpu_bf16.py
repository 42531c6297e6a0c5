"""bf16 matrices on the CPU: fp32 products, which way they take, and the gradient in place."""

import math
import os
import subprocess
import sys
import threading

import pytest
import torch
from kernel_cases import needs_fast

from spo_kernels import cpu_bf16, dispatch, head, linear_masked_ppo_loss
from spo_kernels.testing import FAST, assert_as_good_as_torch, loss_inputs

pytestmark = [
    needs_fast("policy_loss"),
    pytest.mark.skipif(FAST != "cpu", reason="these products are the cpu backend's"),
]
HERE = FAST == "cpu" and dispatch._C is not None and dispatch.native().has_bf16_products()
needs_instructions = pytest.mark.skipif(not HERE, reason="this processor has no AVX512_BF16")


def operands(n, vocab, width, skip=0):
    """x (n, D) and weight (V, D); with `skip`, a view at odd addresses among NaN."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, width, generator=g).bfloat16()
    around = torch.full((vocab + 2 * skip, width + 2 * skip), torch.nan, dtype=torch.bfloat16)
    weight = around[skip : skip + vocab, skip : skip + width]
    weight.copy_(torch.randn(vocab, width, generator=g))
    return x, weight


def check_logits(found, x, weight):
    oracle = x.double() @ weight.double().T
    assert_as_good_as_torch("logits", found, x.float() @ weight.float().T, oracle)


@needs_instructions
@pytest.mark.parametrize("n", [1, 13, 15, 29, 57])
@pytest.mark.parametrize(
    ("vocab", "width"), [(1, 1), (15, 31), (33, 32), (257, 33), (100, 66), (64, 1023), (3001, 70)]
)
def test_native_product(n, vocab, width):
    for skip in (0, 3):
        x, weight = operands(n, vocab, width, skip)
        out = torch.full((n, vocab), torch.nan)
        assert cpu_bf16.multiply(x, weight, out, fixed=True)
        check_logits(out, x, weight)


@needs_instructions
@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0)])
def test_empty_product(shape):
    out = torch.full(shape[:2], torch.nan)
    assert cpu_bf16.multiply(*operands(*shape), out, fixed=True)
    assert (out == 0).all()


@needs_instructions
def test_infinite_and_missing_numbers_stay_in_their_place():
    x, weight = operands(20, 40, 50)
    x[3, 7], weight[5, 9] = torch.inf, torch.nan
    out = torch.empty(20, 40)
    assert cpu_bf16.multiply(x, weight, out, fixed=True)
    bad = torch.zeros(20, 40, dtype=torch.bool)
    bad[3], bad[:, 5] = True, True
    assert torch.equal(~out.isfinite(), bad) and out[:, 5].isnan().all()


@needs_instructions
def test_native_product_is_the_same_on_any_threads():
    x, weight = operands(57, 3001, 70)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = torch.empty(57, 3001)
            assert cpu_bf16.multiply(x, weight, out, fixed=True)
            results.append(out)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("isa", ["portable", "avx2", ""])
@pytest.mark.parametrize("fast", [True, False])
def test_projection_on_every_kind_of_cpu(monkeypatch, isa, fast):
    """With and without the instructions; weights whose rows are not contiguous take another way."""
    monkeypatch.setattr(cpu_bf16, "is_fast", lambda *names: fast and not names)
    monkeypatch.setenv("SPO_CPU_ISA", isa)
    try:
        native = dispatch.native().has_bf16_products()
    except RuntimeError:
        pytest.skip(f"this processor does not have {isa}")
    assert native == (HERE and not isa)
    for x, weight in (operands(9, 130, 35), operands(9, 130, 35, skip=3)):
        for w in (weight, weight.t().contiguous().t()):
            check_logits(head.project(x, w, None, torch.float32), x, w)
    bias = torch.ones(130).bfloat16()
    shifted = head.project(x, weight, bias, torch.float32)
    check_logits(shifted - 1, x, weight)


def test_other_threads_keep_their_precision(monkeypatch):
    """The switch of oneDNN is global, so it stays off while other threads run."""
    settings = torch.backends.mkldnn.matmul
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.setattr(dispatch.native(), "has_bf16_products", lambda: False)
    seen = []
    multiply = torch.mm
    monkeypatch.setattr(
        torch, "mm", lambda *a, **k: seen.append(settings.fp32_precision) or multiply(*a, **k)
    )
    x, weight = operands(8, 40, 6)
    for threads in (1, 2):
        monkeypatch.setattr(threading, "active_count", lambda threads=threads: threads)
        check_logits(head.project(x, weight, None, torch.float32), x, weight)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert seen == ["bf16", settings.fp32_precision] and settings.fp32_precision != "bf16"


@needs_instructions
def test_tiles_are_left_for_the_native_product_beside_other_threads(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    x, weight = operands(8, 40, 6)
    for threads in (1, 2):
        monkeypatch.setattr(threading, "active_count", lambda threads=threads: threads)
        assert cpu_bf16.multiply(x, weight, torch.empty(8, 40)) == (threads == 2)


def test_a_thread_that_multiplies_beside_the_head():
    """Neither changes the other's bits."""
    x, weight = operands(33, 2000, 64)
    wide = torch.randn(64, 300, generator=torch.Generator().manual_seed(1))
    other, done, found = wide @ wide.T, threading.Event(), []

    def beside():
        while not done.is_set():
            found.append(torch.equal(wide @ wide.T, other))

    thread = threading.Thread(target=beside)
    thread.start()
    try:
        logits = [head.project(x, weight, None, torch.float32) for _ in range(20)]
    finally:
        done.set()
        thread.join()
    assert found and all(found)
    check_logits(logits[0], x, weight)
    assert all(torch.equal(logits[0], again) for again in logits)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize("vocab", [1, 17, 1000, 4099])
def test_gradient_in_place(monkeypatch, isa, vocab):
    """A bf16 gradient over the fp32 logits that it comes from is the one beside them."""
    monkeypatch.setattr(cpu_bf16, "is_fast", lambda *names: True)
    monkeypatch.setenv("SPO_CPU_ISA", isa)
    inputs = loss_inputs(40, vocab)
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(40, 24, generator=g).bfloat16()
    weight = torch.randn(vocab, 24, generator=g).bfloat16()
    results = []
    for in_place in (True, False):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        if not in_place:
            monkeypatch.setattr(
                head, "gradient_buffer", lambda z, *_: z.new_empty(z.shape, dtype=torch.bfloat16)
            )
        try:
            out = linear_masked_ppo_loss(
                *leaves, inputs.token_ids, inputs.old_logprobs, inputs.advantages
            )
        except RuntimeError as error:
            pytest.skip(str(error))
        out.loss.backward()
        results.append([out.loss.detach(), *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert vocab == 1 or results[0][1].count_nonzero() > 0


FORK = """
import os, torch
from spo_kernels import cpu_bf16
torch.set_num_threads(2)
x, weight = torch.randn(30, 64).bfloat16(), torch.randn(3000, 64).bfloat16()
want, out = torch.empty(30, 3000), torch.empty(30, 3000)
assert cpu_bf16.multiply(x, weight, want, fixed=True)
child = os.fork()
if child == 0:
    cpu_bf16.multiply(x, weight, out, fixed=True)
    os._exit(0 if (out.numpy() == want.numpy()).all() else 1)  # no operation of torch
assert os.waitpid(child, 0)[1] == 0
"""


@needs_instructions
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_product_after_fork():
    """PyTorch's threads are gone in a forked child; the product does not wait for them."""
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=60)


@pytest.mark.parametrize("rows, vocab", [(45, 138), (45, 144), (200, 1031), (3, 10), (1, 7)])
def test_what_lies_behind_a_row_of_the_gradient_reaches_no_product(rows, vocab):
    """A bf16 gradient over fp32 logits has their halves behind each row, and some of them are NaN
    as bf16; on tiles (AMX) oneDNN multiplies a left operand's excess by zeros.
    """
    over = torch.full((rows, 2 * vocab), math.nan, dtype=torch.bfloat16)
    dlogits = over[:, :vocab].normal_()
    weight = torch.randn(vocab, 64).bfloat16()
    gradients = head.HeadGradients(
        torch.empty(rows, 64).bfloat16(), weight, weight, None, [True, False, False]
    )
    gradients.add(dlogits, torch.empty(rows, 64), only=True)
    (found,) = gradients.dx
    expected = dlogits.double() @ weight.double()
    assert (found.double() - expected).norm() < 2**-7 * expected.norm()
    read = over[:-1, : -(-vocab // 32) * 32]  # by tiles of 32
    assert read.isfinite().all()
