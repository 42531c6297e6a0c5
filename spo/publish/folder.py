"""`spo export`: a policy of a run as a folder that needs nothing of the run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from spo.config.policy import PolicyConfig
from spo.config.recipe import Recipe
from spo.learn.best import RECORD
from spo.learn.checkpoint import BEST, choose, load_saved, load_weights, whole_folder
from spo.learn.distributed import Whole
from spo.learn.policy_folder import save_merged, save_policy, whole_policy
from spo.metrics import read_metrics
from spo.models.files import from_pretrained
from spo.models.load import policy_class
from spo.models.tokenizer import load_tokenizer, sampling_of
from spo.publish.card import Trained, model_card

DTYPES = ("stored", "bfloat16", "float32")


def export(
    path: str | os.PathLike,
    output: str | os.PathLike | None = None,
    *,
    checkpoint: str | None = None,
    dtype: str = "stored",
    merge: bool = False,
    name: str | None = None,
) -> Path:
    """Write a policy as a folder for others: weights, tokenizer, settings and a model card.

    Args:
        path: a run folder, or one checkpoint of a run.
        output: a folder that is empty or not there yet; by default `export` in the run's folder.
        checkpoint: of the run, iter-000010 or best; by default the newest.
        dtype: of the weights: as they are stored, bfloat16, or float32, which has every bit of
            training that the checkpoint holds.
        merge: write a whole model where the policy is an adapter.
        name: the hub id that the folder will have, for the card.

    Raises ValueError with one sentence if there is no such policy, or if the folder is not empty.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected {', '.join(DTYPES)}, found {dtype!r}")
    source = choose(Path(path), checkpoint)
    if output is None and source == Path(path):
        raise ValueError(f"output: expected a folder for the export of {source}, found none")
    target = (Path(path) / "export" if output is None else Path(output)).resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        what = "one that is not empty" if target.is_dir() else "a file"
        raise ValueError(f"output: expected an empty or a new folder, found {what}, {target}")
    recipe = load_saved(source)
    if recipe.policy.lora is not None and not merge:
        raise ValueError(
            f"merge: expected --merge, which writes a whole model, as {source / 'policy'} holds an "
            "adapter; peft loads that as it is"
        )
    with whole_folder(target) as folder:
        _write_policy(source, folder, recipe.policy, dtype)
        written = dataclasses.replace(recipe.policy, path=str(folder))
        _write_stops(folder, dataclasses.replace(recipe, policy=written))
        auto, _ = policy_class(str(folder), trust_remote_code=written.trust_remote_code)
        card = model_card(recipe, _trained(source), auto.__name__, target.name, name)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return target


def load_trained(source: Path, config: PolicyConfig, dtype: Any = "auto") -> PreTrainedModel:
    """The policy of a checkpoint as transformers loads it, on the CPU."""
    trusted = {"trust_remote_code": config.trust_remote_code}
    with whole_policy(source, config) as folder:
        auto, _ = policy_class(str(folder), **trusted)
        return from_pretrained(auto, str(folder), dtype=dtype, **trusted)


def _write_policy(source: Path, folder: Path, config: PolicyConfig, dtype: str) -> None:
    """The policy's files; with another type, its exact weights where the checkpoint has these."""
    chosen = None if dtype == "stored" else getattr(torch, dtype)
    if config.lora is not None:
        save_merged(folder, config, source / "policy", chosen)
    elif chosen is None:
        shutil.copytree(
            source / "policy", folder, copy_function=shutil.copyfile, dirs_exist_ok=True
        )
    else:
        model = load_trained(source, config, torch.float32)
        load_weights(source, model)
        start = dataclasses.replace(config, path=str(source / "policy"))
        save_policy(folder, start, model, Whole(model, None).weights, chosen)
    if chosen is None:
        return
    path = folder / "config.json"
    settings = _with_dtype(json.loads(path.read_text(encoding="utf-8")), dtype)
    path.write_text(json.dumps({"dtype": dtype} | settings, indent=2) + "\n", encoding="utf-8")


def _with_dtype(settings: Any, dtype: str) -> Any:
    """A config.json that names another type of the weights, wherever it names one."""
    if not isinstance(settings, dict):
        return settings
    return {
        key: dtype if key in ("dtype", "torch_dtype") else _with_dtype(value, dtype)
        for key, value in settings.items()
    }


def _write_stops(folder: Path, recipe: Recipe) -> None:
    """Add to generation_config.json the tokens that ended responses in training and that it lacks.

    The tokenizer's end token and `sampling.stop_token_ids` may stand in no file of the policy.
    """
    stops = sampling_of(recipe, load_tokenizer(recipe.policy)).stop_token_ids
    path, config = folder / "generation_config.json", folder / "config.json"
    if path.exists():
        settings = json.loads(path.read_text(encoding="utf-8"))
    else:
        known = json.loads(config.read_text(encoding="utf-8"))
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        settings = {name: known[name] for name in names if known.get(name) is not None}
    named = settings.get("eos_token_id")
    named = named if isinstance(named, list) else [] if named is None else [named]
    if set(stops) - set(named):
        settings["eos_token_id"] = list(dict.fromkeys([*named, *stops]))
        path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _trained(source: Path) -> Trained:
    """What the run around a policy says about it."""
    state = source / (RECORD if (source / RECORD).exists() else "state.json")
    iteration = json.loads(state.read_text())["iteration"]
    kept = source.resolve().parent
    metrics = kept.parent / "metrics.jsonl"
    inside = kept.name in ("checkpoints", BEST) and metrics.exists()
    lines = read_metrics(metrics) if inside else []
    versions = json.loads((source / "versions.json").read_text())
    known = [
        line for line in lines if line["iteration"] < iteration + (line["stage"] == "eval")
    ]  # an evaluation comes before the training of its iteration
    return Trained(iteration, known, versions)
