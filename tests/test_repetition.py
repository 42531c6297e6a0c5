"""No block of code stands twice in the tests and benchmarks."""

import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST = 12  # lines that may stand twice


def lines_of(text: str) -> list[tuple[int, str]]:
    """(number, line) of what counts: no blank line, comment or import; white space is folded."""
    found, inside_import = [], False
    for number, line in enumerate(text.splitlines(), 1):
        words = " ".join(re.sub(r"  # .*", "", line).split())
        if inside_import:
            inside_import = ")" not in words
        elif re.match(r"(import|from \S+ import) ", words):
            inside_import = words.endswith("(")
        elif words and not words.startswith("#"):
            found.append((number, words))
    return found


def repeated(texts: dict[str, str], longest: int) -> list[str]:
    """Both places of every block of more than `longest` lines that stands twice in the texts."""
    places = defaultdict(list)  # a window of one line more than may stand twice -> where it starts
    lines = {name: lines_of(text) for name, text in texts.items()}
    for name, rows in lines.items():
        for start in range(len(rows) - longest):
            window = tuple(words for _, words in rows[start : start + longest + 1])
            places[window].append((name, start))
    found, before = [], set()
    for (first, a), (second, b) in ((p[0], q) for p in places.values() for q in p[1:]):
        before.add((first, a, second, b))
        if (first, a - 1, second, b - 1) not in before:  # else it goes on
            found.append(
                f"{first}:{lines[first][a][0]} stands again at {second}:{lines[second][b][0]}"
            )
    return found


def test_no_block_stands_twice():
    paths = [path for folder in ("tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in sorted(paths)}
    assert len(texts) > 80
    assert repeated(texts, LONGEST) == []


def test_the_finder_sees_a_block_and_nothing_shorter():
    block = [f"x = {i}" for i in range(4)]
    first = "\n".join(["import os", "y = 1", *block])
    second = "\n".join(
        [*block[:2], "", "    # folded and left out", *(f"  {x}" for x in block[2:])]
    )
    texts = {"a.py": first, "b.py": second}
    assert repeated(texts, 3) == ["a.py:3 stands again at b.py:1"]
    assert repeated(texts, 2) == ["a.py:3 stands again at b.py:1"]  # once, not once a line
    assert repeated(texts, 4) == []
    assert repeated({"a.py": first + "\ny = 2\n" + second}, 3) == ["a.py:3 stands again at a.py:8"]
    imports = "from os import (\n    path,\n    sep,\n)\nimport sys\n"
    assert repeated({"a.py": imports, "b.py": imports}, 1) == []
