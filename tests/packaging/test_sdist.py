"""What the source archive and a wheel hold, and how a build without a compiler ends."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEFT = shutil.ignore_patterns(
    "[.]git", "[.]venv", "build", "dist", "runs", "*.egg-info", "[.]*_cache"
)


def backend(hook: str, source: Path, out: Path, **environment: str) -> subprocess.CompletedProcess:
    """Call a hook of the build backend as pip does, on what is installed here."""
    code = f"import sys, setuptools.build_meta as b; b.{hook}(sys.argv[1])"
    return subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=source,
        text=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """The archive of a copy, since an earlier build's list of files would be read again."""
    copy, out = tmp_path_factory.mktemp("copy") / "tree", tmp_path_factory.mktemp("out")
    shutil.copytree(ROOT, copy, ignore=LEFT)
    result = backend("build_sdist", copy, out)
    assert result.returncode == 0, result.stderr
    (path,) = out.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def unpacked(archive, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="module")
def pure_wheel(unpacked, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    result = backend("build_wheel", unpacked, out, SPO_BUILD_NATIVE="0")
    assert result.returncode == 0, result.stderr
    (path,) = out.glob("*.whl")
    return path


def files_below(folder: Path) -> set[str]:
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return {name for name in found if "__pycache__" not in name and not name.endswith(".so")}


def test_archive_holds_all_that_explains_builds_and_tests(archive, unpacked):
    there = files_below(unpacked)
    for folder in ("csrc", "docs", "examples", "spo", "spo_kernels", "tests", "tools"):
        wanted = {f"{folder}/{name}" for name in files_below(ROOT / folder)}
        assert wanted - there == set()
    top = "README.md CHANGELOG.md CONTRIBUTING.md LICENSE Makefile CMakeLists.txt setup.py .ci/run"
    assert set(top.split()) <= there
    assert sum(name.endswith(".yaml") and "recipes/" in name for name in there) > 10
    assert any(name.startswith("benchmarks/results/") for name in there)
    assert not any(name.startswith("benchmarks/policies/") for name in there)
    assert archive.stat().st_size < 6e6


def test_metadata(unpacked):
    fields = Parser().parsestr((unpacked / "PKG-INFO").read_text())
    assert fields["Author"] and fields["Keywords"] and fields["License-Expression"] == "Apache-2.0"
    urls = dict(line.split(", ") for line in fields.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Issues", "Changelog", "Paper"} <= set(urls)
    for minor in range(10, 14):
        line = f"Programming Language :: Python :: 3.{minor}"
        assert line in fields.get_all("Classifier")
    always = [line for line in fields.get_all("Requires-Dist") if "extra ==" not in line]
    assert {re.match(r"[\w-]+", line).group() for line in always} == {"torch", "numpy"}


def test_pure_wheel_serves_every_python_and_holds_the_data(pure_wheel, unpacked):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(pure_wheel) as wheel:
        names = set(wheel.namelist())
        (entry,) = (n for n in names if n.endswith("entry_points.txt"))
        assert "spo = spo.__main__:main" in wheel.read(entry).decode()
    for package in ("spo", "spo_kernels"):
        wanted = {f"{package}/{name}" for name in files_below(unpacked / package)}
        assert wanted - names == set()
    assert "spo/py.typed" in names


def test_pure_wheel_runs_on_the_reference(pure_wheel, tmp_path):
    with zipfile.ZipFile(pure_wheel) as wheel:
        wheel.extractall(tmp_path)
    code = """
import sys; sys.path[:0] = sys.argv[1:]
import torch, spo_kernels
assert spo_kernels.__file__.startswith(sys.argv[1])
assert "was not found" in spo_kernels.backends()["tree"]["cpu"]
values = spo_kernels.tree_values(
    torch.tensor([-1, 0, 0], dtype=torch.int32),
    torch.tensor([torch.nan, 1.0, 0.0]),
    torch.ones(3, dtype=torch.bool),
)
assert values.tolist() == [0.5, 1.0, 0.0]
"""
    # Without `site` the extension of an editable installation is not found.
    packages = sysconfig.get_path("purelib")
    command = [sys.executable, "-I", "-S", "-c", code, str(tmp_path), packages]
    result = subprocess.run(command, text=True, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "tools, why",
    [
        (["cmake", "ninja"], "cmake could not configure them"),
        ([], "cmake is missing"),
    ],
)
def test_without_a_compiler_the_last_line_says_what_to_do(unpacked, tmp_path, tools, why):
    pytest.importorskip("pybind11")
    path = tmp_path / "bin"
    path.mkdir()
    for tool in tools:
        found = shutil.which(tool, path=Path(sys.executable).parent) or shutil.which(tool)
        (path / tool).symlink_to(found)
    result = backend("build_wheel", unpacked, tmp_path, PATH=str(path), CXX="", CUDA_HOME="")
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert last.startswith("spo_kernels: the native kernels were not built, since ") and why in last
    assert "SPO_BUILD_NATIVE=0" in last


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform != "linux", reason="auditwheel repairs wheels of Linux")
def test_a_repaired_wheel_runs_in_a_fresh_environment(tmp_path):
    pytest.importorskip("auditwheel")
    command = [sys.executable, ROOT / "tools" / "wheels.py", "--out", tmp_path, sys.executable]
    result = subprocess.run(command, text=True, capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert f"cp3{sys.version_info.minor}-manylinux" in wheel.name
    assert "ran: extension, package" in result.stdout
