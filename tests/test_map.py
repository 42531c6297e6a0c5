"""What docs/map.md names in backticks exists: paths, functions, records, targets of make."""

import importlib
import re
import runpy
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "map.md").read_text()
NAMED = list(dict.fromkeys(re.findall(r"`([^`]+)`", PAGE)))
OPTIONAL = {"spo_kernels._C", "benchmarks/policies/"}  # needs a compiler; not in source archives
WRITTEN = {"metrics.jsonl"}  # by a run
FILE = re.compile(r"\.(py|md|h|cpp|cu|cuh|json|svg|yaml)$")


@cache
def words() -> set[str]:
    """Every identifier and option of the packages' Python sources."""
    sources = [
        path for package in ("spo", "spo_kernels") for path in (ROOT / package).rglob("*.py")
    ]
    return set(
        re.findall(r"-{0,2}[A-Za-z_][\w-]*", "\n".join(path.read_text() for path in sources))
    )


def is_there(name: str) -> bool:
    """Whether a path exists; `<op>` and `<device>` stand for any name."""
    pattern = re.sub(r"<\w+>", "*", name.rstrip("/"))
    found = [path for path in ROOT.glob(pattern) if path.is_dir() or not name.endswith("/")]
    return bool(found) and (not name.endswith("/") or all(path.is_dir() for path in found))


def is_bound(name: str) -> bool:
    """Whether a dotted name is a module or something in one."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def kind_of(name: str) -> str:
    if name in OPTIONAL or name in WRITTEN or re.fullmatch(r"<\w+>", name):
        return "free"
    if name.startswith("make "):
        return "target"
    if "/" in name or FILE.search(name):
        return "path"
    return "dotted" if re.match(r"(spo|spo_kernels)\.", name) else "word"


@pytest.mark.parametrize("name", [name for name in NAMED if kind_of(name) != "free"])
def test_what_the_map_names_exists(name):
    kind = kind_of(name)
    if kind == "target":
        make = ["make", "-C", str(ROOT), "--dry-run", "--question", name.split()[1]]
        answer = subprocess.run(make, capture_output=True, text=True)
        assert "No rule to make target" not in answer.stderr, name
    elif kind == "path":
        assert is_there(name), f"docs/map.md names {name}, which is not there"
    elif kind == "dotted":
        assert is_bound(name), f"docs/map.md names {name}, which cannot be found"
    else:
        assert name in words() or is_bound(name), f"docs/map.md names {name}, which no source does"


def test_every_room_has_its_place():
    """No folder or module at the top of the packages is left out, and no folder of benchmarks."""
    for package in ("spo", "spo_kernels", "csrc", "benchmarks"):
        for path in (ROOT / package).iterdir():
            if path.is_dir() and path.name != "__pycache__":
                assert f"`{package}/{path.name}/" in PAGE, path.name
    for path in (ROOT / "spo").glob("*.py"):
        assert path.name == "__init__.py" or f"`spo/{path.name}`" in PAGE, path.name


def test_the_rooms_stand_in_the_order_of_imports():
    rank = runpy.run_path(str(ROOT / "tests" / "spo" / "test_imports.py"))["RANK"]
    (table,) = re.findall(r"\| files \|.*?\n\n", PAGE, re.DOTALL)
    named = [name.removesuffix(".py") for name in re.findall(r"`spo/(\w+(?:\.py)?)[`/]", table)]
    rooms = [room for room in dict.fromkeys(named) if room in rank]
    assert set(rooms) == set(rank)
    assert [rank[room] for room in rooms] == sorted(rank.values())


def test_short():
    assert len(PAGE.splitlines()) <= 120


def test_what_is_not_there_is_found_out():
    assert not is_there("spo/nothing.py") and not is_there("spo/loop.py/") and is_there("spo/grow/")
    assert not is_bound("spo.loop.nothing") and not is_bound("spo_nothing.x")
    assert is_bound("spo.learn.learner.Learner.step") and is_there("csrc/cpu/<op>.cpp")
    assert kind_of("make test") == "target" and kind_of("`Forest`".strip("`")) == "word"
