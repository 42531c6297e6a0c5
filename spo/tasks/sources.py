"""Where rows come from: which files a name stands for, and in which order they are read.

A name is a file, a folder (also of `save_to_disk`) or a hub data set, `owner/name`, perhaps with a
revision, `owner/name@revision`. A folder or a hub data set takes a configuration, `:configuration`
(or a path inside, `owner/name/folder`), and a split, `#validation`; `:*` reads all configurations
as one. Rows of a Python caller have names too: see `spo.tasks.memory`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from spo.tasks import hub, memory
from spo.tasks.files import KINDS, READERS, rows_of_files

ALL = "*"  # the configuration that stands for all
SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= {name: "validation" for name in ("validation", "valid", "val", "dev")}
OURS = "your rows"  # those of a Python caller, in messages
ABOUT = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")

CHOICES = (
    "set data.test=same to test on the training problems, data.test_share=0.05 to hold some out, "
    "or name another set in data.test"
)

_NAME = re.compile(r"(.+?)(?::(\*|\w[\w.+/-]*))?(?:#([\w.+-]+))?", re.DOTALL)
_SHARD = re.compile(r"-\d+-of-\d+$")


class NoSplit(ValueError):
    """A data set without files of the split that is asked for."""


@dataclass(frozen=True)
class Source:
    """Where the problems of one split come from; as a path it is its name."""

    path: str
    columns: Mapping[str, str] = field(default_factory=dict, hash=False)  # as `data.columns`
    weight: float = 1.0  # in a mixture
    reads: str | None = None  # the split whose files are read; None: the one that is asked for
    share: float = 0.0  # of its problems that are the test problems; 0: all
    given: bool = True  # False: the training set, which must have test files of its own
    apart: tuple[Source, ...] = ()  # test sets, whose problems do not train
    most: int | None = None  # of its rows are read, the first ones; None: all

    def __str__(self) -> str:
        return self.path

    def __fspath__(self) -> str:
        return self.path


def read_rows(source: Source | str, split: str | None) -> list[tuple[dict, str]]:
    """The rows of a split, as they are in the files, each with its location.

    Every row has the columns of all, None where it has no such column.

    Args:
        source: a `Source`, or its name. A file is read as a whole. Of a folder or a hub data set
            those files are read whose path names the split; all files, if no path names a split.
        split: "train", "test" or another split by name; None reads the files of every split.

    Raises ValueError with one sentence if there is nothing to read, if several configurations are
    there and none is chosen, or if a file is damaged.
    """
    path, most = str(source), source.most if isinstance(source, Source) else None
    if path.startswith(memory.PREFIX):
        rows = [(row, f"{OURS}, row {i}") for i, row in enumerate(memory.rows(path), 1)]
    else:
        rows = rows_of_files(paths_of(path, split), most)
    if not rows:
        raise ValueError(f"data set {path}: its {split or 'data'} files hold no rows")
    columns = dict.fromkeys(name for row, _ in rows for name in row)
    if not columns:
        raise ValueError(f"{title(source)}: expected rows with columns, found {{}} in each row")
    return [({name: row.get(name) for name in columns}, where) for row, where in rows]


def title(source: Source | str) -> str:
    """What messages call a source; the name of rows in memory says nothing to their owner."""
    return OURS if str(source).startswith(memory.PREFIX) else f"data set {source}"


def has_own_test(path: str) -> bool:
    """Whether a training set has test files beside those that train."""
    if path.startswith(memory.PREFIX):
        return False
    try:
        return paths_of(path, "train") != paths_of(path, "test")
    except NoSplit:
        return False


def state(source: Source | str) -> str:
    """Whether a source is "local", "cached" from the hub, or a "download"; asks no server."""
    path = str(source)
    root, configuration, _ = _parts(path)
    if path.startswith(memory.PREFIX) or Path(root).exists():
        return "local"
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo, revision, inside = hub.hub_name(root)
    try:
        hub.download(repo, revision, _inside(inside, configuration), local_files_only=True)
    except LocalEntryNotFoundError:
        return "download"
    return "cached"


def hub_id(source: Source | str) -> str | None:
    """owner/name of a source that is a data set of the hub; None for another."""
    root, _, _ = _parts(str(source))
    if root.startswith(memory.PREFIX) or Path(root).exists():
        return None
    try:
        return hub.hub_name(root)[0]
    except ValueError:  # a file that is gone
        return None


def paths_of(path: str, split: str | None) -> list[Path]:
    """The files of a split, those of a folder in a fixed order. Raises as `read_rows` does."""
    root, configuration, named = _parts(path)
    split = named or split
    if Path(root).is_file():
        if configuration or named:
            raise ValueError(f"data set {path}: {root} is one file, without parts to choose from")
        return [Path(root)]
    if Path(root).exists():
        whole, inside = Path(root), _inside("", configuration)
    else:
        repo, revision, inside = hub.hub_name(root)
        inside = _inside(inside, configuration)
        if not inside and configuration is None:  # before anything large is downloaded
            _require_one(path, hub.configurations(hub.snapshot(path, repo, revision, hub.CARD)))
        whole = hub.snapshot(path, repo, revision, inside)
        if not (whole / inside).exists():
            whole = hub.snapshot(path, repo, revision, "")
    folder = whole / inside
    if folder.is_file():
        return [folder]
    if not folder.exists():
        return _by_card(path, whole, inside, split)
    listed = hub.configurations(folder)
    if configuration is None:
        _require_one(path, listed)
    found = _files(folder)
    if split and len(listed) == 1 and (named or not any(map(_split_of, found))):
        if split in (splits := hub.card_files(path, folder, listed[0])):
            return splits[split]
    files = _of_split(path, found, split)
    if configuration != ALL:
        _require_one(path, [_folders(file) or "." for file in files])
        _require_one(path, [_split_name(file, split) for file in files], "#")
    return [folder / file for file in _of_one_kind(files)]


# Names


def _parts(path: str) -> tuple[str, str | None, str | None]:
    """Folder, file or repository; configuration; split."""
    match = None if Path(path).exists() else _NAME.fullmatch(path)
    return (match[1], match[2], match[3]) if match else (path, None, None)


def _inside(inside: str, configuration: str | None) -> str:
    """The folder of a configuration inside a data set."""
    return "/".join(filter(None, [inside, configuration if configuration != ALL else None]))


def _require_one(path: str, names: Sequence[str], sign: str = ":") -> None:
    """Raise ValueError if there are several configurations (or splits, with another sign)."""
    several = sorted(set(names))
    if len(several) < 2:
        return
    what = "configurations" if sign == ":" else "splits of this kind"
    named = next((name for name in several if name != "."), several[0])
    root = path.partition("#")[0]
    raise ValueError(
        f"data set {path}: expected one of its {what} {', '.join(several)}, found none chosen; "
        f"write {root}{sign}{named}, or {root}:{ALL} to read all as one"
    )


# Files of a folder


def _files(folder: Path) -> list[Path]:
    """The data files in a folder, without caches and what describes the data set."""
    found = [p.relative_to(folder) for p in folder.rglob("*") if p.suffix in READERS]
    return [path for path in found if (folder / path).is_file() and not _is_about(path)]


def _of_split(path: str, files: list[Path], split: str | None) -> list[Path]:
    """The files of a split: all, if no path names a usual split."""
    found = {name for name in map(_split_of, files) if name}
    chosen = files
    if split is not None and split not in ("train", "test"):
        chosen = [f for f in files if split in _words(f)]
        chosen = chosen or [f for f in files if split in SPLITS and _split_of(f) == SPLITS[split]]
        found = found or {"no split by name"}
    elif split is not None and found:
        chosen = [file for file in files if _split_of(file) == split]
    if not chosen:
        held = f"it holds {', '.join(sorted(found))}" if files else f"none ends in {KINDS}"
        raise NoSplit(f"data set {path}: no {split or 'data'} files; {held}")
    return chosen


def _of_one_kind(files: list[Path]) -> list[Path]:
    kind = min((path.suffix for path in files), key=list(READERS).index)
    return [path for path in sorted(files, key=_in_order) if path.suffix == kind]


def _by_card(path: str, folder: Path, name: str, split: str | None) -> list[Path]:
    """The files of a configuration that is no folder, as the data set's card lists them."""
    listed = hub.configurations(folder)
    if name not in (*listed, "default"):  # which `datasets` knows of every data set
        held = sorted({*listed, *filter(None, map(_folders, _files(folder)))})
        raise ValueError(
            f"data set {path}: no configuration {name}; it holds {', '.join(held) or 'none'}"
        )
    found = hub.card_files(path, folder, name)
    usual = SPLITS.get(split or "", split)
    keys = [key for key in found if split in (None, key)]
    keys = keys or [key for key in found if SPLITS.get(key) == usual]
    if not keys:
        raise NoSplit(f"data set {path}: no {split} files; it holds {', '.join(found)}")
    return [file for key in keys for file in found[key]]


