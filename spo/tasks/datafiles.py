"""Rows of data sets as their publishers ship them: JSON, JSON lines, parquet and Arrow files,
local or from the hub. Offline, a missing data set is one sentence at once.
"""

from __future__ import annotations

import json
import random
import re
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from spo.tasks.problem import Problem

KINDS = (".parquet", ".arrow", ".jsonl", ".json")  # of several kinds in a folder the first is read
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {name: "validation" for name in ("validation", "valid", "val", "dev")}
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
HUB_TIMEOUT_S = 10.0  # of the one question that shows whether the hub can be reached

_HUB = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/(.+?))?/?")

Row = tuple[dict, str]  # column name in lower case -> value; where the row stands, for errors


def read_rows(source: str, split: str, *, every_file: bool = False) -> list[Row]:
    """All rows of one split.

    Args:
        source: a file, which is read whole; a folder, of which the files are read whose path
            names the split (all, if no path names any); or a hub data set `owner/name`, optionally
            `owner/name@revision` and with a folder or file in it, `owner/name/folder`.
        every_file: read files of other splits too.

    Raises ValueError with one sentence if there is nothing to read or a file is damaged.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    wanted = None if every_file else split
    rows = [row for path in _paths(source, wanted) for row in _read(path)]
    if not rows:
        raise ValueError(f"data set {source}: its {split} files hold no rows")
    return rows


def problem_stream(
    name: str, split: str, seed: int, problems: Sequence[Problem]
) -> Iterator[Problem]:
    """ "test" gives the problems once, in their order; "train" shuffles them again and again."""
    if split == "test":
        yield from problems
        return
    rng = random.Random(f"{name} train {seed}")
    while True:
        yield from rng.sample(problems, len(problems))


def column(row: dict, where: str, *names: str) -> object:
    """The first of the named columns that the row has. Raises ValueError if it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise ValueError(f"{where}: expected a column {' or '.join(names)}, found {', '.join(row)}")


def state(source: str) -> str:
    """Whether `source` is "local", "cached" from the hub, or would be a "download"; asks no one."""
    if Path(source).exists():
        return "local"
    repo, revision, _ = _hub_name(source)
    return "download" if _cached(repo, revision) is None else "cached"


def _paths(source: str, split: str | None) -> list[Path]:
    """The files to read, in a fixed order."""
    root = Path(source)
    if root.is_file():
        return [root]
    if root.is_dir():
        names = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
        return [root / name for name in _choose(source, names, split)]
    return _hub_paths(source, split)


def _choose(source: str, names: Sequence[str], split: str | None) -> list[str]:
    """The data files of a split among the names of all files, relative to the source."""
    data = [n for n in names if PurePosixPath(n).suffix in KINDS and not _is_about(n)]
    found = {_split_of(n) for n in data} - {None}
    if split is not None and found:
        data = [n for n in data if _split_of(n) == split]
    if not data:
        held = f"it holds {', '.join(sorted(found))}" if found else f"none ends in {_kinds()}"
        raise ValueError(f"data set {source}: no {split or 'data'} files; {held}")
    kind = min((PurePosixPath(n).suffix for n in data), key=KINDS.index)
    return sorted((n for n in data if n.endswith(kind)), key=_in_order)


