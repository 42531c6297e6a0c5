"""Markdown tables of the kernel benchmarks."""

from __future__ import annotations

from pathlib import Path

from benchmarks import RESULTS, ROOT, provenance
from benchmarks.figures import results
from benchmarks.figures.results import Record

DOCS = ROOT / "docs"
NAMES = {
    "policy_loss": "`masked_ppo_loss`",
    "linear_policy_loss": "`linear_masked_ppo_loss`",
    "logprobs": "`token_logprobs`",
    "linear_logprobs": "`linear_token_logprobs`",
    "segments": "`cutpoint_segments` + `segment_advantages`",
    "tree_values": "`tree_values`",
    "gae": "`gae`",
}


def milliseconds(row: Record | None) -> str:
    return "" if row is None else f"{row['ms']:.3g}"


def times(value: float | None) -> str:
    """A ratio, or nothing where its other side did not run."""
    return "" if value is None else f"{value:.1f}×" if value < 10 else f"{value:.0f}×"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def megabytes(row: Record | None) -> str:
    return "" if row is None or row["peak_mb"] is None else f"{row['peak_mb']:.0f}"


def where(rows: list[Record]) -> str:
    cuda = rows[0].get("measures") == "CUDA kernels"
    return provenance.where(rows, "CUDA kernels" if cuda else "kernels")


def line(rows: list[Record]) -> str | None:
    """One shape: eager, the fastest rival by name, ours, and what ours is worth."""
    ours = results.best(rows, "ours")
    if ours is None:
        return None
    # A library that skips masked rows by itself is a rival with all rows too.
    eager, best = results.best(rows, "base"), results.best(rows, "fair", "rival", "base")
    rival = "" if best is None else f"{milliseconds(best)} ({best['implementation']})"
    cells = (
        ours["shape"] if "vocab" in ours else f"{NAMES[ours['op']]}, {ours['shape']}",
        milliseconds(eager),
        rival,
        f"**{milliseconds(ours)}**",
        times(ours["speedup"]),
        times(best and best["ms"] / ours["ms"]),
        share(ours["floor_share"]),
        f"{megabytes(eager)} → {megabytes(ours)}",
    )
    return f"| {' | '.join(cells)} |"


def table(title: str, groups: list[list[Record]]) -> str:
    header = (
        f"| {title}, ms | eager | best rival | spo_kernels | × eager | × rival | of floor "
        "| peak MB, eager → spo_kernels |"
    )
    lines = filter(None, map(line, groups))
    return "\n".join([header, "|---|---|---|---|---|---|---|---|", *lines])


def rivals(rows: list[Record]) -> str:
    """Everything that ran on one shape, fastest first."""
    out = ["| implementation | ms | p20–p80 | of floor | peak MB | error | version |"]
    out.append("|---|---|---|---|---|---|---|")
    for r in sorted(rows, key=lambda r: r["ms"]):
        error = "" if r["error"] is None else f"{r['error']:.0e}"
        cells = (
            r["implementation"],
            milliseconds(r),
            f"{r['ms_p20']:.3g}–{r['ms_p80']:.3g}",
            share(r["floor_share"]),
            megabytes(r),
            error,
            r["version"],
        )
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def headline(groups: dict[tuple[str, str], list[Record]]) -> list[Record]:
    """The shape that stands for an op: the largest at 10 % kept, or the largest there is."""
    sparse = [rows for rows in groups.values() if rows[0].get("kept") == 0.1]
    return max(sparse or groups.values(), key=lambda rows: max(r["ms"] for r in rows))


def everything(root: Path = RESULTS) -> str:
    """docs/kernels.md: for every device and op its drawing, all shapes, all rivals on one shape."""
    parts = []
    for device in results.devices(root):
        loaded = {b: results.load(device, b, root) for b in results.BENCHMARKS}
        if not any(loaded.values()):
            continue
        parts += [f"## {device}", where(next(filter(None, loaded.values())))]
        for records in loaded.values():
            for op in dict.fromkeys(r["op"] for r in records):
                groups = results.shapes([r for r in records if r["op"] == op])
                parts.append(f"### {NAMES[op]}")
                drawing = f"kernels/{device}-{op}.svg"
                if (DOCS / drawing).exists():
                    parts.append(f"![time and memory of {op}]({drawing})")
                chosen = headline(groups)
                parts += [table(op, list(groups.values())), f"All on {chosen[0]['shape']}:"]
                parts.append(rivals(chosen))
    return "\n\n".join(parts)
