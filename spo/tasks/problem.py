"""Parts that tasks share: the problem record, seeded streams of problems, the answer tags."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from spo.tasks.answers import after_think

TEST_ONE_IN = 4  # one problem in four belongs to the test split
TEST_SIZE = 1000  # problems of the test stream
NO_REPEAT = 100_000  # a training stream repeats no problem within this many
ALL_SEEN = 100  # this many repeats in a row mean that all problems have been seen
ALL_ELSEWHERE = 10_000  # this many problems of the other split mean that a split has none

OPEN, CLOSE = "<answer>", "</answer>"


@dataclass(frozen=True)
class Problem:
    """One problem as text, before any tokenizer has seen it."""

    text: str  # the prompt
    answer: Any  # JSON value that the task's grader understands
    # The prompt as the data's own chat, each turn with `role` and `content`; `text` is then only
    # shown. It is written in the tokenizer's chat template.
    messages: tuple[dict, ...] | None = field(default=None, hash=False)
    # The row's other columns, JSON values, for rewards; names as the data writes them.
    columns: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def prompt(self) -> str:
        """What tells problems apart: the text, without space around it, or the messages."""
        chat = self.messages
        return self.text.strip() if chat is None else json.dumps(chat, sort_keys=True)


class Missing(ValueError):
    """A row without a problem or without an answer: its cells in these columns are empty."""

    def __init__(self, where: str, columns: Sequence[str]) -> None:
        self.columns = " or ".join(columns)
        super().__init__(f"{where}: expected a value in {self.columns}, found none")


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
    when it has returned all. Raises ValueError for any other split, and for one without problems.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split: expected "train" or "test", found {split!r}')
    return _stream(name, split == "test", seed, draw, identity)


def _stream(name, test, seed, draw, identity):
    # A string seeds Random through SHA-512: the same stream on every platform and Python version.
    rng = random.Random(f"{name} test" if test else f"{name} train {seed}")
    seen: set[bytes] = set()
    repeats = given = elsewhere = 0
    while not test or given < TEST_SIZE:
        problem = draw(rng)
        digest = blake2b(f"{name} {identity(problem)}".encode(), digest_size=8).digest()
        if (digest[0] % TEST_ONE_IN == 0) != test:
            elsewhere += 1
            if not given and elsewhere >= ALL_ELSEWHERE:
                split = "test" if test else "train"
                raise ValueError(
                    f"{name}: expected more distinct problems, so that some are in each split, "
                    f"found none for {split} among {elsewhere} draws"
                )
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


def mixture(
    streams: Sequence[Iterator[Problem]], weights: Sequence[float], seed: int
) -> Iterator[Problem]:
    """Problems of several streams, each drawn by its weight; a stream that ends is drawn no more.

    The order follows from the seed, so the n-th problem is the same in a resumed run.
    """
    rng = random.Random(f"mixture {seed}")
    live = list(zip(streams, weights, strict=True))
    while live:
        (index,) = rng.choices(range(len(live)), [weight for _, weight in live])
        problem = next(live[index][0], None)
        if problem is None:
            del live[index]
        else:
            yield problem


def column(row: dict, where: str, *names: str) -> object:
    """The first of the named columns that holds something.

    Raises Missing if such columns are there and empty, ValueError if there is none.
    """
    for name in names:
        if not is_empty(row.get(name)):
            return row[name]
    if there := [name for name in names if name in row]:
        raise Missing(where, there)
    raise ValueError(f"{where}: expected a column {' or '.join(names)}, found {', '.join(row)}")


def is_empty(value: object) -> bool:
    """Whether a cell of a table holds nothing."""
    return value is None or (isinstance(value, str) and not value.strip())


def answer_span(text: str) -> str | None:
    """The stripped text in the last closed pair of answer tags after the thinking, or None."""
    text = after_think(text)
    close = text.rfind(CLOSE)
    start = text.rfind(OPEN, 0, max(close, 0))
    return text[start + len(OPEN) : close].strip() if start >= 0 else None


def tag(answer: str) -> str:
    """The last line of a response: `answer` between the tags that `answer_span` looks for."""
    return f"{OPEN} {answer} {CLOSE}"