def _is_about(name: str) -> bool:
    """Whether a file describes the data set or is a cache of the `datasets` library."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or path.name in ABOUT or path.name.startswith("cache-")


def _split_of(name: str) -> str | None:
    """The split that a path names, the innermost part first: train/algebra/1.json."""
    path = PurePosixPath(name)
    for part in (path.stem, *reversed(path.parent.parts)):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None


def _in_order(name: str) -> tuple:
    """Sorts 2.json before 10.json."""
    return tuple((int(p), "") if p.isdecimal() else (-1, p) for p in re.split(r"([0-9]+)", name))


def _kinds() -> str:
    return ", ".join(KINDS)


# The hub


def _hub_name(source: str) -> tuple[str, str | None, str | None]:
    """Repository, revision and path inside it. Raises ValueError where it can be none."""
    match = _HUB.fullmatch(source)
    local = Path(source).suffix in KINDS and source.count("/") < 2
    if match is None or local or source.startswith((".", "/", "~")):
        raise ValueError(f"data set {source}: there is no such file or folder")
    return match[1], match[2], match[3]


def _hub_paths(source: str, split: str | None) -> list[Path]:
    from huggingface_hub import hf_hub_download

    repo, revision, inside = _hub_name(source)
    try:
        names, commit = _ask_hub(repo, revision)
        names = _inside(source, names, inside, split)
        return [
            Path(hf_hub_download(repo, name, repo_type="dataset", revision=commit))
            for name in names
        ]
    except OSError as error:
        folder = _cached(repo, revision)
        if folder is None:
            raise ValueError(
                f"data set {source}: no such file or folder here, none in the hub's cache, and the "
                f"hub does not give it ({error}); where there is no network, name local files"
            ) from error
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    return [folder / name for name in _inside(source, names, inside, split)]


def _ask_hub(repo: str, revision: str | None) -> tuple[list[str], str]:
    """The names of a data set's files and its commit. Raises OSError at once if offline.

    Asked here and not through huggingface_hub, which retries and whose errors are those of a
    transport that changes with its version.
    """
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    url = f"{constants.ENDPOINT}/api/datasets/{repo}/revision/{revision or 'main'}"
    headers = {"Authorization": f"Bearer {token}"} if (token := get_token()) else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S) as response:
        info = json.load(response)
    return [file["rfilename"] for file in info["siblings"]], info["sha"]


def _inside(source: str, names: Sequence[str], inside: str | None, split: str | None) -> list[str]:
    """`_choose` within a folder of the repository, or the one file that was named."""
    if inside is None:
        return _choose(source, names, split)
    if inside in names:
        return [inside]
    below = [n.removeprefix(f"{inside}/") for n in names if n.startswith(f"{inside}/")]
    return [f"{inside}/{n}" for n in _choose(source, below, split)]


def _cached(repo: str, revision: str | None) -> Path | None:
    """The snapshot that an earlier download left, without asking the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(repo, repo_type="dataset", revision=revision, local_files_only=True)
        )
    except LocalEntryNotFoundError:
        return None


# Files


def _read(path: Path) -> list[Row]:
    import pyarrow  # slow to import, and the grading worker does without

    try:
        rows = _READERS.get(path.suffix, _unknown)(path)
    except OSError as error:
        raise ValueError(f"data file {path}: cannot be read ({error})") from error
    except (UnicodeDecodeError, pyarrow.ArrowException, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"data file {path}: damaged or of another kind ({reason})") from error
    named = []
    for i, row in enumerate(rows, 1):
        where = f"{path}, row {i}" if len(rows) > 1 else str(path)
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with named columns, found {row!r:.60}")
        named.append(({str(key).lower(): value for key, value in row.items()}, where))
    return named


def _json(path: Path) -> list:
    """One object (MATH), a list of objects, or JSON lines under this name."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        return _json_lines(path)
    return value if isinstance(value, list) else [value]


def _json_lines(path: Path) -> list:
    # Not splitlines: U+2028 may stand inside a string.
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            where = f"data file {path}, line {number}"
            raise ValueError(f"{where}: damaged JSON ({error})") from error
    return rows


def _parquet(path: Path) -> list[dict]:
    import pyarrow.parquet as parquet

    return parquet.read_table(path, partitioning=None).to_pylist()


def _arrow(path: Path) -> list[dict]:
    """A stream, as `save_to_disk` writes it, or a file in Arrow's other format."""
    import pyarrow as pa

    with pa.OSFile(str(path)) as file:
        try:
            return pa.ipc.open_stream(file).read_all().to_pylist()
        except pa.ArrowInvalid:
            return pa.ipc.open_file(file).read_all().to_pylist()


def _unknown(path: Path) -> list:
    raise ValueError(f"data file {path}: expected {_kinds()}")


_READERS = {".json": _json, ".jsonl": _json_lines, ".parquet": _parquet, ".arrow": _arrow}
