"""MLflow: a server or a database, else files in the run's folder."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from spo.config.recipe import Recipe, as_tree

PARAMS = 100  # that MLflow takes in one request


class Service:
    """See `spo.trackers.tracker.Service`. The caller's active run stays as it is."""

    holds_before = math.inf

    def __init__(self, recipe: Recipe, run: str | None, start: int):
        uri = None
        if not mlflow.is_tracking_uri_set():
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow asks for it
            uri = (recipe.out_dir / "mlruns").resolve().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        if run:
            self._client.update_run(run, status="RUNNING")
        self.run = run or self._new_run(recipe)

    def _new_run(self, recipe: Recipe) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "spo")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        run = self._client.create_run(experiment, run_name=recipe.name).info.run_id
        params = [Param(_allowed(key), str(value)) for key, value in _flat(as_tree(recipe))]
        for i in range(0, len(params), PARAMS):
            self._client.log_batch(run, params=params[i : i + PARAMS])
        return run

    def log(self, figures: Mapping[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [Metric(_allowed(name), value, now, step) for name, value in figures.items()]
        self._client.log_batch(self.run, metrics=metrics)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self.run, "FAILED" if failed else "FINISHED")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings by their dotted names."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _allowed(name: str) -> str:
    """The name, without characters that MLflow refuses."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
