"""What a policy's folder must hold, and one sentence for each thing that it lacks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import logging
from transformers.utils.hub import cached_file

TEXT = {".json", ".jinja", ".txt", ".model", ".tiktoken", ".bpe", ".py"}
"""Files besides the weights: configurations, tokenizers, chat templates, code."""
ADAPTER = "adapter_config.json"  # of peft
QUANTISED = {"I8", "U8", "F8_E4M3", "F8_E5M2"}  # types of a safetensors file
OLD = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.ckpt")  # weights in other formats


def from_pretrained(auto: Any, name: str, **options: Any) -> Any:
    """`auto.from_pretrained`, of a class of transformers.

    Raises ValueError with one sentence if it cannot be loaded.
    """
    require_folder(name)
    try:
        with quiet():
            return auto.from_pretrained(name, **options)
    except Exception as error:  # of the model's own code, or of a file that is none
        reason = " ".join(str(error).split())[:300]
        what = "cannot be loaded"
        if not Path(name).is_dir():
            what = "is no folder here, and as a hub id it cannot be loaded"
        raise ValueError(f"policy.path: {name} {what} ({reason})") from error


def start_folder(name: str) -> Path:
    """The folder of a model; for a hub id its snapshot in the cache."""
    found = cached_file(name, "config.json")
    assert found is not None  # it raises OSError if there is none
    return Path(found).parent


def text_files(folder: Path) -> Iterator[Path]:
    """A model's files besides its weights."""
    for path in (*folder.glob("*"), *folder.glob("additional_chat_templates/*")):
        if path.is_file() and path.suffix in TEXT and not path.name.endswith(".index.json"):
            yield path


@contextmanager
def quiet() -> Iterator[None]:
    """Loads and saves without transformers' progress bars and reports; a download shows its bar.

    What matters of a report is checked here, and said in a sentence.
    """
    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging._tqdm_active = False  # its own switch turns the hub's bars off as well
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging._tqdm_active = shown
        logging.set_verbosity(level)


def require_folder(name: str) -> None:
    """Raise ValueError with one sentence if `name` can only be a folder, and it holds no model."""
    folder = Path(name)
    if not name.strip():
        raise ValueError(f"policy.path: expected a folder or a hub id, found {name!r}")
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"policy.path: expected a folder or a hub id, {name} is a file")
        if folder.is_absolute() or name.count("/") > 1 or name.startswith((".", "~", os.sep)):
            raise ValueError(f"policy.path: there is no folder {name}")
        return  # a hub id, perhaps
    whole = (folder / "config.json").is_file()
    if whole and (folder / ADAPTER).is_file():
        raise ValueError(
            f"policy.path: expected one model, {name} holds an adapter ({ADAPTER}) beside one, and "
            "it would not be used: merge it or move it away"
        )
    if whole:
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
    if (folder / "checkpoints").is_dir():
        raise ValueError(
            f"policy.path: {name} is a run, its models lie in {folder / 'checkpoints'}, each in a "
            "folder policy"
        )
    raise ValueError(f"policy.path: {name} holds no config.json")


def require_weights(name: str) -> None:
    """Raise ValueError with one sentence if a folder holds no weights in safetensors, or weights of
    eight bits whose scales its config.json does not describe.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    if any(folder.glob("*.safetensors")):
        _require_scales(folder)
        return
    other = sorted(path.name for pattern in OLD for path in folder.glob(pattern))
    found = f"only {other[0]}, which transformers loads and writes anew" if other else "none"
    raise ValueError(f"policy.path: expected weights as *.safetensors in {name}, found {found}")


def _require_scales(folder: Path) -> None:
    """Raise ValueError if weights are quantised and nothing says how."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "quantization_config" in settings:
            return
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                for key in file.keys():  # noqa: SIM118  # not a mapping
                    if key.endswith("weight") and file.get_slice(key).get_dtype() in QUANTISED:
                        raise ValueError(
                            f"policy.path: expected a quantization_config in {folder}/config.json, "
                            f"as {key} is quantised, found none"
                        )
    except (OSError, json.JSONDecodeError, TypeError, SafetensorError):
        return  # transformers says what is wrong


def _base_model(path: Path) -> str:
    """The model that an adapter belongs to, as its settings say."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another model"
