"""From rows to the problems of a split: columns by name, each problem once, test apart from train.

What is left out is counted, in one warning for each split of each data set.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from spo.tasks.problem import Missing, Problem, is_empty
from spo.tasks.sources import CHOICES, Source, has_own_test, read_rows, state, title
from spo.tasks.values import json_values

PROBLEMS = ("problem", "question", "prompt", "instruction")
ANSWERS = ("answer", "solution", "final_answer", "ground_truth", "target")
VERL = "reward_model"  # verl's column with the answer, `ground_truth`
USUAL = {"problem": PROBLEMS, "answer": (*ANSWERS, VERL)}


def problem_column(row: Mapping[str, Any]) -> str | None:
    """The column of a row (with lower-case names) that holds its problem, found by its name."""
    if is_chat(row.get("prompt")):
        return "prompt"
    return next((name for name in PROBLEMS if not is_empty(row.get(name))), None)


def is_chat(value: object) -> bool:
    """Whether a cell of a table holds messages."""
    return isinstance(value, list) and bool(value) and all(isinstance(t, Mapping) for t in value)


def read_problems(
    task: str,
    split: str,
    source: Source | str | None,
    problem_of: Callable[[dict, str], Problem],
    *,
    every_file: bool = False,
) -> list[Problem]:
    """The distinct problems of one split, in the order of the source.

    Left out, counted and warned of: rows without a problem or an answer (where `problem_of` raises
    Missing), problems that occur a second time with the same answer, and training problems that the
    test set holds. Each problem gets the row's other columns; one warning names those that JSON
    cannot hold.

    Args:
        source: what `problems` of the task was given; see `spo.tasks.sources`.
        problem_of: makes a problem from a row (lower-case column name -> value, and what
            `data.columns` names) and from the row's location, which it names in errors.
        every_file: also read files of other splits.

    Raises ValueError with one sentence if there is nothing to read, if no problem is left, or if a
    file is damaged.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split: expected "train" or "test", found {split!r}')
    if source is None:
        raise ValueError(f"{task} has no {split} problems: name a file in data.{split} to use one")
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"task {task} reads data sets: pip install 'spo-kernels[train]'")
    source = source if isinstance(source, Source) else Source(source)
    if not source.given and not has_own_test(source.path):
        raise ValueError(
            f"data.test: expected a test split in {title(source)}, found none; {CHOICES}"
        )
    read = _read(split, source, problem_of, every_file)
    problems = read.problems
    held = _of_tests(source, problem_of, every_file)
    kept = [problem for problem in problems if problem.prompt not in held]
    if not kept:
        raise ValueError(
            f"{title(source)}: each of the {len(problems)} {split} problems is a test problem too; "
            f"{CHOICES}"
        )
    shared = [p for p in problems if held.get(p.prompt)]
    _warn(source, source.reads or split, read, len(shared))
    return kept


@dataclass(frozen=True)
class _Read:
    """The distinct problems of a source, and what was left out of it."""

    problems: list[Problem]
    rows: int
    missing: Mapping[str, int]  # columns -> rows without a value in them
    repeated: int  # rows whose problem was there before
    not_held: Mapping[str, None]  # columns that JSON cannot hold


def _read(
    split: str, source: Source, problem_of: Callable[[dict, str], Problem], every_file: bool
) -> _Read:
    files = source.reads or split
    rows = read_rows(source, None if every_file else files)
    problems: dict[str, Problem] = {}
    missing: Counter[str] = Counter()
    first: Missing | None = None
    not_held: dict[str, None] = {}
    for row, where in rows:
        try:
            problem = problem_of(_named(row, source.columns, where), where)
        except Missing as error:
            missing[error.columns] += 1
            first = first or error
            continue
        held = json_values(row)
        not_held |= dict.fromkeys(name for name in row if name not in held)
        problem = _with_columns(problem, held, source.columns)
        problems.setdefault(_identity(problem, where), problem)
    if not problems:
        if isinstance(first, _Absent):
            raise first
        raise ValueError(
            f"{title(source)}: none of {len(rows)} {files} rows has a problem and an answer: "
            f"{', '.join(_without(missing))}"
        )
    distinct = list(problems.values())
    repeated = len(rows) - missing.total() - len(distinct)
    if source.share:
        chosen = _held_out([problem.prompt for problem in distinct], source)
        distinct = [problem for problem in distinct if problem.prompt in chosen]
    return _Read(distinct, len(rows), missing, repeated, not_held)


