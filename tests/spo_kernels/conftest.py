"""Tests of kernels run on the CPU backend; SPO_TEST_BACKEND=cuda or triton runs them on a GPU."""

import pytest
import torch

from spo_kernels.dispatch import unavailable
from spo_kernels.testing import DEVICE, FAST

if DEVICE.type != "cpu":  # here, since modules make tensors when they are imported
    torch.set_default_device(DEVICE)


@pytest.fixture(scope="module", params=["reference", FAST])
def backend(request):
    """A backend of the op that the module's OP names."""
    if reason := unavailable(request.module.OP, request.param):
        pytest.skip(reason)
    return request.param
