"""What a policy's folder must hold, and one sentence for each thing that it lacks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

ADAPTER = "adapter_config.json"  # of peft
OLD = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt")  # weights in other formats


def from_pretrained(auto: Any, name: str, **options: Any) -> Any:
    """`auto.from_pretrained`, of a class of transformers.

    Raises ValueError with one sentence if it cannot be loaded.
    """
    require_folder(name)
    try:
        return auto.from_pretrained(name, **options)
    except Exception as error:  # of the model's own code, or of a file that is none
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"policy.path: {name} cannot be loaded ({reason})") from error


def require_folder(name: str) -> None:
    """Raise ValueError with one sentence if `name` can only be a folder, and it holds no model."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"policy.path: expected a folder or a hub id, {name} is a file")
        if folder.is_absolute() or name.count("/") > 1 or name.startswith((".", "~", os.sep)):
            raise ValueError(f"policy.path: there is no folder {name}")
        return  # a hub id, perhaps
    if (folder / "config.json").is_file():
        return
    if (folder / ADAPTER).is_file():
        base = _base_model(folder / ADAPTER)
        raise ValueError(
            f"policy.path: {name} holds an adapter of {base}, no whole model: merge it with peft's "
            "merge_and_unload() and save that with its tokenizer"
        )
    if (folder / "policy" / "config.json").is_file():
        raise ValueError(
            f"policy.path: {name} is a checkpoint, its model lies in {folder / 'policy'}"
        )
    raise ValueError(f"policy.path: {name} holds no config.json")


def require_weights(name: str) -> None:
    """Raise ValueError with one sentence if a folder holds no weights in safetensors."""
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    other = sorted(path.name for pattern in OLD for path in folder.glob(pattern))
    found = f"only {other[0]}, which transformers loads and writes anew" if other else "none"
    raise ValueError(f"policy.path: expected weights as *.safetensors in {name}, found {found}")


def _base_model(path: Path) -> str:
    """The model that an adapter belongs to, as its settings say."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another model"