def _of_tests(
    source: Source, problem_of: Callable[[dict, str], Problem], every_file: bool
) -> dict[str, bool]:
    """Prompts of the test sets -> whether their absence from training is news."""
    found: dict[str, bool] = {}
    for test in source.apart:
        here = test.path == source.path or state(test) != "download"
        if not here:  # a rollout needs no test set; a run has read it before
            continue
        if not test.given and not has_own_test(test.path):
            continue
        read = _read("test", test, problem_of, every_file)
        found |= {problem.prompt: not test.share for problem in read.problems}
    return found


def _held_out(prompts: list[str], source: Source) -> set[str]:
    """The share of the prompts that are for testing: chosen by their hashes, whatever the order."""
    distinct = set(prompts)
    count = max(1, round(source.share * len(distinct)))
    if count >= len(distinct):
        raise ValueError(
            f"data.test_share: {source.share:g} of the {len(distinct)} problems of {title(source)} "
            "leaves none to train on"
        )
    return set(sorted(distinct, key=lambda p: blake2b(p.encode(), digest_size=8).digest())[:count])


def _identity(problem: Problem, where: str) -> str:
    """Equal for problems of which one is enough; without an answer, the other columns count too."""
    rest = problem.columns if problem.answer is None else None
    try:
        problem.text.encode()  # JSON may hold half of a pair of surrogates, which is no text
    except UnicodeEncodeError as error:
        found = f"{problem.text!a:.60}"
        raise ValueError(f"{where}: expected a problem of Unicode text, found {found}") from error
    try:
        return json.dumps([problem.prompt, problem.answer, rest], sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: expected an answer that JSON can hold, found {problem.answer!r:.60}"
        ) from error


class _Absent(Missing):
    """A row without a column that `data.columns` names; if no row has it, it is a wrong name."""

    def __init__(self, name: str, column: str, row: Mapping[str, Any], where: str) -> None:
        super().__init__(where, [column])
        self.args = (
            f"data.columns.{name}: expected one of the columns {', '.join(row)}, found "
            f"{column!r} ({where})",
        )


def _named(row: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    """A row with lower-case names; what `data.columns` names replaces the columns usual for it."""
    lower: dict[str, Any] = {}
    for name, value in row.items():
        if is_empty(lower.get(name.lower())):  # of two that differ by case, the one with a value
            lower[name.lower()] = value
    found = lower
    for name, column in columns.items():
        cell = row[column] if column in row else _cell(lower, column.lower())
        if cell is _NONE:
            raise _Absent(name, column, row, where)
        rest = {key: value for key, value in found.items() if key not in USUAL[name]}
        found = rest | {name: cell}
    return found


_NONE = object()


def _cell(row: Mapping[str, Any], column: str) -> object:
    """A column, or by dots what is inside of one: reward_model.ground_truth."""
    if column in row:
        return row[column]
    outer, _, inner = column.partition(".")
    cell = row.get(outer)
    if not inner or not isinstance(cell, Mapping):
        return _NONE
    return _cell({str(name).lower(): value for name, value in cell.items()}, inner)


def _with_columns(problem: Problem, row: dict[str, Any], columns: Mapping[str, str]) -> Problem:
    """The problem with a row's columns, that of the problem left out, unless it has some."""
    if problem.columns:
        return problem
    given = columns.get("problem") or problem_column({k.lower(): v for k, v in row.items()}) or ""
    rest = {k: v for k, v in row.items() if k.lower() != given.lower()}
    return dataclasses.replace(problem, columns=rest)


def _without(missing: Mapping[str, int]) -> list[str]:
    return [f"{count} without a value in {columns}" for columns, count in missing.items()]


def _warn(source: Source, split: str, read: _Read, shared: int) -> None:
    """Say how many rows of a data set were left out, and why, and which columns."""
    counts = {"there before": read.repeated, "in the test set too": shared}
    reasons = _without(read.missing) + [f"{count} {why}" for why, count in counts.items() if count]
    if reasons:
        warnings.warn(
            f"{title(source)}: of {read.rows} {split} rows, these are left out: "
            f"{', '.join(reasons)}",
            stacklevel=2,
        )
    if read.not_held:
        warnings.warn(
            f"{title(source)}: columns that JSON cannot hold are left out: "
            f"{', '.join(read.not_held):.200}",
            stacklevel=2,
        )
