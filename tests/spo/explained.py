"""The table of docs/metrics.md: keys of metrics.jsonl and TRL's names for them."""

import re
from functools import cache
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


@cache
def trl_names():
    """Key -> TRL's name, "" where it has none."""
    table = PAGE.read_text().split("| key in `metrics.jsonl` |")[1]
    rows = re.findall(r"^\| (`.*?`) \| (.*?)\| \S.* \|$", table, re.MULTILINE)
    return {
        key: name.strip().strip("`") for keys, name in rows for key in re.findall(r"`(.*?)`", keys)
    }


def unexplained(line):
    """Keys of a metrics line that no row of the table has; `<term>` stands for a word."""
    patterns = [re.sub(r"<\w+>", r"\\w+", key) for key in trl_names() if key != "<set>/<key>"]
    names = {key: key.rpartition("/")[2] for key in line}
    return [key for key in line if not any(re.fullmatch(p, names[key]) for p in patterns)]
