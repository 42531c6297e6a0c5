"""Which backend runs, why another cannot, and what an installation without native code does."""

import importlib.util
import os
import subprocess
import sys
import types

import pytest
import torch
from kernel_cases import on_cpu_tensors

import spo_kernels
from spo_kernels import dispatch

native = pytest.mark.skipif(dispatch._C is None, reason="the native extension is not built")


def test_backends_reports_every_op():
    report = spo_kernels.backends()
    assert set(report) == {"policy_loss", "logprobs", "segments", "tree", "gae"}
    for op, reasons in report.items():
        assert list(reasons) == ["cuda", "triton", "cpu", "reference"]
        assert reasons["reference"] == "available"
        for backend, reason in reasons.items():
            assert (reason == "available") == (dispatch.unavailable(op, backend) == "")


@native
@on_cpu_tensors
def test_order_and_precision():
    assert dispatch.choose("policy_loss", torch.zeros(1)) == "cpu"
    assert dispatch.choose("policy_loss", torch.zeros(1, dtype=torch.float64)) == "reference"
    assert dispatch.choose("policy_loss", torch.zeros(1), "reference") == "reference"
    assert dispatch.choose("policy_loss", torch.zeros(1, device="meta")) == "reference"


@native
@on_cpu_tensors
def test_explicit_backend_never_falls_back():
    with pytest.raises(ValueError, match="float64 runs on the reference only"):
        dispatch.choose("logprobs", torch.zeros(1, dtype=torch.float64), "cpu")
    with pytest.raises(ValueError, match="expected tensors on cpu, found meta"):
        dispatch.choose("logprobs", torch.zeros(1, device="meta"), "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", dispatch.OPS)
def test_missing_gpu_is_named(op, backend):
    reason = dispatch.unavailable(op, backend)
    assert reason
    with pytest.raises(ValueError) as error:
        dispatch.choose(op, torch.zeros(1), backend)
    assert str(error.value) == f"backend={backend!r} cannot run {op}: {reason}"


@native
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_code_that_the_device_cannot_run(monkeypatch):
    """An old driver, or no code for the device, is found before a launch; Triton is next."""
    if not dispatch.native().has_cuda:
        pytest.skip("built without CUDA")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "_reasons", {})
    monkeypatch.setattr(dispatch, "_chosen", {})
    reason = dispatch.unavailable("policy_loss", "cuda")
    assert reason.startswith("CUDA cannot run the extension's kernels here: ") and "CUDA" in reason
    assert spo_kernels.backends()["policy_loss"]["cuda"] == reason
    on_gpu = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    expected = "triton" if importlib.util.find_spec("triton") else "reference"
    assert dispatch.choose("policy_loss", on_gpu) == expected
    with pytest.raises(ValueError, match="here: "):
        dispatch.choose("policy_loss", on_gpu, "cuda")


WITHOUT_NATIVE = """
import sys
sys.modules["spo_kernels._C"] = None  # what importing a module that was not built does
import torch, spo_kernels
from spo_kernels import linear_masked_ppo_loss, masked_ppo_loss, token_logprobs
assert spo_kernels.backends()["policy_loss"]["cpu"].startswith("the native extension")
logits = torch.randn(4, 9, requires_grad=True)
ids, old, advantages = torch.arange(4), torch.full((4,), -2.0), torch.ones(4)
masked_ppo_loss(logits, ids, old, advantages).loss.backward()
assert logits.grad.abs().sum() > 0
want = logits.log_softmax(-1)[range(4), range(4)]
torch.testing.assert_close(token_logprobs(logits, ids), want)
weight = torch.randn(9, 3, requires_grad=True)
linear_masked_ppo_loss(torch.randn(4, 3), weight, ids, old, advantages).loss.backward()
assert weight.grad.abs().sum() > 0
try:
    masked_ppo_loss(logits, ids, old, advantages, backend="cpu")
except ValueError as error:
    assert "the native extension" in str(error)
else:
    raise AssertionError("backend='cpu' fell back")
"""


def test_without_native_code():
    subprocess.run([sys.executable, "-c", WITHOUT_NATIVE], check=True, timeout=120)


@native
@on_cpu_tensors
def test_cpu_isa_can_be_chosen(monkeypatch):
    """Every instruction set gives the same gradient; one that is not here is refused by name."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 300, generator=generator)
    advantages = torch.randn(5, generator=generator)
    grads = []
    for isa in ("portable", "avx2", "avx512"):
        monkeypatch.setenv("SPO_CPU_ISA", isa)
        leaf = logits.clone().requires_grad_()
        try:
            out = spo_kernels.masked_ppo_loss(
                leaf, torch.arange(5), torch.full((5,), -5.0), advantages, backend="cpu"
            )
        except RuntimeError as error:
            assert isa != "portable" and f"SPO_CPU_ISA={isa}: this processor" in str(error)
            continue
        assert dispatch.native().cpu_isa() == isa
        out.loss.backward()
        grads.append(leaf.grad)
    for grad in grads:
        torch.testing.assert_close(grad, grads[0], rtol=1e-5, atol=1e-7)
    monkeypatch.setenv("SPO_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match="must be avx512, avx2 or portable, found 'sse9'"):
        dispatch.native().cpu_isa()


FORK = """
import os, torch
from spo_kernels import token_logprobs
torch.set_num_threads(2)
logits, ids = torch.randn(64, 70000), torch.arange(64)
want = token_logprobs(logits, ids)
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(token_logprobs(logits, ids), want) else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_threads_after_fork():
    """The pool's threads are gone in a forked child (a DataLoader worker); it starts its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FORK], check=True, timeout=120, env=environment)