def _is_about(path: Path) -> bool:
    """Whether a file describes the data set or is a cache of the `datasets` library."""
    hidden = any(part.startswith(".") for part in path.parts)
    return hidden or path.name in ABOUT or path.name.startswith("cache-")


def _split_in(part: str) -> str | None:
    """The split that one part of a path names: "train" of Train-00000-of-00002."""
    words = re.split(r"[^a-z]+", part.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def _split_of(path: Path) -> str | None:
    """The split that a path names, the innermost part first: train/algebra/1.json."""
    return next(filter(None, map(_split_in, reversed(path.with_suffix("").parts))), None)


def _words(path: Path) -> list[str]:
    """What the parts of a path say, without the numbers of shards: test_sft."""
    return [_SHARD.sub("", part) for part in path.with_suffix("").parts]


def _folders(path: Path) -> str:
    """The folders that a path is in; none if one of them names a split, as in train/algebra."""
    folders = path.parent.parts
    while folders and _split_in(folders[-1]):
        folders = folders[:-1]
    return "" if any(map(_split_in, folders)) else "/".join(folders)


def _split_name(path: Path, split: str | None) -> str:
    """The split as a path writes it, such as train_sft; the usual name where it adds nothing."""
    usual = SPLITS.get(split or "", split or "")
    for part in reversed(_words(path)):
        if _split_in(part) == usual:
            plain = re.sub(r"[\W\d_]+", "", part.lower())
            return usual if SPLITS.get(plain) == usual else part
    return usual


def _in_order(path: Path) -> tuple:
    """Sorts 2.json before 10.json."""
    parts = re.split(r"([0-9]+)", path.as_posix())
    return tuple((int(p), "") if p.isdecimal() else (-1, p) for p in parts)
