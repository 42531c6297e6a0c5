"""Hooks, attributes, versions and the changelog agree with each other and with what they name."""

import importlib.metadata
import re
import runpy
import shlex
import subprocess
from datetime import date
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import spo
import spo_kernels

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
HOOKS = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
TOOLS = ("ruff", "clang-format", "pyright")


def version():
    return re.search(r'^version = "(.*)"$', PROJECT, re.MULTILINE)[1]


def lint_commands():
    """Tool and options of every line of `make lint`, without its files."""
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    lines = [line.replace("$(BIN)/", ".venv/bin/") for line in recipe.splitlines()]
    return [re.sub(r" (\.|\$\$\(.*\))$", "", line.strip()) for line in lines]


def hooks():
    return {hook["id"]: hook for repo in HOOKS["repos"] for hook in repo["hooks"]}


def test_hooks_run_what_make_lint_runs():
    entries = [hook["entry"].replace(" --force-exclude", "") for hook in hooks().values()]
    assert sorted(e for e in entries if "tools/" not in e) == sorted(lint_commands())
    assert len(lint_commands()) == 4


def test_hooks_fetch_nothing_and_pyright_waits_for_the_push():
    assert {repo["repo"] for repo in HOOKS["repos"]} == {"local"}
    assert {hook["language"] for hook in hooks().values()} == {"system"}
    assert hooks()["pyright"]["stages"] == ["pre-push"] and HOOKS["default_stages"] == [
        "pre-commit"
    ]
    assert set(HOOKS["default_install_hook_types"]) == {"pre-commit", "pre-push"}


def test_clang_format_sees_the_files_that_make_lint_names():
    pattern = re.compile(hooks()["clang-format"]["files"])
    native = [p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()]
    lint = re.findall(r"'csrc/\*(\.\w+)'", (ROOT / "Makefile").read_text())
    assert {name for name in native if pattern.search(name)} == {
        name for name in native if Path(name).suffix in lint
    }


@pytest.mark.parametrize("tool", TOOLS)
def test_the_tools_are_those_that_pyproject_pins(tool):
    """The hooks and `make lint` run what is installed here."""
    (pin,) = re.findall(rf'^    "({tool}(?:\[\w+\])?==[\d.*]+)",', PROJECT, re.MULTILINE)
    requirement = Requirement(pin)
    assert importlib.metadata.version(requirement.name) in requirement.specifier


def test_large_files_are_refused(tmp_path, capsys):
    entry = shlex.split(hooks()["file-sizes"]["entry"])[-1]
    main = runpy.run_path(str(ROOT / entry))["main"]
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(bytes(500_000))
    large.write_bytes(bytes(500_001))
    assert main([str(small)]) == 0 and capsys.readouterr().out == ""
    assert main([str(small), str(large)]) == 1
    assert f"{large}: expected at most 500,000 bytes, found 500,001" in capsys.readouterr().out


def tracked():
    """Names of the files in the repository; skips where there is none."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not a git repository: a source archive")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_no_file_of_the_repository_is_too_large():
    main = runpy.run_path(str(ROOT / "tools" / "file_sizes.py"))["main"]
    left_out = re.compile(hooks()["file-sizes"]["exclude"])
    assert main([str(ROOT / name) for name in tracked() if not left_out.search(name)]) == 0


def test_text_ends_its_lines_alike_and_generated_files_are_marked():
    names = tracked()
    command = ["git", "check-attr", "--stdin", "-z", "text", "eol", "diff", "linguist-generated"]
    given = "\0".join(names).encode()
    answer = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, check=True)
    parts = answer.stdout.decode().split("\0")
    attributes = {}
    for name, key, value in zip(parts[0::3], parts[1::3], parts[2::3], strict=False):
        attributes.setdefault(name, {})[key] = value
    made = re.compile(r"docs/.*\.svg$|benchmarks/(results|policies)/|spo/assets/")
    for name in names:
        found, data = attributes[name], (ROOT / name).read_bytes()
        assert b"\r\n" not in data or name.endswith(".safetensors"), name
        assert (found["text"] == "unset") == (b"\0" in data), name
        assert found["eol"] == "lf", name
        generated = found["linguist-generated"] == "set"
        assert generated == bool(made.match(name)), name
        assert (found["diff"] == "unset") == (generated or name.endswith(".safetensors")), name


def test_one_version_everywhere():
    assert spo.__version__ == version()
    if "not installed" in spo_kernels.__version__:
        pytest.skip(spo_kernels.__version__)
    assert spo_kernels.__version__ == version()


def test_the_changelog_has_an_unreleased_section_and_dated_versions():
    first, *versions = re.findall(r"^## (.*)$", CHANGELOG, re.MULTILINE)
    assert first == "Unreleased" and versions
    found = [re.fullmatch(r"(\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)", line) for line in versions]
    assert all(found), versions
    numbers = [tuple(map(int, match[1].split("."))) for match in found]
    dates = [date.fromisoformat(match[2]) for match in found]
    assert found[0][1] == version()
    assert numbers == sorted(set(numbers), reverse=True) and dates == sorted(dates, reverse=True)


def test_what_contributing_calls_public_is_there():
    page = (ROOT / "CONTRIBUTING.md").read_text()
    for package in (spo, spo_kernels):
        assert f"`{package.__name__}.__all__`" in page
        assert set(package.__all__) <= set(dir(package))
