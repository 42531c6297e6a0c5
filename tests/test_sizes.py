"""Files and functions stay readable: the limits of the house."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINES, FUNCTION, LOOP = 350, 80, 120
SOURCES = [
    path
    for folder in ("spo", "spo_kernels", "csrc")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".cuh")
]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_file_or_function_is_long(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LINES
    if path.suffix != ".py":
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)
            limit = LOOP if path == ROOT / "spo" / "loop.py" else FUNCTION
            length = (node.end_lineno or 0) - node.lineno + 1
            assert kernel or length <= limit, f"{node.name} has {length} lines"


def test_sources_are_found():
    assert len(SOURCES) > 100
