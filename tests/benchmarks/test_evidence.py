"""The training experiments: their statistics by hand, resuming, and a quick run of each script."""

import json
import shutil
from argparse import Namespace

import numpy as np
import pytest

from benchmarks import end_to_end
from benchmarks.evidence import ablations, estimators, runs
from spo.config.policy import EMBEDDED


def record(*points, **more):
    keys = ("generated_tokens", "seconds", "sampled", "greedy")
    return {"evals": [dict(zip(keys, point, strict=True)) for point in points]} | more


A = record((0, 0.0, 0.2, 0.3), (100, 10.0, 0.6, 0.7), (300, 20.0, 1.0, 1.0))
B = record((0, 0.0, 0.2, 0.3), (200, 40.0, 0.4, 0.5))


def test_area_is_the_mean_over_the_tokens():
    # trapezoids (0.4 * 100 + 0.8 * 200) / 300
    assert runs.area(A) == pytest.approx(2 / 3)


def test_band_by_hand():
    grid, mean, half = runs.band([A, B], "generated_tokens", "sampled", points=3)
    assert grid.tolist() == [0, 100, 200]  # to where the shorter run ends
    np.testing.assert_allclose(mean, [0.2, (0.6 + 0.3) / 2, (0.8 + 0.4) / 2])
    # two runs: standard error |a - b| / 2, times 12.706
    np.testing.assert_allclose(half, [0, 12.706 * 0.15, 12.706 * 0.2], atol=1e-12)
    assert runs.band([A], "seconds", "greedy", points=2)[2].tolist() == [0, 0]


def test_half_width_of_five_seeds():
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    assert float(runs.half_width(values)) == pytest.approx(2.776 * (2.5 / 5) ** 0.5)


ARGUMENTS = {
    "task": "arithmetic",
    "engine": "hf",
    "budget": 3000,
    "problems": 4,
    "quick": True,
}


def test_a_run_is_known_by_what_its_recipe_changes(tmp_path):
    for folder in ("a", "b", "other"):
        shutil.copytree(EMBEDDED, tmp_path / folder)
    with (tmp_path / "other" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")  # another weight

    def name(recipe="grpo.yaml", *overrides, seed=0, **more):
        arguments = Namespace(**ARGUMENTS | more)
        return runs.digest(runs.config_of(runs.Arm("a", recipe, overrides), seed, arguments))

    plain = name()
    assert plain == name("grpo.yaml", "out=elsewhere") == name("grpo.yaml", "loss.clip_eps_low=0.2")
    of_folder = [name("grpo.yaml", f"policy.path={tmp_path / f}") for f in ("a", "b", "other")]
    assert plain == of_folder[0] == of_folder[1]
    others = [
        name("grpo.yaml", "loss.prob_threshold=0.8"),
        name(seed=1),
        name("rloo.yaml"),
        name(budget=4000),
        name(task="long-arithmetic"),
        of_folder[2],
    ]
    assert len({plain, *others}) == 7


@pytest.mark.slow
def test_finished_runs_are_skipped_and_broken_ones_go_on(tmp_path, monkeypatch):
    arguments = Namespace(**ARGUMENTS, work=tmp_path / "work")
    arm = runs.Arm("a", "rloo.yaml")
    jobs = [(arm, runs.config_of(arm, seed, arguments)) for seed in (0, 1)]
    path = tmp_path / "r.jsonl"
    real, seen = runs.train, []

    def counted(config, **options):
        seen.append(config.train.seed)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(config, **options)

    monkeypatch.setattr(runs, "train", counted)
    console = Namespace(print=lambda *text: None)
    with pytest.raises(KeyboardInterrupt):
        runs.run_all(jobs, runs.Ledger(path), arguments, console)
    assert len(path.read_text().splitlines()) == 1
    records = runs.run_all(jobs, runs.Ledger(path), arguments, console)
    assert seen == [0, 1, 1] and not list((tmp_path / "work").iterdir())
    assert [r["seed"] for r in records] == [0, 1]
    assert records == [json.loads(line) for line in path.read_text().splitlines()]
    for found in records:
        assert found["evals"][0]["generated_tokens"] == 0
        assert found["evals"][-1]["generated_tokens"] >= arguments.budget
        assert found["kept_share"] == 1 and found["skipped_steps"] == 0


def test_recipes_of_both_scripts_exist_and_differ():
    arguments = Namespace(**ARGUMENTS | {"quick": False})
    arms = list(end_to_end.METHODS)
    names = [runs.digest(runs.config_of(arm, 0, arguments)) for arm in arms]
    assert len(set(names)) == len(arms)
    for arm in arms:
        chosen = runs.config_of(arm, 0, arguments).train.learning_rate
        assert chosen in arm.learning_rates, arm.name
    for title, panel in ablations.ABLATIONS.items():
        names = [runs.digest(runs.config_of(arm, 0, arguments)) for arm in panel]
        assert len(set(names)) == len(panel), title


@pytest.mark.parametrize(
    ("script", "only", "more"),
    [(end_to_end, "DPO", []), (end_to_end, "RLOO", ["--tune"]), (ablations, "baseline", [])],
)
def test_quick_runs_leave_nothing(tmp_path, capsys, script, only, more):
    folders = [f"--{name}={tmp_path / name}" for name in ("results", "figures", "work")]
    script.main(["--quick", "--only", only, *folders, *more])
    printed = capsys.readouterr().out
    assert ("best" in printed) == bool(more) and ("figure" in printed) != bool(more)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_estimators_keep_the_other_tasks_records(tmp_path):
    path = tmp_path / "e.json"
    path.write_text('[{"task": "countdown"}, {"task": "arithmetic"}]')
    estimators.main(["--quick", "--only", "arithmetic", "--json", str(path)])
    kept, *found = json.loads(path.read_text())
    assert kept == {"task": "countdown"} and len(found) == 2 * 6
    for record in found:
        assert record["mse"] == pytest.approx(record["variance"] + record["bias2"])
        assert 400 < record["generated"] < 1600 and record["trained"] <= record["generated"]
