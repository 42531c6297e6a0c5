"""`spo grade`: grades a file of responses with one or several tasks, and compares what they say."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from spo.tasks.grading import Graded

SHOWN = 10  # disagreements that are printed by default
WIDTH = 60  # characters of a response or an answer that are printed


@dataclass(frozen=True)
class Row:
    """One line of the file."""

    response: str
    answer: Any
    right: bool | None = None  # whether it is right, as the file says


def grade_options(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument(
        "file",
        type=Path,
        help='one JSON object a line: {"response": …, "answer": …}; {"given": "1/2", "answer": …} '
        'stands for a response \\boxed{1/2}; "right": true or false says what is known',
    )
    parser.add_argument(
        "--task",
        action="append",
        required=True,
        metavar="TASK",
        help="math, gsm8k, … or your own, module:Name or ./file.py:Name; several are compared",
    )
    parser.add_argument(
        "--options",
        action="append",
        help='settings of the tasks as JSON, {"simplified": true}; several: one for each task',
    )
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds for a response")
    parser.add_argument("--workers", type=int, help="processes; default: by cores")
    parser.add_argument("--show", type=int, default=SHOWN, help="disagreements to print")
    parser.add_argument("--json", type=Path, help="also write every verdict to this file")


def grade(arguments: argparse.Namespace) -> None:
    """Print a table of what each task says, and where they differ."""
    from rich.console import Console

    rows = read_rows(arguments.file)
    tasks = _with_options(arguments.task, arguments.options or ["{}"])
    verdicts: dict[str, list[Graded]] = {}
    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 110  # files and pipes have no width of their own
    lines = []
    for name, (task, options) in tasks.items():
        start = time.perf_counter()
        verdicts[name] = graded(rows, task, options, arguments.timeout, arguments.workers)
        lines.append(_line(name, rows, verdicts[name], time.perf_counter() - start))
    console.print(_table(f"{arguments.file.name}, {len(rows)} responses", lines))
    shown = list(_differences(rows, verdicts))
    for text in shown[: arguments.show]:
        console.print(text, markup=False)
    if len(shown) > arguments.show:
        console.print(f"… and {len(shown) - arguments.show} more; --show N prints N")
    if arguments.json is not None:
        _save(arguments.json, verdicts)


def read_rows(path: Path) -> list[Row]:
    """The lines of a file. Raises ValueError with one sentence for a line that is no row."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: expected a JSON object, found {line[:60]!r}") from error
        rows.append(_row(value, where))
    if not rows:
        raise ValueError(f"{path.name}: expected at least one line, found none")
    return rows


def _row(value: Any, where: str) -> Row:
    if not isinstance(value, dict) or "answer" not in value:
        raise ValueError(f"{where}: expected an object with answer, found {str(value)[:60]!r}")
    response, given, right = (value.get(key) for key in ("response", "given", "right"))
    if response is None and isinstance(given, str):
        response = f"\\boxed{{{given}}}"
    if not isinstance(response, str):
        raise ValueError(f"{where}: expected a string in response or given, found {response!r}")
    if right is not None and not isinstance(right, bool):
        raise ValueError(f"{where}: right: expected true or false, found {right!r}")
    return Row(response, value["answer"], right)


def graded(
    rows: Sequence[Row],
    name: str,
    options: Mapping[str, Any] | None = None,
    timeout_s: float = 5.0,
    workers: int | None = None,
) -> list[Graded]:
    """The verdicts of a task, in the order of the rows."""
    from spo import named
    from spo.tasks import get_task
    from spo.tasks.grading import Grader

    task = get_task(name, options)
    name = named.name_of("task", type(task))
    found: list[Graded] = []
    with Grader({name: task}, timeout_s=timeout_s, workers=workers) as grader:
        for key, row in enumerate(rows):
            grader.submit(key, name, row.response, row.answer)
        while grader.pending:
            found += grader.poll(0.5)
    return found


def _with_options(tasks: Sequence[str], texts: Sequence[str]) -> dict[str, tuple[str, dict]]:
    """Each task with its options, by the name that the table shows."""
    if len(texts) not in (1, len(tasks)):
        raise ValueError(
            f"--options: expected one for all tasks or one for each of {len(tasks)}, "
            f"found {len(texts)}"
        )
    found = {}
    for place, task in enumerate(tasks):
        text = texts[place % len(texts)]
        options = _options(text)
        found[f"{task} {text}" if len(texts) > 1 and options else task] = (task, options)
    return found


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise ValueError(f"--options: expected a JSON object, found {text!r}")
    return options


def _line(name: str, rows: Sequence[Row], found: Sequence[Graded], seconds: float) -> list[str]:
    says = [one.reward for one in found]
    pairs = [(row.right, said) for row, said in zip(rows, says, strict=True) if row.right in (0, 1)]
    known = ["", "", ""]
    if pairs:
        agree = sum(said == float(right) for right, said in pairs)
        known = [
            f"{agree} of {len(pairs)} ({agree / len(pairs):.1%})",
            str(sum(not right and said == 1.0 for right, said in pairs)),
            str(sum(bool(right) and said == 0.0 for right, said in pairs)),
        ]
    reasons = Counter(one.reason for one in found if one.reward is None).most_common(2)
    failed = "; ".join(f"{count} × {reason}" for reason, count in reasons) or "0"
    return [name, str(says.count(1.0)), str(says.count(0.0)), failed, *known, f"{seconds:.1f}"]


def _table(title: str, lines: Sequence[list[str]]) -> Table:
    from rich.table import Table

    heads = [
        "task",
        "right",
        "wrong",
        "no verdict",
        "agrees",
        "wrongly right",
        "wrongly wrong",
        "s",
    ]
    kept = [k for k, _ in enumerate(heads) if any(line[k] for line in lines)]
    table = Table(title=title)
    for k in kept:
        table.add_column(heads[k], justify="left" if k in (0, 3) else "right")
    for line in lines:
        table.add_row(*(line[k] for k in kept))
    return table


def _differences(rows: Sequence[Row], verdicts: Mapping[str, Sequence[Graded]]):
    """A line for each row about which the tasks, or a task and the file, do not agree."""
    for index, row in enumerate(rows):
        says = {name: found[index].reward for name, found in verdicts.items()}
        known = {} if row.right is None else {"the file": float(row.right)}
        if len({*says.values(), *known.values()}) > 1:
            words = {1.0: "right", 0.0: "wrong", None: "no verdict"}
            said = ", ".join(f"{name}: {words[value]}" for name, value in (known | says).items())
            yield f"{said} | {_short(row.answer)} | {_short(row.response)}"


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= WIDTH else f"…{text[-WIDTH:]}"


def _save(path: Path, verdicts: Mapping[str, Sequence[Graded]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    names = list(verdicts)
    with path.open("w", encoding="utf-8") as file:
        for found in zip(*verdicts.values(), strict=True):
            said = {
                name: {"reward": one.reward} | ({"reason": one.reason} if one.reason else {})
                for name, one in zip(names, found, strict=True)
            }
            file.write(json.dumps(said) + "\n")
