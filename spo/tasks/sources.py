"""Rows of data sets, read with `datasets`: files and folders of this machine or of the hub.

Offline, a missing data set raises one sentence at once. The `datasets` library only reads files.
This module decides which files, and in which order, so that streams of problems stay the same.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spo.tasks.problem import Problem

READERS = {  # if a folder holds several kinds, the first of these is read
    ".parquet": "parquet",
    ".arrow": "arrow",  # as `save_to_disk` writes it
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
}
KINDS = ", ".join(READERS)
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {name: "validation" for name in ("validation", "valid", "val", "dev")}
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
CARD = "README.md"
HUB_TIMEOUT_S = 10.0  # of the request that shows whether the hub can be reached
MANY = 64  # this many files or more are opened together, which is ten times as fast

_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+?))?/?")


def read_problems(
    task: str,
    split: str,
    source: str | None,
    problem_of: Callable[[dict, str], Problem],
    *,
    every_file: bool = False,
) -> list[Problem]:
    """The problems of one split, in the order of the source.

    Args:
        source: a file, which is read as a whole; a folder, whose files are read if their path names
            the split (all files, if no path names a split); or a hub data set `owner/name`,
            optionally with a revision, `owner/name@revision`, and with a folder, a file or a
            configuration, `owner/name/folder`.
        problem_of: makes a problem from a row (lower-case column name -> value) and from the row's
            location, which it names in errors.
        every_file: also read files of other splits.

    Raises ValueError with one sentence if there is nothing to read or a file is damaged.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split: expected "train" or "test", found {split!r}')
    if source is None:
        raise ValueError(f"{task} has no {split} problems: name a file in data.{split} to use one")
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"task {task} reads data sets: pip install 'spo-kernels[train]'")
    rows = _rows(_paths(source, None if every_file else split))
    if not rows:
        raise ValueError(f"data set {source}: its {split} files hold no rows")
    return [problem_of({name.lower(): v for name, v in row.items()}, at) for row, at in rows]


def state(source: str) -> str:
    """Whether `source` is "local", "cached" from the hub, or a "download"; asks no server."""
    if Path(source).exists():
        return "local"
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        _download(*_hub_name(source), local_files_only=True)
    except LocalEntryNotFoundError:
        return "download"
    return "cached"


# Which files


def _paths(source: str, split: str | None) -> list[Path]:
    """The files to read, those of a folder in a fixed order."""
    root = Path(source)
    if not root.exists():
        repo, revision, inside = _hub_name(source)
        folder = _snapshot(source, repo, revision, inside)
        root = folder / inside
        if not root.exists():
            return _configured(source, _snapshot(source, repo, revision, ""), inside, split)
    if root.is_file():
        return [root]
    files = [p.relative_to(root) for p in root.rglob("*") if p.suffix in READERS and p.is_file()]
    files = [path for path in files if not _is_about(path)]
    found = {name for name in map(_split_of, files) if name}
    if split is not None and found:
        files = [path for path in files if _split_of(path) == split]
    if not files:
        held = f"it holds {', '.join(sorted(found))}" if found else f"none ends in {KINDS}"
        raise ValueError(f"data set {source}: no {split or 'data'} files; {held}")
    kind = min((path.suffix for path in files), key=list(READERS).index)
    return [root / path for path in sorted(files, key=_in_order) if path.suffix == kind]


def _is_about(path: Path) -> bool:
    """Whether a file describes the data set or is a cache of the `datasets` library."""
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or path.name in ABOUT or path.name.startswith("cache-")


