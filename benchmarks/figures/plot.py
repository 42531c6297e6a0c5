"""Draw docs/kernels/<device>-<op>.svg: time and memory against the kept share.

    python -m benchmarks.figures.plot [--results DIR] [--out DIR]

One file for each op that ends at the vocabulary; a column for each width and vocabulary, time
above, memory below. The floor is dashed.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib

from benchmarks import RESULTS, ROOT
from benchmarks.figures import results
from benchmarks.figures.results import Record

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

DOCS = ROOT / "docs" / "kernels"
KEPT_ONLY = ", kept rows only"
INK, ACCENT = "#444444", "#c2410c"
RIVALS = ("#1d4ed8", "#0e7490", "#4d7c0f", "#7e22ce", "#a16207", "#be185d", "#475569")
STYLE = {
    "svg.hashsalt": "spo_kernels",  # or every run would name its shapes anew
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e5e5e5",
    "grid.linewidth": 0.6,
}


def panels(records: list[Record]) -> dict[str, list[Record]]:
    """Rows that differ in the kept share alone, where there are at least two shares."""
    groups: dict[str, list[Record]] = {}
    for r in records:
        width = f"D {r['width']}, " if r["width"] else ""
        title = f"{width}V {r['vocab']}\nN {r['rows']}, {r['dtype']}"
        groups.setdefault(title, []).append(r)
    return {t: rows for t, rows in groups.items() if len({r["kept"] for r in rows}) > 1}


def lines(rows: list[Record]) -> dict[str, list[Record]]:
    """Rows of each implementation by kept share; where all are kept, dropping rows is a no-op."""
    names = list(dict.fromkeys(r["implementation"] for r in rows))
    names = [n for n in names if n + KEPT_ONLY not in names or n == "PyTorch eager"]
    out = {}
    for name in names:
        dense = name.removesuffix(KEPT_ONLY)
        found = [r for r in rows if r["implementation"] == name]
        if name != dense:
            found += [r for r in rows if r["implementation"] == dense and r["kept"] == 1]
        out[name] = sorted(found, key=lambda r: r["kept"])
    return out


def draw(op: str, records: list[Record], path: Path) -> None:
    groups = panels(records)
    if not groups:
        return
    names = list(dict.fromkeys(n for rows in groups.values() for n in lines(rows)))
    rivals = [n for n in names if not n.startswith(("spo_kernels", "floor"))]
    colours = dict(zip(rivals, RIVALS * len(rivals), strict=False))
    figure, axes = pyplot.subplots(
        2, len(groups), figsize=(1.2 + 2.3 * len(groups), 5.4), sharex=True, squeeze=False
    )
    for column, (title, rows) in enumerate(groups.items()):
        for name, found in lines(rows).items():
            ours, floor = name.startswith("spo_kernels"), name.startswith("floor")
            style = {
                "color": ACCENT if ours else INK if floor else colours[name],
                "linestyle": "--" if floor else "-",
                "linewidth": 2.2 if ours else 1.1,
                "marker": "o" if ours else None,
                "markersize": 3,
                "label": name,
                "zorder": 3 if ours else 2,
                "clip_on": False,
            }
            shares = [100 * r["kept"] for r in found]
            axes[0, column].plot(shares, [r["ms"] for r in found], **style)
            held = [r["peak_mb"] for r in found]
            if not floor and None not in held:
                axes[1, column].plot(shares, [max(mb, 1) for mb in held], **style)
        axes[0, column].set_title(title, fontsize=9)
        axes[1, column].set_xlabel("tokens kept, %")
    for row, label in zip(
        axes, ("ms, forward + backward", "peak MB above the inputs"), strict=True
    ):
        row[0].set_ylabel(label)
        for ax in row:
            ax.set(xscale="log", yscale="log")
            ticks = sorted({100 * r["kept"] for r in records})
            ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
            ax.yaxis.set_major_formatter("{x:g}")
            ax.tick_params(axis="y", left=False)
            ax.minorticks_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.suptitle(
        f"{op}, {records[0]['device']}, {records[0]['threads']} threads", x=0.01, ha="left"
    )
    figure.legend(handles, labels, loc="lower left", ncols=3, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.04 + 0.035 * -(-len(labels) // 3), 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    path.write_text(shortened(path.read_text()))


def shortened(svg: str) -> str:
    """The same drawing with one decimal a coordinate, no comments, ids only where they are used."""
    svg = re.sub(
        r"<!--.*?-->|<metadata>.*?</metadata>|^ +", "", svg, flags=re.DOTALL | re.MULTILINE
    )
    svg = re.sub(r"(\d+\.\d)\d+", r"\1", svg.replace("; stroke-linecap: square", ""))
    return re.sub(r'<g id="\w+">', "<g>", svg)


def draw_all(root: Path, out: Path) -> list[Path]:
    """Every figure that the results allow; returns their files."""
    written = []
    with pyplot.rc_context(STYLE):
        for device in results.devices(root):
            for benchmark in ("policy_loss", "logprobs"):
                records = results.load(device, benchmark, root)
                for op in dict.fromkeys(r["op"] for r in records):
                    path = out / f"{device}-{op}.svg"
                    draw(op, [r for r in records if r["op"] == op], path)
                    written += [path] if path.exists() else []
    return written


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=DOCS)
    arguments = parser.parse_args(argv)
    for path in draw_all(arguments.results, arguments.out):
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
