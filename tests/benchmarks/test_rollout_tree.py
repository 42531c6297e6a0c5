"""The rollout benchmark: every way on both engines, what it prints, and when it ends."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks import rollout_tree
from benchmarks.rollouts import measure, tables
from benchmarks.rollouts.cases import STREAMS, WAYS

SCRIPT = Path(rollout_tree.__file__)
needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"
)


@pytest.mark.parametrize(
    "engine", ["hf", pytest.param("vllm", marks=(needs_vllm, pytest.mark.slow))]
)
def test_every_way_is_measured_and_printed_as_it_ends(engine, tmp_path, capsys):
    path = tmp_path / "rollout.json"
    arguments = ["--quick", f"--engine={engine}", "--json", str(path), "--plot", str(tmp_path)]
    assert rollout_tree.main(arguments) == 0
    ((name, record),) = json.loads(path.read_text()).items()
    ways = [way for way in WAYS if engine == "vllm" or way != "aligned"] + [*STREAMS]
    by_way = {run["way"]: run for run in record["runs"]}
    assert record["ways"] == ways and set(by_way) == set(ways)
    for way, run in by_way.items():
        shared = way not in ("naive", "stream", "stream 2")
        assert (run["prefill"] == run["prefill_bound"]) == shared, way
    trees, segment = 3 + 9 + 27, 48
    assert by_way["depth"]["generated"] == by_way["naive"]["generated"] == trees * segment
    (prompt,) = {r["prefill"] - (9 * 48 + 27 * 96) for r in record["runs"] if r["way"] == "naive"}
    assert prompt % 3 == 0 and 100 <= prompt / 39 <= 160
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    rows, _, rest = printed.partition("medians of 1")
    assert [row.split()[1] for row in rows.splitlines() if row.startswith("    1  ")] == [
        run["way"].split()[0] for run in record["runs"]
    ]
    assert f"engine {engine}" in printed and rest.count("\nnaive ") == 2
    assert "cached, no waiting" in tables.everything({name: record})
    assert next(tmp_path.glob("occupancy-*.svg")).read_text().startswith("<svg")


def test_without_vllm_the_embedded_engine_is_measured_and_named(tmp_path):
    """As a user runs it: a file, from elsewhere, into a pipe."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, *a: None if n == 'vllm' else found(n, *a)\n"
    )
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--quick", "--ways", "depth"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("vLLM is not installed here: this measures the embedded engine")
    assert "Measured with the embedded engine on " in done.stdout.replace("\n", " ")


class Clock:
    """Time that only a run takes."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.mark.parametrize(
    ("until", "rounds"),
    # The warm-up takes 10 s, a round of two ways 20 s.
    [(100, [0, 0, 1, 1, 2, 2]), (69.9, [0, 0, 1, 1]), (49.9, [0, 0]), (29.9, [0]), (5, [0])],
)
def test_no_round_starts_that_would_end_too_late(monkeypatch, until, rounds):
    clock = Clock()

    def run_once(way, *_, **__):
        clock.now += 10
        return {"way": way, "occupancy": []}

    monkeypatch.setattr(measure, "time", clock)
    monkeypatch.setattr(measure, "run_once", run_once)
    case = Namespace(ways=["naive", "depth"], iterations=0, repeats=3, until=until)
    seen = []
    runs = measure.rounds_of(case, None, [], lambda run, repeat: seen.append((run, repeat)))
    assert [run["repeat"] for run in runs] == [repeat for _, repeat in seen] == rounds


def test_verdicts_need_ranges_that_do_not_touch():
    def runs(**speeds):
        return [
            {"way": way, "repeat": i, "trees_per_s": s, "tokens_per_s": s}
            for way, each in speeds.items()
            for i, s in enumerate(each)
        ]

    found = runs(naive=(1.0, 1.1, 1.2), group=(1.9, 2.1, 2.3), depth=(2.0, 2.2, 2.4))
    first, second = tables.verdicts(found, ["naive", "group", "depth"])
    assert first == "depth against naive: 2.00x (1.67 to 2.40)"
    assert second.startswith("depth against group: no difference beyond the range (median 1.05, ")
    assert "no range" in tables.verdicts(found[:2] + found[3:5], ["naive", "group"])[0]


def test_depth_cannot_be_left_out(capsys):
    with pytest.raises(SystemExit):
        rollout_tree.main(["--ways", "naive"])
    assert "depth is what the others are compared with" in capsys.readouterr().err
