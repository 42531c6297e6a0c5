"""`--push-to-hub`: an exported folder as a model of the hub."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from spo.publish.folder import export
from spo.tasks.files import short

# OSError and those of the transport in use
UNREACHABLE: tuple[type[Exception], ...] = HfHubHTTPError.__bases__


def push_to_hub(
    path: str | os.PathLike,
    name: str,
    output: str | os.PathLike | None = None,
    *,
    private: bool = False,
    **options: Any,
) -> str:
    """Export a policy and upload the folder as the hub's model `name`; returns its address.

    Args:
        path, options: see `spo.publish.folder.export`.
        name: OWNER/NAME. A repository that is there gets a new commit.
        output: keep the folder there; by default it is a temporary one.
        private: of a repository that is made now; by default the hub decides.

    Raises ValueError before anything is written if the name or the token is missing or offline mode
    is on, RuntimeError if the hub cannot be reached or refuses.
    """
    _check(name)
    with TemporaryDirectory(prefix="spo-export-") as scratch:
        kept = Path(scratch) / name.rpartition("/")[2] if output is None else output
        folder = export(path, kept, name=name, **options)
        api = HfApi()
        try:
            api.create_repo(name, private=private or None, exist_ok=True)
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="spo export")
        except UNREACHABLE as error:
            raise RuntimeError(f"push to {api.endpoint}/{name} failed: {short(error)}") from error
    return f"{api.endpoint}/{name}"


def _check(name: str) -> None:
    """Raise ValueError if an upload cannot work from here."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"push_to_hub: expected OWNER/NAME, found {name} ({error})") from error
    if "/" not in name:
        raise ValueError(f"push_to_hub: expected OWNER/NAME, found {name}")
    if is_offline_mode():
        raise ValueError(
            "push_to_hub: expected a connection to the hub, found offline mode; unset "
            "HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
        )
    if get_token() is None:
        raise ValueError(
            "push_to_hub: expected a token of the hub, found none; run `hf auth login` or set "
            "HF_TOKEN"
        )
