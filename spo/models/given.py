"""A model that a Python caller has loaded: saved as a folder, which every part of a run reads."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from spo.models.files import quiet, start_folder, text_files


def is_loaded(policy: Any, tokenizer: Any = None) -> bool:
    """Whether it is a model, or another object, in place of the name of one.

    Raises ValueError for a tokenizer beside a name, whose folder has its own.
    """
    loaded = policy is not None and not isinstance(policy, str | os.PathLike | dict)
    if tokenizer is not None and not loaded:
        raise ValueError(
            f"tokenizer: expected none beside policy={policy!r}, whose folder has its own; it goes "
            "with a loaded model"
        )
    return loaded


def save_given(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model of transformers and its tokenizer as a folder.

    Args:
        tokenizer: of transformers; None takes the files of the folder the model was loaded from.

    Raises ValueError with one sentence if they cannot be saved.
    """
    if not isinstance(model, PreTrainedModel):
        merge = (
            ": merge its adapter first, merge_and_unload()" if hasattr(model, "peft_config") else ""
        )
        raise ValueError(
            "policy: expected a folder, a hub id or a loaded model of transformers, found "
            f"{type(model).__name__}{merge}"
        )
    try:
        with quiet():
            model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except Exception as error:  # of the model's own code
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(f"policy: {type(model).__name__} cannot be saved ({reason})") from error
    if tokenizer is None:
        try:
            source = start_folder(model.name_or_path or "")
        except (OSError, ValueError):
            raise ValueError(
                f"tokenizer: expected one beside this {type(model).__name__}, which was not loaded "
                "from a folder or the hub"
            ) from None
        for path in text_files(source):
            target = folder / path.relative_to(source)
            if not target.exists():  # the model's own settings stay
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
