"""Comparison of runs: Pass@1 before and after, and a verdict."""

from __future__ import annotations

from rich.table import Table

from spo.metrics import plus_minus, scored


def accuracy_table(results: dict[str, list[dict]]) -> Table:
    """Pass@1 before and after each run."""
    table = Table(title="Pass@1, test split")
    for column in ("run", "kind", "before", "after", "change", "generated", "seconds"):
        table.add_column(column, justify="left" if column in ("run", "kind") else "right")
    for name, lines in results.items():
        evals = [line for line in lines if line["stage"] == "eval"]
        first, last = evals[0], evals[-1]
        for kind in scored(last):
            change, error = gain(first, last, kind)
            table.add_row(
                name,
                kind,
                plus_minus(first[kind], first[f"{kind}_stderr"]),
                plus_minus(last[kind], last[f"{kind}_stderr"]),
                plus_minus(change, error, "+"),
                f"{last['generated_tokens']:,}",
                f"{last['seconds']:.0f}",
            )
    return table


def gain(first: dict, last: dict, kind: str) -> tuple[float, float]:
    """Change in accuracy and its standard error, as if both evaluations were independent."""
    error = (first[f"{kind}_stderr"] ** 2 + last[f"{kind}_stderr"] ** 2) ** 0.5
    return last[kind] - first[kind], error


def verdict(results: dict[str, list[dict]]) -> str:
    """What the table shows: one sentence per run, then sentences on their differences."""
    sentences = []
    last = {}
    for name, lines in results.items():
        evals = [line for line in lines if line["stage"] == "eval"]
        last[name] = evals[-1]
        change, error = gain(evals[0], evals[-1], "greedy")
        word = "improved" if change > 2 * error else "did not improve"
        sentences.append(
            f"{name} {word} by more than two standard errors ({change:+.3f} ± {error:.3f})."
        )
    first, *others = last
    for other in others:
        for kind in scored(last[first]):
            if kind not in last[other]:
                continue
            change, error = gain(last[other], last[first], kind)
            better, worse = (first, other) if change > 0 else (other, first)
            if abs(change) <= 2 * error:
                sentences.append(f"{kind}: {first} and {other} end within two standard errors.")
            else:
                sentences.append(
                    f"{kind}: {better} ends above {worse} by {abs(change):.3f} ± {error:.3f}."
                )
    return " ".join(sentences)
