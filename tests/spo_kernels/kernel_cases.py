"""What the tests of several kernels share."""

import math
import os

import pytest
import torch

from spo_kernels.dispatch import unavailable
from spo_kernels.objective import FIGURES as SUMS
from spo_kernels.testing import DEVICE, FAST, assert_as_good_as_torch
from spo_kernels.tokens import TYPES, Tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# A backend that cannot run the tensors of these tests.
ELSEWHERE = "cpu" if DEVICE.type == "cuda" else "cuda"
INTERPRETED = FAST == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
FIGURES = ("loss", *SUMS, "logprobs", "entropy")
on_cpu_tensors = pytest.mark.skipif(DEVICE.type != "cpu", reason="it is about CPU tensors")
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
    assert got.num_kept == oracle.num_kept and got.num_nan == oracle.num_nan


def assert_compiles(step, *tensors):
    """One graph, and the values and gradients of eager mode; `step` returns the loss first."""
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in tensors]
        loss, *others = function(*leaves)
        loss.backward()
        results.append([loss.detach(), *others, *(x.grad for x in leaves)])
    torch.testing.assert_close(results[1], results[0], equal_nan=True)


def tokens_from(inputs, **changes):
    """`Tokens` of all rows of `LossInputs`: nothing masked, no KL term, one temperature."""
    fields = dict.fromkeys(TYPES) | {
        **{name: getattr(inputs, name) for name in ("token_ids", "old_logprobs", "advantages")},
        **{"temperature_value": 1.0, "policy_norm_value": -1.0, "kl_norm_value": -1.0},
        **{
            "logit_scale": 1.0,
            "logit_softcap": math.inf,
            "log_threshold": math.inf,
            "clip_eps_low": 0.2,
            "clip_eps_high": 0.2,
        },
        **{"clip_ratio_max": math.inf, "log_ratio_clamp": 10.0, "kl_coef": 0.0, "kl_clamp": 10.0},
        **{"entropy_coef": 0.0, "kl_estimator": 0, "kl_scope": 0, "kl_ratio": False},
        **{"drop_nan": False, "metrics": False},
    }
    return Tokens(**fields | changes)
