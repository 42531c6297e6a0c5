"""Data sets of the hub: their files in its cache, and the configurations that a card lists.

Offline, a missing data set raises one sentence at once.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import yaml

from spo.tasks.files import READERS, short

CARD = "README.md"
HUB_TIMEOUT_S = 10.0  # of the request that shows whether the hub can be reached

_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+?))?/?")
_HEAD = re.compile(r"---\s*\n(.*?)\n---", re.DOTALL)


def hub_name(source: str) -> tuple[str, str | None, str]:
    """Repository, revision and path inside it. Raises ValueError if it cannot be a hub name."""
    match = _HUB.fullmatch(source)
    local = Path(source).suffix in READERS and source.count("/") < 2
    if match is None or local or source.startswith((".", "/", "~")):
        raise ValueError(f"data set {source}: there is no such file or folder")
    return match[1], match[2], match[3] or ""


def snapshot(source: str, repo: str, revision: str | None, inside: str) -> Path:
    """The folder of a data set's repository, with its data files below `inside`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # OSError and those of the transport in use
    unreachable: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
    try:
        # Asked first: a download would wait for the hub forever.
        HfApi().dataset_info(repo, revision=revision, timeout=HUB_TIMEOUT_S)
        return download(repo, revision, inside)
    except unreachable as error:
        try:
            return download(repo, revision, inside, local_files_only=True)
        except LocalEntryNotFoundError:
            raise ValueError(
                f"data set {source}: no such file or folder here, none in the hub's cache, and the "
                f"hub does not give it ({short(error)}); without a network, name local files"
            ) from error


def download(repo: str, revision: str | None, inside: str, **options: Any) -> Path:
    """The snapshot of a repository: its card, and the data files whose path begins with `inside`.

    With `inside=CARD` it is the card alone.
    """
    from huggingface_hub import snapshot_download

    one_file = Path(inside).suffix in READERS or inside == CARD
    files = [inside] if one_file else [f"{inside}*{kind}" for kind in READERS]
    options |= {"repo_type": "dataset", "revision": revision, "allow_patterns": [CARD, *files]}
    return Path(snapshot_download(repo, **options))


def configurations(folder: Path) -> list[str]:
    """The names of the configurations that the card of a data set lists."""
    try:
        head = _HEAD.match((folder / CARD).read_text("utf-8"))
        listed = (yaml.safe_load(head[1]) if head else {}).get("configs") or []
        return [str(entry["config_name"]) for entry in listed]
    except (OSError, ValueError, yaml.YAMLError, AttributeError, TypeError, KeyError):
        return []  # no card, or one for readers only


def card_files(source: str, folder: Path, name: str) -> dict[str, list[Path]]:
    """Split -> files of a configuration, as the card lists them."""
    from datasets import load_dataset_builder

    try:
        with tempfile.TemporaryDirectory() as cache:
            found = load_dataset_builder(str(folder), name, cache_dir=cache).config.data_files or {}
    except (ValueError, OSError) as error:
        raise ValueError(f"data set {source}: no folder {name}, and {short(error)}") from error
    return {str(split): [Path(file) for file in files] for split, files in found.items()}
