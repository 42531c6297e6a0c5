"""Tables of one stage of training: the packed step, and decoding under a shared prefix."""

from __future__ import annotations

from benchmarks import provenance
from benchmarks.figures import results
from benchmarks.figures.results import Record


def training_step() -> str:
    """docs/packing.md: every shape and way of `train_step.py`, on every device."""
    return results.on_every_device("train_step", _training_step)


def _training_step(rows: list[Record]) -> str:
    out = [
        "| one optimiser step, forward + backward | tokens | / floor | s | runs | peak MB "
        "| × eager rows | × rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape in dict.fromkeys(r["shape"] for r in rows):
        same = [r for r in rows if r["shape"] == shape]
        seconds = {r["way"]: r["seconds"] for r in same}
        for r in same:
            out.append(
                f"| {shape}, {r['way']} | {r['tokens']:,} | {r['tokens'] / r['token_floor']:.2f} "
                f"| {r['seconds']:.2f} | {len(r['seconds_all'])} | {r['peak_mb']:.0f} "
                f"| {seconds['eager rows'] / r['seconds']:.1f} "
                f"| {seconds['rows'] / r['seconds']:.2f} |"
            )
    settings = rows[0]["settings"]
    text = (
        f"{settings['parameters'] / 1e6:.0f}M parameters, V = {settings['vocabulary']}, one tree, "
        f"a prompt of {settings['prompt']} tokens, {settings['kept']:.0%} of the tokens kept, "
        f"batches of {settings['tokens_per_batch']} tokens. "
        f"Measured on {provenance.where(rows, 'training code')}."
    )
    return "\n".join([*out, "", text])


def shared_prefix() -> str:
    """docs/rollout.md: decoding with the prefix read by each branch, and once for all."""
    return results.on_every_device("shared_prefix", _shared_prefix)


def _shared_prefix(rows: list[Record]) -> str:
    out = ["| prefix | branches | tokens/s, prefix read per branch | read once | × |"]
    out.append("|---|---|---|---|---|")
    for each, once in zip(rows[::2], rows[1::2], strict=True):
        out.append(
            f"| {each['prefix']} | {each['branches']} | {each['tokens_per_s']:,.0f} "
            f"| {once['tokens_per_s']:,.0f} | {each['ms'] / once['ms']:.2f} |"
        )
    r = rows[0]
    text = (
        f"{r['parameters'] / 1e6:.0f}M parameters, {r['layers']} layers, {r['heads']} query heads "
        f"on {r['kv_heads']} key heads, fp32. Measured on {provenance.where(rows, 'rollout code')}."
    )
    return "\n".join([*out, "", text])
