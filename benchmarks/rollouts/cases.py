"""What the rollout benchmark grows: cases, a sweep around one of them, and ways to grow them."""

from __future__ import annotations

import argparse
import random

from spo.grow.chain import ChainShape, fixed_partition
from spo.grow.shapes import Shape, TreeShape
from spo.records import Prompt

WAYS = {
    "naive": "every prefix recomputed",
    "level": "cached, waiting for each level",
    "group": "cached, waiting for each group of siblings",
    "frontier": "cached, no waiting, first come first served",
    "depth": "cached, no waiting, deepest first: what spo does",
    "aligned": "the same, segments aligned to cache blocks",
}
STREAMS = {  # way -> iterations admitted ahead
    "no stream": 0,
    "stream": 1,
    "stream 2": 2,
}
NAMES = WAYS | {
    "no stream": "iterations one after the other",
    "stream": "empty slots filled from the next iteration",
    "stream 2": "empty slots filled from the next two",
}

LARGE = {"hidden": 512, "layers": 8, "vocabulary": 16384}  # 30M parameters: prefill matters
SMALL = {"hidden": 192, "layers": 4, "vocabulary": 512}  # as many as the embedded policy
FILL = {"spread": 0.5, "trees": 4, "ways": []}  # streams: samples end up to half their length early
LONG = SMALL | FILL | {"widths": [8], "segment": 384, "iterations": 8}
DEFAULT = "4-4-4, short"  # what runs without arguments, in under three minutes
CASES: dict[str, dict] = {  # what differs from the defaults of the command line
    DEFAULT: LARGE
    | {"widths": [4, 4, 4], "segment": 64, "minutes": 2.0}
    | {"ways": ["naive", "level", "group", "depth", "aligned"]},
    "6-6-6": LARGE,
    "stream": SMALL | FILL | {"widths": [4, 2, 2], "iterations": 8},
    "chain": LARGE | {"chain": [8, 9], "segment": 64, "ways": [w for w in WAYS if w != "aligned"]},
    "4-4-4": LARGE | {"widths": [4, 4, 4]},
    "8-8-8": LARGE
    | {"widths": [8, 8, 8], "segment": 64, "repeats": 3, "ways": ["naive", "group", "depth"]},
    "stream 8": LONG,
    "stream 8, spread 0.9": LONG | {"spread": 0.9},
    "stream 16, spread 0.9": LONG | {"widths": [16], "spread": 0.9, "repeats": 3},
    "stream 6-6-6": SMALL | FILL | {"segment": 32, "iterations": 4, "repeats": 2},
}
QUICK = SMALL | {"widths": [3, 3, 3], "segment": 48, "iterations": 2, "repeats": 1}
QUICK |= {"max_num_seqs": 16, "ways": list(WAYS), "minutes": 1e9}
SWEEP = SMALL | {"widths": [4, 4, 4], "segment": 32, "trees": 2, "repeats": 2}
SWEEP |= {"ways": ["naive", "level", "group", "depth"]}
SWEEPS: dict[str, tuple] = {  # setting -> values, the others as in SWEEP
    "trees": (1, 2, 8, 16),
    "max_num_seqs": (16, 256),
    "cache_mib": (8, 16),
    "segment": (64, 128),
    "block_size": (64, 128),
    "spread": (0.5, 0.9),
}
SWEPT = {f"{key} {v}": SWEEP | {key: v} for key, values in SWEEPS.items() for v in values}


def shape_of(case: argparse.Namespace, align: int = 1) -> Shape:
    """Trees, or chains of as many segments, each of whose boundaries is probed."""
    total = case.segment * len(case.widths)
    if case.chain:
        group, probes = case.chain
        return ChainShape(group, probes, fixed_partition(case.segment), total)
    segments = (case.segment,) * (len(case.widths) - 1)
    return TreeShape(tuple(case.widths), segments, total, align)


def prompts_of(case: argparse.Namespace) -> list[Prompt]:
    """Random prompts for every iteration of a case."""
    rng = random.Random(0)
    low, high = case.prompt[0], case.prompt[-1]
    return [
        Prompt(
            tuple(rng.randrange(2, case.vocabulary) for _ in range(rng.randint(low, high))),
            "",
            "arithmetic",  # nothing is graded: every response runs into its limit
        )
        for _ in range(case.trees * max(case.iterations, 1))
    ]


def describe(settings: dict) -> str:
    """What a case grows, in words."""
    plural = "tree" if settings["trees"] == 1 else "trees"
    shape = f"{settings['trees']} {plural} of {'-'.join(map(str, settings['widths']))}"
    if settings["chain"]:
        group, probes = settings["chain"]
        boundaries = len(settings["widths"]) - 1
        shape = f"{group} chains with {probes} probes at each of {boundaries} boundaries"
    low, high = settings["prompt"][0], settings["prompt"][-1]
    early = f" that end up to {settings['spread']:.0%} early" if settings["spread"] else ""
    rounds = f", {settings['iterations']} iterations" if settings["iterations"] else ""
    return (
        f"{shape}{rounds}; prompts of {low} to {high} tokens, segments of {settings['segment']}"
        f"{early}, {settings['max_num_seqs']} slots, {settings['parameters'] / 1e6:.0f}M parameters"
    )
