"""Imports go one way and never in a circle; `spo_kernels` never imports `spo`."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = [  # a room may import from rooms before it, and from its own
    ("extras", "fingerprint", "named", "records", "config", "metrics", "signatures", "reward"),
    ("models",),
    ("tasks", "engines"),
    ("grow",),
    ("credit",),
    ("learn",),
    ("trackers",),
    ("fit", "plan", "loop", "callbacks"),
    ("forest", "report", "publish", "grade"),
    ("run",),
    ("api",),
    ("cli",),
    ("__main__",),
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
SIDE = {  # what they may import
    "__init__": {"api", "config", "extras", "forest", "records", "run"},
}


def imported(path: Path, inside: str) -> set[str]:
    """Full names of the modules of a package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            while parts and not is_module(parts):
                parts.pop()
            if parts and parts[0] == inside:
                found.add(".".join(parts))
    return found


def is_module(parts: list[str]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "__init__"


FILES = sorted((ROOT / "spo").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_upward_import(path):
    room = room_of(name_of(path))
    for other in {room_of(name) for name in imported(path, "spo")} - {room, "__init__"}:
        if room in SIDE:
            assert other in SIDE[room], f"{room} imports {other}"
        else:
            assert RANK[other] < RANK[room] or other in ORDER[RANK[room]], f"{room} -> {other}"


@pytest.mark.parametrize("package", ["spo", "spo_kernels"])
def test_no_circle(package):
    graph = {
        name_of(path): imported(path, package) - {name_of(path), package}
        for path in (ROOT / package).rglob("*.py")
    }
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_kernels_stand_alone():
    for path in sorted((ROOT / "spo_kernels").rglob("*.py")):
        assert imported(path, "spo") == set(), path
