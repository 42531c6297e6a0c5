"""The table that `spo eval` prints."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.table import Table

from spo.grow.evaluate import Accuracy


def evaluation_table(title: str, rows: Sequence[Accuracy]) -> Table:
    """One line per set, limit and way of sampling; columns that no line needs are left out."""
    columns: dict[str, Callable[[Accuracy], str]] = {}
    if len({row.set for row in rows}) > 1:
        columns["set"] = lambda row: row.set
    columns["max new tokens"] = lambda row: f"{row.max_new_tokens:,}"
    columns["sampling"] = _sampling
    columns["Pass@1"] = lambda row: f"{row.pass_at_1:.3f} ± {row.stderr:.3f}"
    for k in sorted({k for row in rows for k in row.pass_at} - {1}):
        columns[f"Pass@{k}"] = lambda row, k=k: _figure(
            row.pass_at.get(k), row.pass_at_stderr.get(k)
        )
    if any(row.majority is not None for row in rows):
        columns["majority"] = lambda row: _figure(row.majority, row.majority_stderr)
    columns["problems"] = lambda row: (
        f"{row.problems}" + (f" ({row.too_long} do not fit)" if row.too_long else "")
    )
    columns["cut"] = lambda row: f"{row.truncated:.1%}"
    columns["tokens"] = lambda row: f"{row.mean_tokens:.0f}"
    table = Table(title=f"{title}: Pass@1")
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    return table


def _sampling(row: Accuracy) -> str:
    if not row.temperature:
        return "greedy"
    cut = (f", {name} {value:g}" for name, value in row.truncation.items())
    return f"{row.samples} at {row.temperature:g}" + "".join(cut)


def _figure(value: float | None, error: float | None) -> str:
    return "–" if value is None or error is None else f"{value:.3f} ± {error:.3f}"
