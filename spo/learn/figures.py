"""The figures of an iteration, from those of its steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from spo.learn.pack import PackStats

SUMS = ("loss", "kl", "covered", "kept", "clipfrac", "entropy", "mismatch_kl", "router_loss")
"""Figures that add up over the batches of a step."""


def summarize(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The figures of an iteration, from those of its steps.

    A figure that only some steps have (of a rule or of the critic) is the mean over these steps.
    """
    every = set.intersection(*(set(step) for step in steps))
    total = {key: sum(step[key] for step in steps) for key in every}
    kept = max(total["kept"], 1.0)
    figures = {
        "loss": total["loss"] / len(steps),
        "clipfrac": total["clipfrac"] / kept,
        "entropy": total["entropy"] / kept,
        "mismatch_kl": total["mismatch_kl"] / kept,
        "ratio_max": max(step["ratio_max"] for step in steps),
        "kept_share": total["kept_tokens"] / max(total["trained_tokens"], 1),
        "packed_tokens": total["packed_tokens"],
        "grad_norm": total["grad_norm"] / len(steps),
        "lr": steps[-1]["lr"],
    }
    if total["covered"]:
        figures["kl"] = total["kl"] / total["covered"]
    if total["router_loss"]:
        figures["router_loss"] = total["router_loss"] / len(steps)
    own = {*SUMS, "ratio_max", "grad_norm", "lr", *(f.name for f in dataclasses.fields(PackStats))}
    for key in sorted({key for step in steps for key in step} - own):
        values = [step[key] for step in steps if key in step]
        figures[key] = sum(values) / len(values)
    return figures
