"""The CUDA kernels in the built extension: there for every architecture, and nothing spills."""

import json
import re
import runpy
import subprocess
from pathlib import Path

import pytest

from spo_kernels import dispatch

ROOT = Path(__file__).resolve().parents[2]
ROW_KERNELS = ("policy_loss_held", "policy_loss_streamed", "logprobs_forward")
ROW_KERNELS += ("logprobs_backward", "scale_rows")
ROW_KERNELS += ("logprobs_forward_capped", "logprobs_backward_capped")
PACKED_KERNELS = ("write_segments", "advance_tokens", "climb", "write_stats", "advance_nodes")


COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "registers.json").read_text())
SCRIPT = ROOT / "csrc" / "cuda" / "resources.py"
script = runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def extension():
    if dispatch._C is None or not dispatch._C.has_cuda:
        pytest.skip("the native extension was built without CUDA: nvcc was not found")
    return Path(dispatch._C.__file__)


@pytest.fixture(scope="module")
def kernels(extension):
    cuobjdump = script["find_cuobjdump"]()
    if cuobjdump is None:
        pytest.skip("cuobjdump is not on PATH, in CUDA_HOME or in the Triton package")
    return script["kernels"](extension, cuobjdump)


def test_every_architecture_has_every_kernel(kernels):
    archs = {kernel.arch for kernel in kernels}
    assert archs
    expected = {f"{name}<{t}>" for name in ROW_KERNELS for t in ("float", "BFloat16", "Float16")}
    narrowing = ("policy_loss_held", "policy_loss_streamed", "logprobs_backward")
    narrowing += ("logprobs_backward_capped",)
    expected |= {f"{name}<float, {t}>" for name in narrowing for t in ("BFloat16", "Float16")}
    expected |= set(PACKED_KERNELS) | {"prepare_tokens", "finish_tokens"}
    for arch in archs:
        assert expected <= {kernel.name for kernel in kernels if kernel.arch == arch}, arch


def test_nothing_spills(kernels):
    spilling = [kernel for kernel in kernels if kernel.stack or kernel.local]
    assert not spilling


# What the sweeps of a kernel must hold: whole 16-byte granules, copied in bulk or loaded, stored.
STORE = r"STG\.E\.(128|64)"  # half as wide where fp32 becomes bf16 or fp16
SWEEPS = {
    "policy_loss_held": (r"UBLKCP", r"LDS\.128", STORE),
    "policy_loss_streamed": (r"LDG\.E\.128", STORE),
    "logprobs_forward": (r"LDG\.E\.128",),
    "logprobs_backward": (r"LDG\.E\.128", STORE),
    "scale_rows": (r"LDG\.E\.128", STORE),
}


def test_sweeps_move_16_bytes(extension, kernels):
    """In the machine code for Hopper; later ones have other instructions. No local memory."""
    if not any(kernel.arch == "sm_90" for kernel in kernels):
        pytest.skip("not built for sm_90")
    command = [script["find_cuobjdump"](), "-sass", "-arch", "sm_90", str(extension)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    bodies = {}
    for part in listing.split("Function : ")[1:]:
        name, _, body = part.partition("\n")
        bodies.setdefault(next((k for k in SWEEPS if k in name), ""), []).append(body)
    for kernel, instructions in SWEEPS.items():
        assert len(bodies[kernel]) >= 3
        for body in bodies[kernel]:
            assert not re.search(r"\b(LDL|STL)\b", body), f"{kernel} uses local memory"
            missing = [i for i in instructions if not re.search(i, body)]
            assert not missing, f"{kernel} has no {missing}"


def test_three_blocks_of_the_held_row_share_a_multiprocessor(kernels):
    held = [k for k in kernels if k.name.startswith("policy_loss_held") and k.arch != "sm_80"]
    assert held or {kernel.arch for kernel in kernels} == {"sm_80"}
    for kernel in held:
        # 16: the kernel is compiled empty where there are no clusters, and would pass all else.
        assert 16 < kernel.registers <= 65536 // (3 * 512) // 8 * 8, kernel
        assert kernel.shared <= 1024, kernel  # what the system takes


def test_the_committed_registers_are_those_of_the_build(kernels, extension):
    """Those of the same compiler; another one allocates registers in its own way."""
    compiler = script["compiler"](extension)
    if compiler != COMMITTED["compiler"]:
        pytest.skip(f"built by nvcc {compiler}, registers.json is of {COMMITTED['compiler']}")
    archs = {kernel.arch for kernel in kernels}
    committed = {(row["name"], row["arch"]): row["registers"] for row in COMMITTED["kernels"]}
    built = {(kernel.name, kernel.arch): kernel.registers for kernel in kernels}
    same = script["sources_hash"]() == COMMITTED["sources"]
    how = "the sources are those of registers.json" if same else "the sources have changed since"
    how += (
        f": python {SCRIPT.relative_to(ROOT)} {extension} --json benchmarks/results/registers.json"
    )
    assert {key for key in committed if key[1] in archs} == built.keys(), how
    more = {key: used for key, used in built.items() if used > committed[key]}
    assert not more, f"more registers than in registers.json; {how}"


def test_the_page_names_the_committed_maxima():
    page = (ROOT / "docs" / "kernels.md").read_text()
    (shown,) = re.findall(r"gives a thread at most (.*?), and no kernel", page, re.DOTALL)
    most = {
        arch: max(row["registers"] for row in COMMITTED["kernels"] if row["arch"] == arch)
        for arch in COMMITTED["archs"]
    }
    assert {arch: int(used) for used, arch in re.findall(r"(\d+)\D*? on (sm_\w+)", shown)} == most
    assert not any(row["stack"] or row["local"] for row in COMMITTED["kernels"])
    assert f"nvcc {COMMITTED['compiler'].split()[1].rstrip(',')}" in page


def test_json_holds_every_row(tmp_path):
    rows = [
        script["Kernel"]("climb", "sm_80", 29, 0, 0, 0),
        script["Kernel"]("x<float>", "sm_80", 4, 0, 0, 0),
    ]
    extension = tmp_path / "_C.so"
    extension.write_bytes(b"\0Cuda compilation tools, release 13.0, V13.0.88\0")
    script["write_json"](tmp_path / "r.json", extension, rows)
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["kernels"] == [row._asdict() for row in rows]
    assert written["compiler"] == "release 13.0, V13.0.88" and written["archs"] == ["sm_80"]
    assert len(written["sources"]) == 64 and written["date"] and written.keys() == COMMITTED.keys()
    extension.write_bytes(b"no note")
    assert script["compiler"](extension) is None


def test_comments_are_no_part_of_the_sources_hash(tmp_path, monkeypatch):
    source = tmp_path / "a.cu"
    monkeypatch.setitem(script["sources_hash"].__globals__, "sources", lambda: [source])
    hashes = []
    for code in ("int x = 1;", "// one\nint x  = 1;  /* two */ \\\n", "int x = 2;"):
        source.write_text(code)
        hashes.append(script["sources_hash"]())
    assert hashes[0] == hashes[1] != hashes[2]
