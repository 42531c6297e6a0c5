"""The PTX interpreter on kernels of a few lines: it computes, and refuses what a GPU would."""

from fractions import Fraction

import numpy as np
import pytest
from ptx_compile import Compiler
from ptx_machine import Machine
from ptx_memory import Global
from ptx_program import PtxError, read_kernel
from ptx_values import fma32, fma32_down, fma64

HEAD = """
.version 9.0
.target sm_90
.address_size 64
.extern .shared .align 16 .b8 memory[];
.entry k(
    .param .u64 k_param_0
)
{
    .reg .pred %p<9>;
    .reg .b32 %r<9>;
    .reg .b64 %rd<9>;
"""
STORE = """
    ld.param.u64 %rd1, [k_param_0];
    mul.wide.u32 %rd2, %r1, 4;
    add.s64 %rd3, %rd1, %rd2;
    st.global.u32 [%rd3], %r2;
    ret;
"""


def run(body, threads=64, blocks=1, cluster=1, order="together", size=None):
    """Runs a kernel k(uint32*) of one statement a line; what it leaves in its buffer."""
    kernel = read_kernel(f"{HEAD}{body}\n}}\n", "k")
    memory = Global(1 << 16)
    begin = memory.allocate(4 * threads if size is None else size)
    params = np.array([begin], np.int64).view(np.uint8)
    shape = {"shared_bytes": 1024, "cluster": cluster, "params": params, "order": order}
    Machine(kernel, memory, blocks, threads, **shape).run(*Compiler(kernel).compile())
    return memory.bytes[begin : begin + 4 * threads].view(np.uint32)


def test_threads_part_and_meet():
    """An odd thread adds 3 as often as its number says; all then shuffle with their neighbour."""
    found = run(f"""
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, 7;
    and.b32 %r3, %r1, 1;
    setp.eq.s32 %p1, %r3, 0;
    @%p1 bra $L__BB0_2;
    mov.u32 %r4, 0;
$L__BB0_1:
    add.s32 %r2, %r2, 3;
    add.s32 %r4, %r4, 1;
    setp.lt.u32 %p2, %r4, %r1;
    @%p2 bra $L__BB0_1;
$L__BB0_2:
    shfl.sync.bfly.b32 %r2|%p3, %r2, 1, 31, -1;
    {STORE}""")
    other = np.arange(64) ^ 1
    assert found.tolist() == np.where(other % 2, 7 + 3 * other, 7).tolist()


LOADED = "mov.u32 %r1, %tid.x; mov.u32 %r5, memory; ld.shared.u32 %r2, [%r5];"
HALF = "mov.u32 %r1, %tid.x; mov.u32 %r2, 0; setp.lt.u32 %p1, %r1, 40; @%p1 bra $L__BB0_1;"
REFUSED = {
    "unknown": ("tanh.approx.f32 %r1, %r2; ex3.f32 %r1, %r2;", r"tanh\S+ \(line 13\), ex3.f32"),
    "unwritten shared": (LOADED + STORE, "nothing has written"),
    "no shared there": (LOADED.replace("[%r5]", "[%r5+1024]") + STORE, "in no buffer of shared"),
    "misaligned": (LOADED.replace("[%r5]", "[%r5+2]") + STORE, "not aligned to 4"),
    "half a barrier": (HALF + "bar.sync 0;$L__BB0_1:\nret;", "never opens"),
    "half a warp": (HALF + "bar.warp.sync -1;$L__BB0_1:\nret;", "wait for what never comes"),
    "no mbarrier": ("mbarrier.arrive.expect_tx.shared::cta.b64 _, [memory], 16;ret;", "no mbarr"),
    "beyond": ("mov.u32 %r1, %tid.x; mov.u32 %r2, 1; add.s32 %r1, %r1, 1;" + STORE, "no buffer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    body, message = REFUSED[name]
    with pytest.raises(PtxError, match=message):
        run(body.replace("; ", ";\n").replace(";$", ";\n$"))


def test_fused_multiply_add_rounds_once():
    """Against exact fractions: random numbers, ties and results below the normal range."""
    g = np.random.default_rng(0)
    a, b, c = (g.standard_normal((3, 4000)) * 2.0 ** g.integers(-75, 9, (3, 4000))).astype("f4")
    c[:2000] = (-a.astype("f8") * b)[:2000] * (1 + 2.0 ** -g.integers(1, 40, 2000))
    c[2000:3000] = (a * b * np.float32(2.0**-24))[2000:3000]
    with np.errstate(all="ignore"):
        nearest, down = fma32(a, b, c), fma32_down(a, b, c)
    for row in zip(a, b, c, nearest, down, strict=True):
        x, y, z, near, low = (Fraction(float(v)) for v in row)
        exact = x * y + z
        above = np.nextafter(row[4], np.float32(np.inf))
        assert low <= exact and (low == exact or Fraction(float(above)) > exact)
        ends = [low, Fraction(float(above))]
        assert abs(near - exact) == min(abs(end - exact) for end in ends)
        if abs(exact - ends[0]) == abs(ends[1] - exact):
            assert np.float32(row[3]).view(np.uint32) % 2 == 0
    assert fma64(np.float64(1 + 2**-52), np.float64(1 - 2**-52), np.float64(-1)) == -(2.0**-104)
