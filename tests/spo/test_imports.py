"""Imports go one way; `spo_kernels` never imports `spo`."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ORDER = [  # a room may import from rooms of lower rank, and from its own group
    ("named", "records", "config", "config_checks", "steps", "metrics", "attention", "distributed"),
    ("tasks", "engines", "model", "checkpoint"),
    ("shapes",),
    ("assemble",),
    ("rollout",),
    ("advantages",),
    ("replay",),
    ("batch",),
    ("loss", "critic", "preference"),
    ("evaluate", "dry_run", "learner"),
    ("train",),
    ("cli",),
]
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
SIDE = {
    "report": {"records"},
    "warmup": {"tasks", "model"},
    "__init__": set(),
}


def imported_rooms(path: Path, inside: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == inside:
                found.add(parts[1] if len(parts) > 1 else "__init__")
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT / "spo").parts[0].removesuffix(".py")


FILES = sorted((ROOT / "spo").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_upward_import(path):
    room = room_of(path)
    for other in imported_rooms(path, "spo") - {room, "__init__"}:
        if room in SIDE:
            assert other in SIDE[room], f"{room} imports {other}"
        elif other in RANK:
            assert RANK[other] < RANK[room] or other in ORDER[RANK[room]], f"{room} -> {other}"
        else:
            assert room == "cli" and other == "report", f"{room} -> {other}"


def test_kernels_stand_alone():
    for path in sorted((ROOT / "spo_kernels").rglob("*.py")):
        assert imported_rooms(path, "spo") == set(), path
