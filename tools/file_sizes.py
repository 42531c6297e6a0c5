"""Refuse files that are too large for the history: `python tools/file_sizes.py FILE…`."""

import sys
from pathlib import Path

LARGEST = 500_000  # bytes; the largest result is 467 kB


def main(names: list[str]) -> int:
    """The exit code: 1 if a file is too large."""
    large = [(name, size) for name in names if (size := Path(name).stat().st_size) > LARGEST]
    for name, size in large:
        print(
            f"{name}: expected at most {LARGEST:,} bytes, found {size:,}. Make it smaller, or "
            "exclude its folder from the hook file-sizes in .pre-commit-config.yaml"
        )
    return int(bool(large))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
