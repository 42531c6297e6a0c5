"""Pages of runs and forests: from their files to HTML."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from spo.config.recipe import Recipe, load_recipe
from spo.credit.values import Values
from spo.credit.worth import NeedsModels
from spo.forest import Forest
from spo.learn.checkpoint import latest_checkpoint, load_saved
from spo.metrics import read_metrics
from spo.models.tokenizer import load_tokenizer
from spo.report.html import RunCurve, TreeView, write_report


def write_run_page(run: Path, output: Path | None = None) -> Path:
    """The page of one run folder. Raises ValueError if it is not a run folder."""
    metrics = run / "metrics.jsonl"
    if not metrics.exists():
        raise ValueError(f"expected a run folder, found no metrics.jsonl in {run}")
    output = output or run / "report.html"
    saved = latest_checkpoint(run)
    name = load_saved(saved).name if saved else run.name
    curves = [RunCurve(name, read_metrics(metrics))]
    write_report(output, curves, run_views(run, name), title=name)
    return output


def write_forest_page(
    path: Path,
    recipe: Path | None = None,
    overrides: Sequence[str] = (),
    output: Path | None = None,
) -> Path:
    """The page of one forest file.

    The recipe is by default that of the run around it, else what the file says of its own.
    """
    run = latest_checkpoint(path.parent)
    forest = Forest.load(path)
    if forest.origin is not None and not (recipe or run or overrides):
        view = forest.view(path.stem, None, forest.origin.prob_threshold)
    else:
        chosen = load_recipe(recipe, overrides) if recipe or not run else load_saved(run, overrides)
        view = tree_view(path.stem, path, chosen, load_tokenizer(chosen.policy))
    output = output or path.with_suffix(".html")
    write_report(output, [], [view], title=path.name)
    return output


def write_comparison_page(results: Mapping[str, list[dict]], out: Path) -> Path:
    """One page for several runs, which are in folders of `out`."""
    views = [view for name in results for view in run_views(out / name, name)]
    curves = [RunCurve(name, lines) for name, lines in results.items()]
    output = out / "report.html"
    write_report(output, curves, views, title="SPO: " + " and ".join(results))
    return output


def run_views(run: Path, name: str) -> list[TreeView]:
    """The first and the last forest of a run, ready to show."""
    newest = latest_checkpoint(run)
    if newest is None:
        return []
    recipe = load_saved(newest)
    tokenizer = load_tokenizer(recipe.policy)
    views = []
    for when in ("first", "last"):
        path = run / f"forest-{when}.safetensors"
        if path.exists():
            views.append(tree_view(f"{name}, {when} iteration", path, recipe, tokenizer))
    return views


def tree_view(title: str, path: str | os.PathLike, recipe: Recipe, tokenizer) -> TreeView:
    """A forest file with the values and the credit of a recipe, ready to show.

    A rule that needs a model cannot compute its credit here; differences of values replace it.
    """
    forest = Forest.load(path).with_tokenizer(tokenizer)
    threshold = recipe.loss.prob_threshold
    try:
        return forest.view(title, recipe, threshold)
    except NeedsModels:
        return forest.view(title, Values(), threshold)
