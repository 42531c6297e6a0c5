"""The CUDA kernels in the built extension: there for every architecture, and nothing spills."""

import runpy
from pathlib import Path

import pytest

from spo_kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
ROW_KERNELS = ("policy_loss_held", "policy_loss_streamed", "logprobs_forward", "logprobs_backward")
PACKED_KERNELS = ("write_segments", "advance_tokens", "climb", "advance_nodes")


@pytest.fixture(scope="module")
def kernels():
    if dispatch._C is None or not dispatch._C.has_cuda:
        pytest.skip("the native extension was built without CUDA: nvcc was not found")
    script = runpy.run_path(str(ROOT / "csrc" / "cuda" / "resources.py"))
    cuobjdump = script["find_cuobjdump"]()
    if cuobjdump is None:
        pytest.skip("cuobjdump is not on PATH, in CUDA_HOME or in the Triton package")
    return script["kernels"](Path(dispatch._C.__file__), cuobjdump)


def test_every_architecture_has_every_kernel(kernels):
    archs = {kernel.arch for kernel in kernels}
    assert archs
    expected = {f"{name}<{t}>" for name in ROW_KERNELS for t in ("float", "BFloat16", "Float16")}
    expected |= {
        f"{name}<float, BFloat16>"
        for name in ("policy_loss_held", "policy_loss_streamed", "logprobs_backward")
    }
    expected |= set(PACKED_KERNELS)
    for arch in archs:
        assert expected <= {kernel.name for kernel in kernels if kernel.arch == arch}, arch


def test_nothing_spills(kernels):
    spilling = [kernel for kernel in kernels if kernel.stack or kernel.local]
    assert not spilling


def test_three_blocks_of_the_held_row_share_a_multiprocessor(kernels):
    held = [k for k in kernels if k.name.startswith("policy_loss_held") and k.arch != "sm_80"]
    assert held or {kernel.arch for kernel in kernels} == {"sm_80"}
    for kernel in held:
        # 16: the kernel is compiled empty where there are no clusters, and would pass all else.
        assert 16 < kernel.registers <= 65536 // (3 * 512) // 8 * 8, kernel
        assert kernel.shared <= 1024, kernel  # what the system takes
