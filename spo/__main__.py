"""`spo` and `python -m spo`: the command line, or one sentence if an extra is missing."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from spo.extras import missing


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `spo`; returns the exit code."""
    try:
        from spo.cli import main as run  # here, because a package that it imports may be missing

        return run(argv)
    except ImportError as error:
        sentence = missing(error)
        if sentence is None:
            raise
        print(f"spo: {sentence}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
