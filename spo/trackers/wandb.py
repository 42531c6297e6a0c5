"""Weights & Biases; WANDB_MODE=offline writes files in the run's folder."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import wandb

from spo.config.recipe import Recipe, as_tree
from spo.trackers.names import STEP, in_sections


class Service:
    """See `spo.trackers.tracker.Service`."""

    def __init__(self, recipe: Recipe, run: str | None, start: int):
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "spo"),
            name=os.environ.get("WANDB_NAME", recipe.name),
            dir=os.environ.get("WANDB_DIR", str(recipe.out_dir)),
            id=run,
            resume="allow" if run else None,
            reinit="create_new",  # a run of the caller's stays as it is
        )
        self._run.config.update(as_tree(recipe), allow_val_change=True)
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP, step_sync=True)
        self.run = self._run.id
        # Offline the files of an earlier process cannot go on: uploading the new ones replaces what
        # they hold. So these hold the whole run.
        self.holds_before = math.inf if self._run.resumed else 0

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(in_sections(figures) | {STEP: step})

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
