"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

from collections.abc import Mapping

import yaml
from torch.utils.tensorboard import SummaryWriter

from spo.config.recipe import Recipe, as_tree
from spo.trackers.names import in_sections


class Service:
    """See `spo.trackers.tracker.Service`."""

    def __init__(self, recipe: Recipe, run: str | None, start: int):
        self.run, self.holds_before = "tensorboard", start
        # Readers drop the events of earlier files from `start` on.
        self._writer = SummaryWriter(str(recipe.out_dir / "tensorboard"), purge_step=start)
        settings = yaml.safe_dump(as_tree(recipe), sort_keys=False)
        self._writer.add_text("recipe", f"```\n{settings}```", start)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in in_sections(figures).items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()
