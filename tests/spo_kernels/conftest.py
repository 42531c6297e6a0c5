"""Tests of kernels run on the CPU backend; SPO_TEST_BACKEND=cuda or triton runs them on a GPU."""

import pytest

from spo_kernels.dispatch import unavailable
from spo_kernels.testing import DEVICE, FAST


@pytest.fixture(autouse=True, scope="session")
def default_device():
    if DEVICE.type == "cpu":
        yield
        return
    with DEVICE:
        yield


@pytest.fixture(scope="module", params=["reference", FAST])
def backend(request):
    """A backend of the op that the module's OP names."""
    if reason := unavailable(request.module.OP, request.param):
        pytest.skip(reason)
    return request.param
