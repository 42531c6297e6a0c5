"""Parts that tasks share: the problem record, seeded streams of problems, the answer tags."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from spo.tasks.answers import after_think

TEST_ONE_IN = 4  # one problem in four belongs to the test split
TEST_SIZE = 1000  # problems of the test stream
NO_REPEAT = 100_000  # a training stream repeats no problem within this many
ALL_SEEN = 100  # this many repeats in a row mean that all problems have been seen

OPEN, CLOSE = "<answer>", "</answer>"


@dataclass(frozen=True)
class Problem:
    """One problem as text, before any tokenizer has seen it."""

    text: str  # the prompt
    answer: Any  # JSON value that the task's grader understands


def stream(
    name: str,
    split: str,
    seed: int,
    draw: Callable[[random.Random], Problem],
    identity: Callable[[Problem], str],
) -> Iterator[Problem]:
    """Distinct problems of one split, drawn lazily: `draw(rng)`, filtered by split and repeats.

    A hash of `identity(problem)` decides the split, so no training stream can emit a test problem.
    "train" is endless and depends on `seed`; "test" is one fixed stream of `TEST_SIZE` problems, or
    of all if there are fewer. A training stream repeats a problem only after `NO_REPEAT` others, or
    when it has returned all. Raises ValueError for any other split.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split: expected "train" or "test", found {split!r}')
    return _stream(name, split == "test", seed, draw, identity)


def _stream(name, test, seed, draw, identity):
    # A string seeds Random through SHA-512: the same stream on every platform and Python version.
    rng = random.Random(f"{name} test" if test else f"{name} train {seed}")
    seen: set[bytes] = set()
    repeats = given = 0
    while not test or given < TEST_SIZE:
        problem = draw(rng)
        digest = blake2b(f"{name} {identity(problem)}".encode(), digest_size=8).digest()
        if (digest[0] % TEST_ONE_IN == 0) != test:
            continue
        if digest in seen:
            repeats += 1
            if repeats < ALL_SEEN:
                continue
            if test:
                return
        if repeats >= ALL_SEEN or len(seen) >= NO_REPEAT:
            seen.clear()
        repeats = 0
        seen.add(digest)
        given += 1
        yield problem


def problem_stream(
    name: str, split: str, seed: int, problems: Sequence[Problem]
) -> Iterator[Problem]:
    """ "test" gives the problems once, in their order; "train" shuffles them again and again."""
    if split == "test":
        yield from problems
        return
    rng = random.Random(f"{name} train {seed}")
    while True:
        yield from rng.sample(problems, len(problems))


def column(row: dict, where: str, *names: str) -> object:
    """The first of the named columns that the row has. Raises ValueError if it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{where}: expected a column {' or '.join(names)}, found {', '.join(row)}")


def answer_span(text: str) -> str | None:
    """The stripped text in the last closed pair of answer tags after the thinking, or None."""
    text = after_think(text)
    close = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, max(close, 0))
    return text[start + len(OPEN) : close].strip() if start >= 0 else None


def tag(answer: str) -> str:
    """The last line of a response: `answer` between the tags that `answer_span` looks for."""
    return f"{OPEN} {answer} {CLOSE}"
