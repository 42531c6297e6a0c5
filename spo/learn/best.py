"""The policy with the best figure of an evaluation: `train.keep_best`.

A run keeps it in `best/iter-NNNNNN`. A resumed run drops the metrics lines after its checkpoint and
measures them again, and so it drops the policies after it. For that the best one of before the
checkpoint stays, until the best of all is before a checkpoint too.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo.learn import checkpoint, distributed
from spo.learn.learner import Learner
from spo.learn.policy_folder import save_trained
from spo.metrics import finite

RECORD = "evaluation.json"
"""Beside a kept policy: its `iteration`, the `figure`, that figure's `mean` and `stderr`."""


def keep_if_best(learner: Learner, line: Mapping[str, Any], iteration: int) -> None:
    """Keep the policy as it is now if its evaluation, rank 0's `line`, is the best one so far.

    Every rank calls it. Ties keep the earlier policy.
    """
    recipe, ranks = learner.recipe, learner.ranks
    figure, out = recipe.train.keep_best, recipe.out_dir
    if figure is None:
        return
    better, *_ = distributed.gather(ranks, ranks.main and _is_better(out, figure, line))
    if not better or not (ranks.main or ranks.sharded):
        return
    policy = distributed.Whole(learner.model, None)
    if not ranks.main:
        return
    final = out / checkpoint.BEST / f"iter-{iteration:06d}"
    with checkpoint.whole_folder(final) as folder:
        save_trained(folder / "policy", recipe.policy, policy.model, policy.weights)
        found = {"mean": line[figure], "stderr": finite(line[f"{figure}_stderr"])}
        record = {"iteration": iteration, "figure": figure} | found
        (folder / RECORD).write_text(json.dumps(record, indent=1))
        checkpoint.describe(folder, recipe)
    for older in checkpoint.outdated_bests(out):
        shutil.rmtree(older)


def forget_from(out_dir: Path, iteration: int) -> None:
    """Remove the kept policies of this iteration and later: the run goes on before them."""
    for folder in checkpoint.kept_bests(out_dir):
        if folder.name >= f"iter-{iteration:06d}":
            shutil.rmtree(folder)


def _is_better(out: Path, figure: str, line: Mapping[str, Any]) -> bool:
    """Whether the line has the figure, and a higher one than the policy that is kept."""
    now, kept = line.get(figure, math.nan), checkpoint.kept_bests(out)
    if not kept or not math.isfinite(now):
        return math.isfinite(now)
    record = json.loads((kept[-1] / RECORD).read_text())
    return record["figure"] != figure or now > record["mean"]
