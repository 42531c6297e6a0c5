"""What `rollout_tree.py` says of its runs: on the terminal, in README.md and docs/rollout.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks import provenance
from benchmarks.rollouts.cases import NAMES, STREAMS, describe

COLUMNS = {  # key of a run -> heading, format; a line has 80 characters at most
    "seconds": ("wall s", "8.2f"),
    "trees_per_s": ("trees/s", "9.3f"),
    "tokens_per_s": ("tokens/s", "10,.0f"),
    "prefill": ("prefilled", "11,.0f"),
    "prefill_per_bound": ("/ bound", "9.2f"),
    "running_share": ("slots used", "12.0%"),
}
Run = dict


def heading(first: str) -> str:
    """The line above `line`."""
    cells = (f"{title:>{form.split('.')[0].rstrip(',')}}" for title, form in COLUMNS.values())
    return f"{first:<17}" + "".join(cells)


def line(first: str, values: dict[str, float]) -> str:
    """One row of the terminal's table."""
    return f"{first:<17}" + "".join(f"{values[key]:{form}}" for key, (_, form) in COLUMNS.items())


def median(runs: Sequence[Run], way: str, key: str) -> float:
    return statistics.median(run[key] for run in runs if run["way"] == way)


def ways_of(record: dict) -> list[str]:
    """The ways that were measured: all, but for a run that was out of time."""
    found = {run["way"] for run in record["runs"]}
    return [way for way in record["ways"] if way in found]


def summary(record: dict) -> str:
    """Medians of every way, what the ways are, and what can be said of them."""
    runs, ways = record["runs"], ways_of(record)
    repeats = len({run["repeat"] for run in runs})
    rows = [heading(f"medians of {repeats}")]
    rows += [line(way, {key: median(runs, way, key) for key in COLUMNS}) for way in ways]
    rows += ["", *(f"{way:<10} {NAMES[way]}" for way in ways), ""]
    if "predicted_gain" in record:
        rows.append(
            f"gain of caching to expect from the costs per token: {record['predicted_gain']:.2f}x"
        )
    return "\n".join([*rows, *verdicts(runs, ways)])


def ratio(runs: Sequence[Run], way: str, base: str, key: str) -> tuple[float, float, float]:
    """Median of `way` over that of `base`, and the lowest and highest that any two runs give."""
    ours, theirs = ([run[key] for run in runs if run["way"] == name] for name in (way, base))
    middle = statistics.median(ours) / statistics.median(theirs)
    return middle, min(ours) / max(theirs), max(ours) / min(theirs)


def verdicts(runs: Sequence[Run], ways: Sequence[str]) -> list[str]:
    """Each way against `depth` in trees/s (streams against none), with the range of the repeats.

    Aligned segments are a little longer or shorter: those are compared in tokens/s.
    """
    if len({run["repeat"] for run in runs}) < 3:
        return ["fewer than three repeats have no range: no way is called faster than another"]
    sentences = []
    for way in ways:
        rival = "no stream" if way in STREAMS else "depth"
        if way == rival or rival not in ways:
            continue
        pair = (way, rival) if way in ("aligned", *STREAMS) else (rival, way)
        key = "tokens_per_s" if way == "aligned" else "trees_per_s"
        middle, low, high = ratio(runs, *pair, key)
        span = f"{low:.2f} to {high:.2f}"
        found = f"{middle:.2f}x ({span})"
        if low <= 1 <= high:
            found = f"no difference beyond the range (median {middle:.2f}, {span})"
        sentences.append(f"{pair[0]} against {pair[1]}: {found}")
    return sentences


def where(record: dict) -> str:
    """Engine, machine, commit and date of a record."""
    engine = {"vllm": "vLLM", "hf": "the embedded engine"}[record["settings"]["engine"]]
    return f"{engine} on {provenance.where([record], 'rollout code')}"


def markdown(record: dict) -> str:
    """The table of a case: medians, with lower bounds beside them."""
    runs, ways = record["runs"], ways_of(record)
    rows = [
        "| rollout of the same trees | trees/s | × | prefilled | lower bound | slots used "
        "| loop / step |",
        "|---|---|---|---|---|---|---|",
    ]
    for way in ways:
        speed, base = (median(runs, w, "tokens_per_s") for w in (way, ways[0]))
        rows.append(
            f"| {way}: {NAMES[way]} | {median(runs, way, 'trees_per_s'):.3f} | {speed / base:.2f} "
            f"| {median(runs, way, 'prefill'):,.0f} | {median(runs, way, 'prefill_bound'):,.0f} "
            f"| {median(runs, way, 'running_share'):.0%} | {median(runs, way, 'loop_share'):.1%} |"
        )
    repeats = len({run["repeat"] for run in runs})
    text = f"{describe(record['settings'])}. Medians of {repeats}; × in tokens/s."
    if "predicted_gain" in record:
        text += f" Predicted from the costs per token: {record['predicted_gain']:.2f}."
    return "\n".join([*rows, "", text])


def everything(records: dict[str, dict]) -> str:
    """All cases and the sweep, for docs/rollout.md."""
    cases = {name: r for name, r in records.items() if not r["swept"]}
    parts, said = [], ""
    for name, record in cases.items():
        if where(record) != said:
            said = where(record)
            parts.append(f"Measured with {said}:")
        against = "; ".join(verdicts(record["runs"], ways_of(record)))
        parts.append(f"### {name}\n\n{markdown(record)}\n\n{against}.")
    points = {name: r for name, r in records.items() if r["swept"]}
    if points:
        first = next(iter(points.values()))
        rows = ["| setting | " + " | ".join(first["ways"]) + " | prefilled / bound |"]
        rows.append("|---" * (len(first["ways"]) + 2) + "|")
        for name, r in points.items():
            cells = [f"{median(r['runs'], way, 'tokens_per_s'):,.0f}" for way in first["ways"]]
            share = median(r["runs"], "depth", "prefill_per_bound")
            rows.append(f"| {name} | " + " | ".join(cells) + f" | {share:.2f} |")
        title = (
            "Tokens/s as one setting is changed, the others being 2 trees of 4-4-4, segments of 32 "
            f"tokens and 2M parameters ({where(first)}):"
        )
        parts.append("\n".join([title, "", *rows]))
    return "\n\n".join(parts)