def _split_of(path: Path) -> str | None:
    """The split that a path names, the innermost part first: train/algebra/1.json."""
    for part in reversed(path.with_suffix("").parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None


def _in_order(path: Path) -> tuple:
    """Sorts 2.json before 10.json."""
    parts = re.split(r"([0-9]+)", path.as_posix())
    return tuple((int(p), "") if p.isdecimal() else (-1, p) for p in parts)


# The hub


def _hub_name(source: str) -> tuple[str, str | None, str]:
    """Repository, revision and path inside it. Raises ValueError if it cannot be a hub name."""
    match = _HUB.fullmatch(source)
    local = Path(source).suffix in READERS and source.count("/") < 2
    if match is None or local or source.startswith((".", "/", "~")):
        raise ValueError(f"data set {source}: there is no such file or folder")
    return match[1], match[2], match[3] or ""


def _snapshot(source: str, repo: str, revision: str | None, inside: str) -> Path:
    """The folder of a data set's repository, with its data files below `inside`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # OSError and those of the transport in use
    unreachable: tuple[type[Exception], ...] = HfHubHTTPError.__bases__
    try:
        # Asked first: a download would wait for the hub forever.
        HfApi().dataset_info(repo, revision=revision, timeout=HUB_TIMEOUT_S)
        return _download(repo, revision, inside)
    except unreachable as error:
        try:
            return _download(repo, revision, inside, local_files_only=True)
        except LocalEntryNotFoundError:
            raise ValueError(
                f"data set {source}: no such file or folder here, none in the hub's cache, and the "
                f"hub does not give it ({_short(error)}); without a network, name local files"
            ) from error


def _download(repo: str, revision: str | None, inside: str, **options: Any) -> Path:
    from huggingface_hub import snapshot_download

    one_file = Path(inside).suffix in READERS
    files = [inside] if one_file else [f"{inside}*{kind}" for kind in READERS]
    options |= {"repo_type": "dataset", "revision": revision, "allow_patterns": [CARD, *files]}
    return Path(snapshot_download(repo, **options))


def _configured(source: str, folder: Path, name: str, split: str | None) -> list[Path]:
    """The files of a configuration, as the data set's card lists them."""
    from datasets import load_dataset_builder

    try:
        with tempfile.TemporaryDirectory() as cache:
            found = load_dataset_builder(str(folder), name, cache_dir=cache).config.data_files or {}
    except (ValueError, OSError) as error:
        raise ValueError(f"data set {source}: no folder {name}, and {_short(error)}") from error
    files = [f for key in found if split in (None, SPLITS.get(key)) for f in found[key]]
    if not files:
        raise ValueError(f"data set {source}: no {split} files; it holds {', '.join(found)}")
    return [Path(file) for file in files]


# Files


def _rows(paths: Sequence[Path]) -> list[tuple[dict, str]]:
    """The rows of files of one kind, each with its location."""
    if len(paths) >= MANY:
        try:
            rows = _read(paths)
        except ValueError:
            rows = []  # read one by one: to name the bad file, or because columns differ
        if len(rows) == len(paths):
            return list(zip(rows, map(str, paths), strict=True))
    found: list[tuple[dict, str]] = []
    for path in paths:
        rows = _read([path])
        several = len(rows) > 1
        found += [(r, f"{path}, row {i}" if several else str(path)) for i, r in enumerate(rows, 1)]
    return found


def _read(paths: Sequence[Path]) -> list[dict]:
    import datasets.config
    import pyarrow

    kind = paths[0].suffix
    if kind not in READERS:
        raise ValueError(f"data file {paths[0]}: expected {KINDS}, found {kind or 'no suffix'}")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else it tells the hub of local files too
    try:
        # The first chunk decides the types of columns, so it must be the whole file.
        size = max(path.stat().st_size for path in paths) + 1
        options = {
            "json": {"chunksize": size},
            "csv": {"chunksize": size, "keep_default_na": False},  # "None" may be an answer
        }.get(READERS[kind], {})
        # Streaming writes nothing but locks.
        with tempfile.TemporaryDirectory() as cache:
            files = [glob.escape(str(path.absolute())) for path in paths]
            return list(
                datasets.load_dataset(
                    READERS[kind],
                    data_files=files,
                    split="train",
                    streaming=True,
                    cache_dir=cache,
                    **options,
                )
            )
    except StopIteration:  # raised by the library for an empty JSON file
        return []
    except OSError as error:
        raise ValueError(f"data file {paths[0]}: cannot be read ({_short(error)})") from error
    except (ValueError, TypeError, RecursionError, pyarrow.ArrowException) as error:
        line = _damaged_line(paths[0]) if kind == ".jsonl" else ""
        reason = f"damaged or of another kind ({_short(error)})"
        raise ValueError(f"data file {paths[0]}{line}: {reason}") from error


def _damaged_line(path: Path) -> str:
    """The first line that is not JSON; the library only counts rows within a block of the file."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                json.loads(line.strip() or b"0")
            except (ValueError, RecursionError):
                return f", line {number}"
    return ""


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
