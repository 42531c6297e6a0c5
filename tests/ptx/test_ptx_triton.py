"""The PTX that Triton makes of its kernels for sm_90, over whole calls, against the reference."""

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import ptx_triton  # noqa: E402
from ptx_cases import (  # noqa: E402
    compare_logprobs,
    compare_loss,
    compare_segments,
    compare_trees,
    on_cpu_tensors,
)
from ptx_machine import ORDERS  # noqa: E402

from spo_kernels import linear_masked_ppo_loss  # noqa: E402
from spo_kernels.testing import assert_as_good_as_torch, loss_inputs  # noqa: E402
from spo_kernels.triton import scale  # noqa: E402

compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or not ptx_triton.SPECIALISES,
    reason="Triton interprets its kernels, or has no functions for what a launch specialises",
)
pytestmark = [compiles, on_cpu_tensors]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def ran(monkeypatch):
    return ptx_triton.install(monkeypatch)


SIZES = [(5, 1031), (1, 31), (5, 1)]  # a launch makes a constant of a size of 1


@pytest.mark.parametrize(
    ("dtype", "rows", "vocab"),
    [
        pytest.param(dtype, *sizes, marks=[] if i == k else [pytest.mark.slow])
        for i, dtype in enumerate(DTYPES)
        for k, sizes in enumerate(SIZES)
    ],
)
def test_loss(ran, dtype, rows, vocab):
    inputs = loss_inputs(rows, vocab, dtype, kept=1.0, seed=rows)
    compare_loss("triton", inputs, entropy=vocab == 31)
    assert set(ran) == {"prepare_kernel", "policy_loss_kernel", "finish_kernel"}


def test_loss_options(ran):
    inputs = loss_inputs(5, 300, kept=1.0)
    options = {"entropy_coef": 0.01, "logit_softcap": 3.0, "kl_estimator": "k2", "kl_ratio": True}
    compare_loss("triton", inputs, metrics=True, **options)
    compare_loss("triton", inputs, grad=False)


@pytest.mark.parametrize("rows", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_loss_from_hidden_states(ran, rows):
    """The kernels then gather the used tokens, and write a bf16 gradient of fp32 logits."""
    inputs, g = loss_inputs(rows, 33, kept=1.0), torch.Generator().manual_seed(1)
    given: dict[str, Any] = {"loss_mask": torch.ones(rows, dtype=torch.bool), "kl_coef": 0.1}
    given |= {"ref_logprobs": inputs.ref_logprobs, "token_ids": inputs.token_ids}
    given |= {"old_logprobs": inputs.old_logprobs, "advantages": inputs.advantages}
    grads = []
    for backend, dtype in (("triton", DTYPES[1]), ("reference", DTYPES[1]), ("reference", None)):
        hidden, weight = (torch.randn(n, 16, generator=g.manual_seed(n)) / 3 for n in (rows, 33))
        h, w = (x.to(DTYPES[1]).to(dtype or torch.float64) for x in (hidden, weight))
        h, w = h.requires_grad_(), w.requires_grad_()
        found = linear_masked_ppo_loss(h, w, **given, backend=backend)
        found.loss.backward()
        grads.append([h.grad, w.grad])
    for name, triple in zip(("dhidden", "dweight"), zip(*grads, strict=True), strict=True):
        assert_as_good_as_torch(name, *triple)
    assert "policy_loss_kernel" in ran


@pytest.mark.parametrize(("dtype", "softcap"), [(DTYPES[0], None), (DTYPES[1], 3.0)])
def test_logprobs(ran, dtype, softcap):
    compare_logprobs("triton", dtype, softcap)
    assert set(ran) == {"logprobs_kernel", "logprobs_backward_kernel"}


def test_scale(ran):
    before = torch.randn(3, 1031, generator=torch.Generator().manual_seed(6))
    grad = before.clone()
    scale.scale(grad=grad, factor=torch.tensor(0.3), unscale=torch.tensor(0.5))
    torch.testing.assert_close(grad, before * (0.3 * 0.5), rtol=1e-6, atol=0)
    assert ran == ["scale_kernel"]


def test_segments(ran):
    compare_segments("triton", [0, 3, 0], [1200, 2, 40])
    assert "write_segments_kernel" in ran


def test_trees(ran):
    compare_trees("triton", 300)
    assert "climb_kernel" in ran


def test_orders(monkeypatch):
    for order in ORDERS[1:3]:
        with monkeypatch.context() as patched:
            ptx_triton.install(patched, order)
            compare_loss("triton", loss_inputs(2, 1031, kept=1.0))
            compare_trees("triton", 40)
