"""The folder of a trained policy, which others read as they read that of the start policy."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from spo.config.policy import PolicyConfig
from spo.learn.lora import attach, load_adapter, merged, quantization, save_adapter
from spo.learn.policy import load_model
from spo.models.files import ADAPTER, quiet, start_folder, text_files
from spo.models.tokenizer import load_pretrained

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Types of tensors in a safetensors file; quantised ones are left to transformers."""
CHANGING = {"_name_or_path", "dtype", "torch_dtype", "transformers_version"}


def save_policy(
    folder: Path,
    config: PolicyConfig,
    model: PreTrainedModel,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Write a policy's folder: the start policy's files around the trained weights in its dtypes.

    config.json is the start policy's own if transformers reads the one it would write alike: other
    versions of transformers write other keys, and read those of this version as defaults.

    Args:
        weights: the model's parameters and saved buffers by name.
        dtype: of the written weights, in place of the start policy's; config.json stays as it is.

    Returns the weights that lost bits when they were cast; training goes on from these.
    """
    source = start_folder(config.source)
    if dtype is None:
        stored = as_stored(config, weights.items(), model.base_model_prefix)
    else:
        stored = ((n, t.to(dtype) if t.is_floating_point() else t) for n, t in weights.items())
    cast = {name: tensor.cpu() for name, tensor in stored}
    generation = model.generation_config
    model.generation_config = GenerationConfig()  # some of the hub's are refused when written
    with quiet():
        model.save_pretrained(folder, state_dict=dict(cast))
    model.generation_config = generation
    _, usual = stored_dtypes(source)
    alike = _settings(config, folder) == _settings(config, source)
    for path in list(text_files(folder)):
        if alike or path.name == "generation_config.json":
            path.unlink()
    if not alike and usual is not None:
        path = folder / "config.json"
        settings = json.loads(path.read_text()) | {"dtype": str(usual).removeprefix("torch.")}
        path.write_text(json.dumps(settings, indent=2) + "\n")
    for path in text_files(source):
        if alike or path.name != "config.json":
            target = folder / path.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
    return {
        name: tensor
        for name, tensor in weights.items()
        if torch.promote_types(tensor.dtype, cast[name].dtype) != cast[name].dtype
    }


def save_trained(
    folder: Path, config: PolicyConfig, model: PreTrainedModel, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Write what a run trains: the policy, as `save_policy` does, or its adapters alone."""
    if config.lora is None:
        return save_policy(folder, config, model, weights)
    save_adapter(folder, config, model)
    return {}


@contextmanager
def whole_policy(checkpoint: Path, config: PolicyConfig) -> Iterator[Path]:
    """The folder of a checkpoint's policy; a merged one for this time if it holds adapters."""
    folder = checkpoint / "policy"
    if not (folder / ADAPTER).is_file():
        yield folder
        return
    with TemporaryDirectory(prefix="spo-policy-") as scratch:
        whole = Path(scratch) / "policy"
        save_merged(whole, config, folder)
        yield whole


def save_merged(
    folder: Path, config: PolicyConfig, adapter: Path, dtype: torch.dtype | None = None
) -> None:
    """Write a policy's folder with the adapters of the folder `adapter` merged into its weights.

    Weights that are held in 4 bits for training are merged as they are then.
    """
    assert config.lora is not None
    model = load_model(config, **quantization(config.lora))
    attach(model, config, seed=0)
    load_adapter(adapter, model)
    whole = load_model(dataclasses.replace(config, lora=None))
    save_policy(folder, config, whole, dict(merged(model)), dtype)


def as_stored(
    config: PolicyConfig, weights: Iterable[tuple[str, Tensor]], prefix: str
) -> Iterator[tuple[str, Tensor]]:
    """The weights in the types in which the start policy's folder holds them.

    Args:
        prefix: of the names of a model's body, which the files of a body alone do not have.
    """
    known, usual = stored_dtypes(start_folder(config.source))
    for name, tensor in weights:
        inside = name.removeprefix(f"{prefix}.")
        dtype = known.get(name, known.get(inside, usual)) if tensor.is_floating_point() else None
        yield name, tensor if dtype is None else tensor.to(dtype)


def stored_dtypes(folder: Path) -> tuple[dict[str, torch.dtype | None], torch.dtype | None]:
    """Name -> type of each tensor in a folder's safetensors files, and the type of most weights.

    None stands for a type that is not in DTYPES.
    """
    found: dict[str, torch.dtype | None] = {}
    sizes: Counter[torch.dtype | None] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  # not a mapping
                part = file.get_slice(name)
                found[name] = DTYPES.get(part.get_dtype())
                sizes[found[name]] += prod(part.get_shape())
    return found, sizes.most_common(1)[0][0] if sizes else None


def _settings(config: PolicyConfig, folder: Path) -> Any:
    """What transformers reads in config.json, without the type of the weights."""

    def kept(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: kept(x) for key, x in value.items() if key not in CHANGING}
        return value

    return kept(load_pretrained(AutoConfig, config, str(folder)).to_dict())
