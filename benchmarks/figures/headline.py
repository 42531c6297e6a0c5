"""The figures of README.md, with their ranges."""

from __future__ import annotations

from benchmarks.figures import results
from benchmarks.figures.results import Record
from benchmarks.provenance import where
from benchmarks.rollouts import tables
from benchmarks.rollouts.cases import DEFAULT

LOSS = "logits, N 256, V 151936, float32, 10% kept"
LOSS_ON_GPU = "logits, N 8192, V 151936, bfloat16, 10% kept"
STEP = "6-6-6/64"


def row(what: str, against: str, gain: tuple[float, float, float], more: str = "") -> str:
    middle, low, high = gain
    return f"| {what} | {against} | **{middle:.1f}×**{more} | {low:.1f} to {high:.1f} |"


def loss(shape: str, what: str, gpu: bool = False) -> tuple[str, Record]:
    """The masked loss from logits against the fastest rival that sees or drops the masked rows.

    The range is that of the 20th and the 80th percentiles.
    """
    _, rows = results.newest("policy_loss", gpu=gpu)
    rows = [r for r in rows if r["shape"] == shape]
    ours, rival = results.best(rows, "ours"), results.best(rows, "fair", "rival", "base")
    assert ours and rival
    gain = rival["ms"] / ours["ms"]
    span = (rival["ms_p20"] / ours["ms_p80"], rival["ms_p80"] / ours["ms_p20"])
    memory = f", {ours['peak_mb']:.0f} MB in place of {rival['peak_mb']:.0f} MB"
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
    what = "the masked loss, forward and backward: {}, one token in ten kept"
    on_cpu = loss(LOSS, what.format("256 rows, V = 151,936, fp32"))
    on_gpu = loss(LOSS_ON_GPU, "the same on a GPU: 8,192 rows, bf16", gpu=True)
    (first, cpu), (second, gpu) = on_cpu, on_gpu
    rows, records = zip((first, cpu), step(), rollout(), strict=True)
    return "\n".join(
        [
            "| what | against | gain in speed | range |",
            "|---|---|---|---|",
            *(first, second, *rows[1:]),
            "",
            f"Measured on {where(records)}. On a GPU: {where([gpu])}.",
        ]
    )
