"""The page of docs/models.md that a sweep fills.

python tools/architecture_table.py benchmarks/results/architectures.json docs/models.md
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- begin architectures -->\n", "<!-- end architectures -->\n"
KINDS = ("trains", "refused", "WRONG", "unbuilt")


def outcome(row: dict[str, Any]) -> str:
    """One of KINDS. An architecture that trains may be refused by the engine."""
    if "unbuilt" in row:
        return "unbuilt"
    kinds = [row[side]["kind"] for side in ("trainer", "engine") if side in row]
    if "WRONG" in kinds:
        return "WRONG"
    return "trains" if kinds[0] == "right" else "refused"


def title(row: dict[str, Any]) -> str:
    return f"{row['name']} ({row['form']})" if row["form"] else row["name"]


def counts(results: dict[str, Any]) -> dict[str, int]:
    """Model types by outcome; their other forms count where they are wrong."""
    found = dict.fromkeys(KINDS, 0)
    for row in results["rows"]:
        kind = outcome(row)
        found[kind] += not row["form"] or kind == "WRONG"
    return found


def render(results: dict[str, Any]) -> str:
    """What stands between the marks."""
    rows, number = results["rows"], counts(results)
    versions = f"transformers {results['transformers']}, torch {results['torch']}"
    versions += f", commit {results['commit']}"
    parts = [
        f"Measured on {results['date']} ({versions}): {number['trains']} model types train, "
        f"{number['refused']} are refused, {number['WRONG']} are wrong, {number['unbuilt']} do not "
        "build at small size.\n"
    ]
    trains = [row for row in rows if outcome(row) == "trains"]
    parts.append(
        "| model type | trains with | logprobs (nats) | gradient | engine hf (nats) |\n"
        "|---|---|---|---|---|\n" + "".join(map(_cells, trains))
    )
    wrong = _grouped([row for row in rows if outcome(row) == "WRONG"], _wrong)
    refused = _grouped([row for row in rows if outcome(row) == "refused"], _reason("trainer"))
    advised = [row for row in trains if row["trainer"]["advice"]]
    engine = [row for row in trains if row["engine"]["kind"] == "refused"]
    unbuilt = _grouped([row for row in rows if outcome(row) == "unbuilt"], lambda r: r["unbuilt"])
    for heading, text in (
        ("Wrong", wrong),
        ("Refused", refused),
        (
            "Trains otherwise than packed by default",
            _grouped(advised, _reason("trainer", "advice")),
        ),
        ("Refused by the embedded engine", _grouped(engine, _reason("engine"))),
        ("Not built at small size", unbuilt),
    ):
        if text:
            parts.append(f"### {heading}\n\n{text}")
    return "\n".join(parts)


def _cells(row: dict[str, Any]) -> str:
    trainer, engine = row["trainer"], row["engine"]
    figure = f"{engine['logprobs']:.0e}" if engine["kind"] == "right" else "refused"
    settings = trainer["settings"].replace("policy.", "")
    measured = f"{trainer['logprobs']:.0e} | {trainer['gradient']:.0e}"
    return f"| {title(row)} | {settings} | {measured} | {figure} |\n"


def _reason(side: str, field: str = "reason") -> Callable[[dict[str, Any]], str]:
    """The sentence without the model's name, and without figures in which alike ones differ."""

    def sentence(row: dict[str, Any]) -> str:
        text = row[side][field].replace("policy.path: the model", "").strip()
        return re.sub(r"\d[\d.]*(e[+-]?\d+)?(?= nats)", "…", text)

    return sentence


def _wrong(row: dict[str, Any]) -> str:
    sides = [s for s in ("trainer", "engine") if row.get(s, {}).get("kind") == "WRONG"]
    return "; ".join(f"{side}: {row[side]['reason']}" for side in sides)


def _grouped(rows: list[dict[str, Any]], reason: Callable[[dict[str, Any]], str]) -> str:
    """A line per reason, with all that it stands for; the longest lists first."""
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(reason(row), []).append(title(row))
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return "".join(f"- {', '.join(names)}: `{why.replace('`', '')}`\n" for why, names in ordered)


def write(results: dict[str, Any], page: Path) -> None:
    """Replace what stands between the marks of the page."""
    before, rest = page.read_text().split(BEGIN)
    page.write_text(before + BEGIN + "\n" + render(results) + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    write(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
