"""What `rollout_tree.py` reads off an engine: occupancy over time, and costs per token."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from spo.records import Request, Sampling

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#222222")


class Trace:
    """An engine that notes how many samples ran in each step, when, and how full its cache was."""

    def __init__(self, engine):
        self._engine = engine
        self._start = time.perf_counter()
        self._before = engine.counters()["running"]
        self.kv_peak = 0.0
        self.steps: list[tuple[float, float, float]] = []  # end, seconds, running

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def poll(self):
        start = time.perf_counter()
        done = self._engine.poll()
        end = time.perf_counter()
        running, self._before = self._before, self._engine.counters()["running"]
        if self._before > running:
            self.steps.append((end - self._start, end - start, self._before - running))
            usage = getattr(self._engine, "cache_usage", None)  # the embedded engine has none
            self.kv_peak = max(self.kv_peak, usage() if usage else 0.0)
        return done

    def mean(self) -> float:
        return statistics.fmean(running for _, _, running in self.steps)

    def percentile(self, percent: int) -> float:
        return statistics.quantiles([r for _, _, r in self.steps], n=100)[percent - 1]

    def share_above(self, running: float) -> float:
        """Share of the time in steps with more than `running` samples."""
        total = sum(seconds for _, seconds, _ in self.steps)
        return sum(seconds for _, seconds, r in self.steps if r > running) / total

    def thinned(self, points: int = 200) -> list[tuple[float, float]]:
        """(seconds, running) of at most `points` equally spaced groups of steps."""
        size = -(-len(self.steps) // points)
        groups = [self.steps[i : i + size] for i in range(0, len(self.steps), size)]
        return [(round(g[-1][0], 3), round(statistics.fmean(r for *_, r in g), 2)) for g in groups]


class DrawnLengths:
    """An engine whose segments end where a draw from their seeds says, in place of an EOS."""

    def __init__(self, engine, spread: float, draw):
        self._engine, self._spread, self._draw = engine, spread, draw
        self._keys = count()
        self._asked: dict[int, tuple[int, int]] = {}  # key -> the caller's key and index

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def submit(self, request: Request) -> None:
        for index in range(request.n):
            seed, key = request.sampling.seed + index, next(self._keys)
            size = max(1, round(request.max_new_tokens * (1 - self._spread * self._draw(seed))))
            self._asked[key] = (request.key, index)
            self._engine.submit(replace(request, key=key, n=1, seed=seed, max_new_tokens=size))

    def poll(self):
        done = []
        for sample in self._engine.poll():
            key, index = self._asked.pop(sample.key)
            done.append(replace(sample, key=key, index=index))
        return done


def forget(engine) -> None:
    """Drop every cached prefix, as an update of the weights does."""
    if hasattr(engine, "reset_prefix_cache"):
        engine.reset_prefix_cache()
    else:
        engine.load_weights((), engine.version)


def cost_per_token(engine, prefix: Sequence[int], rows: int, context: int) -> dict[str, float]:
    """Seconds per prefilled token of `rows` prefixes of `context` / 2 tokens, and per decoded token
    at `rows` samples; the cache is empty before both.
    """
    half = max(context // 2, 2)
    size = min(32, context - half // 2)
    forget(engine)
    ids = (list(prefix) * (half // len(prefix) + 1))[: half - 1]
    start = time.perf_counter()
    for row in range(rows):
        engine.submit(Request(row, (row + 2, *ids), 1, 1, Sampling(row)))
    drain(engine, rows)
    prefill = (time.perf_counter() - start) / (rows * half)
    forget(engine)
    engine.submit(Request(0, tuple(ids[: half // 2]), rows, size, Sampling(0)))
    engine.poll()
    start = time.perf_counter()
    drain(engine, rows)
    decode = (time.perf_counter() - start) / (rows * (size - 1))
    return {"prefill_s": prefill, "decode_s": decode, "rows": rows}


def drain(engine, samples: int) -> None:
    while samples:
        samples -= len(engine.poll())


def write_plot(path: Path, runs: list[dict], ways: Sequence[str], capacity: int) -> None:
    """Running samples over time, one line per way (its first repeat), as an SVG file."""
    width, height, left, top = 760, 320, 50, 20
    curves = {way: next(r["occupancy"] for r in runs if r["way"] == way) for way in ways}
    end = max(curve[-1][0] for curve in curves.values())

    def place(seconds: float, running: float) -> str:
        return f"{left + seconds / end * width:.1f},{top + height * (1 - running / capacity):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width + 190}" height="{height + 60}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#fff"/>',
        f'<text x="{left}" y="14">samples that run, of {capacity} slots</text>',
        f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="none" stroke="#999"/>',
        f'<text x="{left}" y="{height + 50}">seconds</text>',
        f'<text x="{left + width}" y="{height + 36}" text-anchor="end">{end:.0f}</text>',
        f'<text x="{left - 6}" y="{top + 10}" text-anchor="end">{capacity}</text>',
        f'<text x="{left - 6}" y="{top + height}" text-anchor="end">0</text>',
    ]
    for i, (way, curve) in enumerate(curves.items()):
        color = COLORS[i % len(COLORS)]
        points = " ".join(place(*point) for point in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{color}"/>')
        parts.append(f'<text x="{left + width + 10}" y="{top + 14 + 18 * i}" fill="{color}">')
        parts.append(f"{way}</text>")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n")
