"""Tests of kernels run on the CPU backend; SPO_TEST_BACKEND=cuda or triton runs them on a GPU."""

import pytest
import torch
from kernel_cases import INTERPRETED

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


def patch_triton_once_a_module():
    """Triton's interpreter patches `tl` again at each call of a device function: 40 % of its time.

    The patch of the kernel that calls it is still in place, and what the call itself adds for the
    names of its module is never taken back.
    """
    from triton.runtime import interpreter

    patched, call = set(), interpreter.InterpretedFunction.__call__

    def call_patched(function, *args, **kwargs):
        names = id(function.fn.__globals__)
        if names not in patched:
            patched.add(names)
            return call(function, *args, **kwargs)
        return function.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call_patched


if INTERPRETED:
    patch_triton_once_a_module()
