"""The PTX of the kernels for log-probabilities, segments and trees, against the references."""

import pytest
import torch
from ptx_cases import compare_logprobs, compare_segments, compare_trees, needs_nvcc, on_cpu_tensors
from ptx_device import Device
from ptx_machine import ORDERS

from spo_kernels import cutpoint_segments, dispatch, head, linear_token_logprobs, tree_values
from spo_kernels.testing import assert_as_good_as_torch

pytestmark = [needs_nvcc, on_cpu_tensors]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def device(monkeypatch):
    return Device().install(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logprobs(device, dtype, softcap):
    compare_logprobs("cpu", dtype, softcap)
    capped = "_capped" if softcap else ""
    expected = {f"logprobs_forward{capped}", f"logprobs_backward{capped}"}
    assert {name.split("<")[0] for name in device.ran} == expected


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logprobs_from_hidden_states(device, softcap, monkeypatch):
    """The backward then writes a bf16 gradient of fp32 logits: beside them, as on a GPU.

    The CPU's sweep may write it over them, behind what it has read; a GPU's threads may not.
    """
    beside = lambda logits, *_: torch.empty(logits.shape, dtype=torch.bfloat16)  # noqa: E731
    monkeypatch.setattr(head, "gradient_buffer", beside)
    g, grads = torch.Generator().manual_seed(7), []
    hidden, weight = (torch.randn(n, 16, generator=g).bfloat16() for n in (5, 33))
    ids = torch.randint(33, (5,), generator=g)
    for backend, dtype in (("cpu", None), ("reference", None), ("reference", torch.float64)):
        h, w = (x.to(dtype or x.dtype, copy=True).requires_grad_() for x in (hidden, weight))
        options = {"logit_softcap": softcap, "backend": backend}
        linear_token_logprobs(h, w, ids, **options).sum().backward()
        grads.append((h.grad, w.grad))
    for name, triple in zip(("dhidden", "dweight"), zip(*grads, strict=True), strict=True):
        assert_as_good_as_torch(name, *triple)
    capped = "_capped" if softcap else ""
    assert device.ran[-1] == f"logprobs_backward{capped}<float, BFloat16>"


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(device, dtype):
    """In place, of rows of any alignment; a factor of 1 changes nothing."""
    before = torch.randn(3, 1031, generator=torch.Generator().manual_seed(6)).to(dtype)
    for factor, unscale in ((0.3, None), (0.5, 2.0), (3.0, 0.25)):
        grad = before.clone()
        given = [None if x is None else torch.tensor(x) for x in (factor, unscale)]
        dispatch.launch(
            "scale", "cpu", "ScaleArgs", rows=3, vocab=1031, grad=grad, layout=(1, 1031, 0),
            dtype=DTYPES.index(dtype), factor=given[0], unscale=given[1],
        )  # fmt: skip
        want = (before.float() * (factor * (unscale or 1))).to(dtype)
        torch.testing.assert_close(grad, want, rtol=2**-7 if dtype.itemsize == 2 else 1e-6, atol=0)


@pytest.mark.parametrize("order", ORDERS)
def test_segments(device, order):
    device.orders["segments"] = order
    several = ([1], [0, 3, 0], [700, 2, 40]) if order == "together" else ([40, 2],)
    compare_segments("cpu", *several)
    assert {"count_segments", "write_segments", "advance_tokens"} <= set(device.ran)


@pytest.mark.parametrize("order", ORDERS)
def test_tree(device, order):
    """Values climb by whichever thread comes last, so all orders must agree with the reference."""
    device.orders["tree"] = order
    compare_trees("cpu", 300)
    assert {"climb", "write_stats", "sum_children", "check_parents"} <= set(device.ran)


def test_bad_input_is_found(device):
    """Its kernels then write NaN or nothing, and the reference names what is wrong."""
    offsets = torch.tensor([0, 5, 3, 9])
    with pytest.raises(ValueError, match="5 then 3"):
        cutpoint_segments(torch.zeros(9), offsets, backend="cpu")
    parent = torch.tensor([-1, 0, 2, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"parent\[2\]"):
        tree_values(parent, torch.zeros(4), torch.ones(4, dtype=torch.bool), backend="cpu")
    assert device.ran.count("climb") == device.ran.count("write_segments") == 1
