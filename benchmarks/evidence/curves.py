"""Draw learning curves with confidence bands, in the style of plot.py."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib

from benchmarks.evidence.runs import Record, band
from benchmarks.figures.plot import ACCENT, INK, RIVALS, STYLE

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

LABELS = {
    "generated_tokens": "generated tokens, thousands",
    "seconds": "seconds of rollout and training",
}
COLOURS = (ACCENT, *RIVALS, INK, "#9f1239", "#115e59")


def draw(
    panels: dict[str, dict[str, list[Record]]],  # title -> arm -> runs
    x: tuple[str, ...],  # one row of panels each
    path: Path,
    *,
    y: str = "sampled",
    title: str = "",
) -> None:
    """One panel per title, one line per arm: the mean over seeds and its 95 % interval. A single
    title has its panels side by side, named beside them."""
    single = len(panels) == 1
    rows, columns = (1, len(x)) if single else (len(x), len(panels))
    with pyplot.rc_context(STYLE):
        size = (1 + 3.4 * columns, 3.1 * rows)
        figure, axes = pyplot.subplots(rows, columns, figsize=size, squeeze=False)
        for ax, (key, (name, arms)) in zip(
            axes.flat, itertools.product(x, panels.items()), strict=True
        ):
            for colour, (arm, records) in zip(COLOURS, arms.items(), strict=False):
                grid, mean, half = band(records, key, y)
                grid = grid / 1000 if key == "generated_tokens" else grid
                ax.plot(grid, mean, color=colour, linewidth=1.5, label=arm)
                ax.fill_between(
                    grid, mean - half, mean + half, color=colour, alpha=0.15, linewidth=0
                )
            ax.set(title=name, xlabel=LABELS[key])
            if not single:
                ax.legend(frameon=False, fontsize=7, loc="lower right")
        for row in axes:
            row[0].set_ylabel(f"Pass@1, {y}")
        figure.suptitle(title, x=0.01, ha="left")
        figure.tight_layout()
        if single:
            lines = axes[0, -1].get_legend_handles_labels()
            figure.legend(*lines, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        pyplot.close(figure)
