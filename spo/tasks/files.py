"""The rows of data files, read with `datasets`, which only reads: it asks no server."""

from __future__ import annotations

import glob
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

READERS = {  # if a folder holds several kinds, the first of these is read
    ".parquet": "parquet",
    ".arrow": "arrow",  # as `save_to_disk` writes it
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
}
KINDS = ", ".join(READERS)
MANY = 64  # this many files or more are opened together, which is ten times as fast


def rows_of_files(paths: Sequence[Path]) -> list[tuple[dict, str]]:
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
    bars, level = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
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
        raise ValueError(f"data file {paths[0]}: cannot be read ({short(error)})") from error
    except (ValueError, TypeError, RecursionError, pyarrow.ArrowException) as error:
        line = _damaged_line(paths[0]) if kind == ".jsonl" else ""
        reason = f"damaged or of another kind ({short(error)})"
        raise ValueError(f"data file {paths[0]}{line}: {reason}") from error
    finally:  # as the caller had them
        datasets.logging.set_verbosity(level)
        if not bars:
            datasets.enable_progress_bars()


def _damaged_line(path: Path) -> str:
    """The first line that is not JSON; the library only counts rows within a block of the file."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                json.loads(line.strip() or b"0")
            except (ValueError, RecursionError):
                return f", line {number}"
    return ""


def short(error: Exception) -> str:
    """The words of an error on one line, cut."""
    return " ".join(str(error).split())[:200]
