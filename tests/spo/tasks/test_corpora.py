"""Public corpora of problems and of grader tests, read from the folder SPO_CORPORA.

`make corpora CORPORA=folder` runs this. Each `.jsonl` file in it holds either problems (`problem`,
`answer` and, if there is one, a boxed `solution`) or clear cases (`given`, `answer`, `right`).
"""

import json
import os
import random
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest

from spo.grade import graded, read_rows
from spo.tasks.algebra.quantity import number_of
from spo.tasks.algebra.same import MAX_LENGTH, equal
from spo.tasks.algebra.spelling import spelled
from spo.tasks.answers import last_boxed

FOLDER = os.environ.get("SPO_CORPORA")
FILES = sorted(Path(FOLDER).rglob("*.jsonl")) if FOLDER else []
SWAPS = 5000  # pairs of answers of one shape
AGREE = 0.99

pytestmark = pytest.mark.skipif(not FILES, reason="make corpora CORPORA=folder")


def rows_of(path: Path, *keys: str) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file if line.strip()]
    if not rows or not all(key in rows[0] for key in keys):
        pytest.skip(f"{path.name} has no {', '.join(keys)}")
    return rows


def answers_of(path: Path) -> list[str]:
    found = [str(row["answer"]) for row in rows_of(path, "problem", "answer")]
    return [answer for answer in found if 0 < len(answer) < MAX_LENGTH]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_answers_and_solutions_are_right(path):
    rows = rows_of(path, "problem", "answer")
    refused = [answer for answer in answers_of(path) if not equal(answer, answer, simplified=True)]
    assert not refused
    solved = [(last_boxed(row.get("solution") or ""), str(row["answer"])) for row in rows]
    refused = [
        (box, answer) for box, answer in solved if box and not equal(box, answer, simplified=True)
    ]
    assert len(refused) <= (1 - AGREE) * len(rows), refused[:20]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_swapped_answers_of_the_same_shape_are_wrong(path):
    """Two numbers that differ must not be taken for each other; other pairs are printed."""
    shapes: dict[str, set[str]] = {}
    for answer in answers_of(path):
        shapes.setdefault(re.sub("[0-9]+", "9", "".join(answer.split())), set()).add(answer)
    pairs = [(a, b) for group in shapes.values() for a in group for b in group if a < b]
    rng = random.Random(0)
    wrong, looked = [], []
    for a, b in rng.sample(pairs, min(SWAPS, len(pairs))):
        if equal(a, b) or equal(b, a):
            numbers: list[Fraction | None] = [number_of(a), number_of(b)]
            same = numbers[0] == numbers[1] or spelled(a).split() == spelled(b).split()
            (looked if same or None in numbers else wrong).append((a, b))
    print(f"{path.name}: {len(pairs)} pairs; taken for equal:", *looked, sep="\n")
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_clear_cases(path):
    rows_of(path, "given", "answer", "right")
    rows = read_rows(path)
    found = graded(rows, "math")
    differ = [
        (row.answer, row.response, row.right)
        for row, one in zip(rows, found, strict=True)
        if one.reward != float(bool(row.right))
    ]
    print(f"{path.name}: {len(rows) - len(differ)} of {len(rows)}", *differ, sep="\n")
    assert not [case for case in differ if not case[2]], "wrong answers that earn"
    assert len(differ) <= (1 - AGREE) * len(rows)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_time_of_many_leaves(path):
    answers = answers_of(path)
    rng = random.Random(0)
    start = time.process_time()
    for _ in range(1024):
        equal(rng.choice(answers), rng.choice(answers))
    assert time.process_time() - start < 10.0
