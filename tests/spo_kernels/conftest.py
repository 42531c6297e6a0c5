"""Tests of kernels run on the CPU backend; SPO_TEST_BACKEND=cuda or triton runs them on a GPU."""

import pytest

from spo_kernels.testing import DEVICE


@pytest.fixture(autouse=True, scope="session")
def default_device():
    if DEVICE.type == "cpu":
        yield
        return
    with DEVICE:
        yield
