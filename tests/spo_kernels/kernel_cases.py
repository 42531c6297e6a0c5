"""What the tests of several kernels share."""

import os

import pytest
import torch

from spo_kernels.dispatch import unavailable
from spo_kernels.testing import FAST, assert_as_good_as_torch

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETED = FAST == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
FIGURES = ("loss", "policy_loss", "kl", "clipfrac", "ratio_mean", "logprobs", "entropy")
slow_if_interpreted = pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter takes minutes")


def examples(number):
    """How many examples a property is tried on: a tenth in Triton's interpreter."""
    return number // 10 if INTERPRETED else number


def needs_fast(op):
    """The mark of a test that runs the fast backend of an op."""
    reason = unavailable(op, FAST)
    return pytest.mark.skipif(bool(reason), reason=reason)


def backends_of(op):
    """Parameters of a test that runs on the fast backend and on the reference."""
    return [pytest.param(FAST, marks=needs_fast(op)), "reference"]


def assert_figures_as_good(got, same, oracle):
    """The records of a loss from a kernel, from PyTorch in the same dtype and in fp64."""
    for name in FIGURES:
        triple = [getattr(record, name) for record in (got, same, oracle)]
        if triple[0] is not None:
            assert triple[0].dtype == torch.float32
            summed = 1.0 if triple[0].ndim == 0 else 0.0  # terms of order one that may cancel
            assert_as_good_as_torch(name, *triple, scale=summed)
    assert got.num_kept == oracle.num_kept


def assert_compiles(step, *tensors):
    """One graph, and the values and gradients of eager mode; `step` returns the loss first."""
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in tensors]
        loss, *others = function(*leaves)
        loss.backward()
        results.append([loss.detach(), *others, *(x.grad for x in leaves)])
    torch.testing.assert_close(results[1], results[0])
