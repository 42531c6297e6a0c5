"""Trackio: a local database in TRACKIO_DIR, or a Space of the Hugging Face hub."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping

import trackio

from spo.config.recipe import Recipe, as_tree
from spo.trackers.names import in_sections


class Service:
    """See `spo.trackers.tracker.Service`."""

    holds_before = math.inf

    def __init__(self, recipe: Recipe, run: str | None, start: int):
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "spo"),
            name=recipe.name,
            config=as_tree(recipe),
            resume="must" if run else "never",
        )
        if run:
            self._run.id = run  # trackio takes the newest run of this name, perhaps another one
        self.run = self._run.id

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(in_sections(figures), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish()
