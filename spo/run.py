"""`spo.Run`: a run as a person asks its folder for the trained model, scores and forests.

    run = spo.train("spo-tree", policy="my/model", data=rows, reward=reward)
    run.scores["greedy"]                        # 0.812 ± 0.039
    run.model.generate(...)

What is read from a file is read when it is asked for. `spo.Run("runs/mine")` opens an earlier run.
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from spo.config.recipe import Recipe
from spo.forest import Forest
from spo.learn.checkpoint import BEST, choose, load_saved
from spo.metrics import plus_minus, read_metrics, scored
from spo.models.tokenizer import load_tokenizer
from spo.publish.folder import export, load_trained
from spo.publish.hub import push_to_hub
from spo.report.pages import write_run_page


class Score(NamedTuple):
    """A mean over problems and its standard error, NaN where one problem gives none."""

    mean: float
    stderr: float

    def __str__(self) -> str:
        return plus_minus(self.mean, self.stderr)


class Run:
    """The folder of a run. Raises ValueError if there is no run in it."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        if not (self.folder / "metrics.jsonl").is_file():
            raise ValueError(f"expected a run folder, found no metrics.jsonl in {self.folder}")

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        scores = ", ".join(f"{key} {score}" for key, score in self.scores.items())
        return f"<spo.Run {self.folder}: {scores or 'not evaluated yet'}>"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: `stage` is train, eval or skipped (spo/metrics.py)."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def scores(self) -> dict[str, Score]:
        """The figures of the last evaluation (docs/evaluation.md), such as `greedy`; {} if none."""
        lines = [line for line in self.metrics if line["stage"] == "eval"]
        last = lines[-1] if lines else {}
        return {key: Score(last[key], last[f"{key}_stderr"]) for key in scored(last)}

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint; its folder `policy` is the trained model as others load it."""
        return choose(self.folder)

    @property
    def best(self) -> Path:
        """The policy that `train.keep_best` kept, in a folder as that of a checkpoint."""
        return choose(self.folder, BEST)

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe that the newest checkpoint was saved with."""
        return load_saved(self.checkpoint)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The trained model, loaded by transformers in the type it is stored in, on the CPU, with
        adapters merged in."""
        return load_trained(self.checkpoint, self.recipe.policy)

    @cached_property
    def tokenizer(self) -> Any:
        """The policy's tokenizer."""
        return load_tokenizer(self.recipe.policy)

    def forest(self, which: str = "last") -> Forest:
        """The forest of the `first` or the `last` iteration (docs/forest.md)."""
        path = self.folder / f"forest-{which}.safetensors"
        if not path.is_file():
            raise ValueError(f"expected a forest first or last in {self.folder}, found no {which}")
        return Forest.load(path)

    def report(self, output: str | os.PathLike | None = None) -> Path:
        """Write the HTML page of curves and trees, by default report.html in the folder."""
        return write_run_page(self.folder, None if output is None else Path(output))

    def export(
        self,
        output: str | os.PathLike | None = None,
        *,
        checkpoint: str | None = None,
        dtype: str = "stored",
        merge: bool = False,
    ) -> Path:
        """Write the policy as a folder for others, with a model card; returns the folder.

        Args:
            output: an empty or a new folder, by default `export` in the run's.
            checkpoint: iter-000010 or best; by default the newest.
            dtype: stored, bfloat16 or float32.
            merge: adapters into the weights; the export of a run with `policy.lora` needs it.
        """
        return export(self.folder, output, checkpoint=checkpoint, dtype=dtype, merge=merge)

    def push_to_hub(
        self,
        name: str,
        *,
        private: bool = False,
        checkpoint: str | None = None,
        dtype: str = "stored",
        merge: bool = False,
    ) -> str:
        """Upload such a folder as the hub's model OWNER/NAME; returns its address."""
        chosen = {"checkpoint": checkpoint, "dtype": dtype, "merge": merge}
        return push_to_hub(self.folder, name, private=private, **chosen)
