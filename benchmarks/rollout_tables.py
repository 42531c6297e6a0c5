"""Tables and sentences of `rollout_tree.py`: on the terminal, in README.md and docs/rollout.md."""

from __future__ import annotations

import statistics

from rich.table import Table

STREAMS = {"no stream": 0, "stream": 1, "stream 2": 2}  # iterations admitted ahead
COLUMNS = {  # key of a run -> heading, format
    "trees_per_s": ("trees/s", ".3f"),
    "tokens_per_s": ("tokens/s", ".0f"),
    "seconds": ("wall s", ".2f"),
    "first_tree": ("first", ".1f"),
    "median_tree": ("median", ".1f"),
    "prefill": ("prefill", ",.0f"),
    "prefill_per_bound": ("/ bound", ".2f"),
    "recomputed": ("again", ",.0f"),
    "preempted": ("preempted", ".0f"),
    "running_share": ("running/cap", ".2f"),
    "above_90": ("> 90 %", ".2f"),
    "tokens_per_step": ("tokens/step", ".1f"),
    "kv_peak": ("KV peak", ".2f"),
    "loop_share": ("loop", ".3f"),
}


NAMES = {
    "naive": "every prefix recomputed",
    "level": "cached, a barrier per level",
    "group": "cached, a barrier per sibling group",
    "frontier": "cached, no barrier, first come first served",
    "depth": "cached, no barrier, deepest first (ours)",
    "aligned": "the same, segments aligned to cache blocks",
    "no stream": "iterations one after the other",
    "stream": "places filled from the next iteration",
    "stream 2": "places filled from the next two",
}


def median(runs: list[dict], way: str, key: str) -> float:
    return statistics.median(r[key] for r in runs if r["way"] == way)


def table(title: str, runs: list[dict], ways: list[str]) -> Table:
    out = Table(title=title)
    out.add_column("way")
    for heading, _ in COLUMNS.values():
        out.add_column(heading, justify="right")
    for way in ways:
        out.add_row(way, *(f"{median(runs, way, key):{f}}" for key, (_, f) in COLUMNS.items()))
    return out


def verdicts(runs: list[dict], ways: list[str]) -> list[str]:
    """Each way against `depth` in trees/s (streams against none), with the range of the repeats.

    Aligned segments are a little longer or shorter: those are compared in tokens/s.
    """
    if len({run["repeat"] for run in runs}) < 3:
        return ["fewer than three repeats have no range: no way is called faster than another"]
    sentences = []
    for way in ways:
        rival = "no stream" if way in STREAMS else "depth"
        if way == rival:
            continue
        names = (way, rival) if way in ("aligned", *STREAMS) else (rival, way)
        key = "tokens_per_s" if way == "aligned" else "trees_per_s"
        ours, theirs = ([r[key] for r in runs if r["way"] == name] for name in names)
        ratio = statistics.median(ours) / statistics.median(theirs)
        span = f"{min(ours) / max(theirs):.2f}-{max(ours) / min(theirs):.2f}"
        inside = min(ours) <= max(theirs) and min(theirs) <= max(ours)
        word = "no difference beyond the range" if inside else f"{ratio:.2f}x"
        sentences.append(f"{names[0]} against {names[1]}: {word} (median {ratio:.2f}, {span})")
    return sentences


def describe(record: dict) -> str:
    """What a case grew."""
    settings = record["settings"]
    plural = "tree" if settings["trees"] == 1 else "trees"
    shape = f"{plural} of {'-'.join(map(str, settings['widths']))}"
    if settings["chain"]:
        group, probes = settings["chain"]
        shape = (
            f"times {group} chains, {probes} probes at each of {len(settings['widths']) - 1} cuts"
        )
    low, high = settings["prompt"][0], settings["prompt"][-1]
    early = f" ending up to {settings['spread']:.0%} early" if settings["spread"] else ""
    rounds = f", {settings['iterations']} iterations" if settings["iterations"] else ""
    return (
        f"{settings['trees']} {shape}{rounds}; prompts of {low} to {high} tokens, segments of "
        f"{settings['segment']}{early}, {settings['max_num_seqs']} places, "
        f"{settings['parameters'] / 1e6:.0f}M parameters"
    )


def markdown(record: dict) -> str:
    """The table of a case: medians, with lower bounds beside them."""
    runs, settings = record["runs"], record["settings"]
    rows = [
        "| rollout of the same trees | trees/s | × | prefilled | lower bound | running / capacity "
        "| loop / step |",
        "|---|---|---|---|---|---|---|",
    ]
    first = record["ways"][0]
    for way in record["ways"]:
        speed, base = (median(runs, w, "tokens_per_s") for w in (way, first))
        rows.append(
            f"| {NAMES[way]} | {median(runs, way, 'trees_per_s'):.3f} | {speed / base:.2f} "
            f"| {median(runs, way, 'prefill'):,.0f} | {median(runs, way, 'prefill_bound'):,.0f} "
            f"| {median(runs, way, 'running_share'):.2f} | {median(runs, way, 'loop_share'):.1%} |"
        )
    text = f"{describe(record)}, vLLM on CPU, medians of {settings['repeats']}; × in tokens/s."
    if "predicted_gain" in record:
        text += f" Predicted from the costs per token: {record['predicted_gain']:.2f}."
    return "\n".join([*rows, "", text])


def everything(records: dict[str, dict]) -> str:
    """All cases and the sweep, for docs/rollout.md."""
    cases = {name: r for name, r in records.items() if not r["swept"]}
    parts = []
    for name, record in cases.items():
        against = "; ".join(verdicts(record["runs"], record["ways"]))
        parts.append(f"### {name}\n\n{markdown(record)}\n\n{against}.")
    points = {name: r for name, r in records.items() if r["swept"]}
    if points:
        ways = next(iter(points.values()))["ways"]
        rows = ["| setting | " + " | ".join(ways) + " | prefilled / bound |"]
        rows.append("|---" * (len(ways) + 2) + "|")
        for name, r in points.items():
            cells = [f"{median(r['runs'], way, 'tokens_per_s'):,.0f}" for way in ways]
            ratio = median(r["runs"], "depth", "prefill_per_bound")
            rows.append(f"| {name} | " + " | ".join(cells) + f" | {ratio:.2f} |")
        parts.append("Tokens/s as one setting is changed:\n\n" + "\n".join(rows))
    return "\n\n".join(parts)
