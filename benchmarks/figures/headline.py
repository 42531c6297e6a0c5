"""The three figures of README.md, with their ranges."""

from __future__ import annotations

from benchmarks.figures import results
from benchmarks.figures.results import Record
from benchmarks.provenance import where
from benchmarks.rollouts import tables
from benchmarks.rollouts.cases import DEFAULT

LOSS = "logits, N 256, V 151936, float32, 10% kept"
STEP = "6-6-6/64"


def row(what: str, against: str, gain: tuple[float, float, float], more: str = "") -> str:
    middle, low, high = gain
    return f"| {what} | {against} | **{middle:.1f}×**{more} | {low:.1f} to {high:.1f} |"


def loss() -> tuple[str, Record]:
    """The masked loss from logits against the fastest rival that drops the masked rows first.

    The range is that of the 20th and the 80th percentiles.
    """
    _, rows = results.newest("policy_loss")
    rows = [r for r in rows if r["shape"] == LOSS]
    ours, rival = results.best(rows, "ours"), results.best(rows, "fair", "base")
    assert ours and rival
    gain = rival["ms"] / ours["ms"]
    span = (rival["ms_p20"] / ours["ms_p80"], rival["ms_p80"] / ours["ms_p20"])
    memory = f", {ours['peak_mb']:.0f} MB in place of {rival['peak_mb']:.0f} MB"
    what = (
        "the masked loss, forward and backward: 256 rows, V = 151,936, fp32, one token in ten kept"
    )
    against = f"the fastest rival ({rival['implementation']})"
    return row(what, against, (gain, *span), memory), ours


def step() -> tuple[str, Record]:
    """A packed optimiser step against one row per node with the same loss."""
    _, rows = results.newest("train_step")
    ways = {r["way"]: r for r in rows if r["shape"] == STEP}
    rows_s, packed_s = (ways[way]["seconds_all"] for way in ("rows", "packed"))
    gain = ways["rows"]["seconds"] / ways["packed"]["seconds"]
    span = (min(rows_s) / max(packed_s), max(rows_s) / min(packed_s))
    what = "an optimiser step on a 6-6-6 tree with segments of 64 tokens, packed"
    return row(what, "one row per segment, the same loss", (gain, *span)), ways["packed"]


def rollout() -> tuple[str, Record]:
    """Growing a tree in vLLM with its prefixes cached against recomputing them."""
    _, cases = results.newest("rollout_tree")
    record = cases[DEFAULT]
    gain = tables.ratio(record["runs"], "depth", "naive", "trees_per_s")
    what = "growing a 4-4-4 tree with segments of 64 tokens in vLLM, 30M parameters"
    return row(what, "every prefix computed again", gain), record


def body() -> str:
    rows, records = zip(loss(), step(), rollout(), strict=True)
    return "\n".join(
        [
            "| what | against | gain in speed | range |",
            "|---|---|---|---|",
            *rows,
            "",
            f"Measured on {where(records)}.",
        ]
    )
