"""A task, a shape and a rule from outside at once: dry run, resume, torchrun, from any folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from spo.learn.checkpoint import latest_checkpoint
from spo.metrics import read_metrics

HERE = Path(__file__).parent
ROOT = HERE.parents[2]


BOTH = """
import sys
from spo.cli import main

_, name, *arguments = sys.argv
assert name == "spo" and main([*arguments, "--dry-run"]) == 0
sys.exit(main(arguments))
"""


@pytest.fixture
def recipe(tmp_path):
    """A folder with a recipe and the three files beside it."""
    for name in ("rule", "shape", "task"):
        (tmp_path / f"{name}.py").write_text((HERE / name / f"{name}.py").read_text())
    tree = yaml.safe_load((HERE / "task" / "recipe.yaml").read_text())
    tree |= {
        "name": "mine",
        "shape": {"kind": "shape:Ladder", "rungs": 1, "step": 4, "width": 2},
        "credit": {"type": "values", "baseline": "loo"},
        "train": {"iterations": 2, "prompts": 4, "minibatches": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return tmp_path / "recipe.yaml"


def spo(*arguments, cwd, run=(sys.executable, "-m")):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*run, "spo", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=200
    )
    return done.returncode, done.stdout + done.stderr


def test_from_a_dry_run_to_torchrun(recipe):
    folder = recipe.parent  # `shape` is a module of the current folder, task.py beside the recipe
    (folder / "both.py").write_text(BOTH)
    first = ["train", "recipe.yaml", "train.iterations=1", "out=run"]
    code, said = spo(*first, cwd=folder, run=(sys.executable, "both.py"))
    assert code == 0 and "mine: shape:Ladder on" in said and "task.py:Sorting" in said, said
    saved = yaml.safe_load((latest_checkpoint(folder / "run") / "recipe.yaml").read_text())
    assert saved["task"] == f"{folder / 'task.py'}:Sorting" and saved["shape"]["rungs"] == 1
    code, said = spo("train", "recipe.yaml", "out=run", "--resume", cwd=folder)
    assert code == 0, said
    trained = [x for x in read_metrics(folder / "run" / "metrics.jsonl") if x["stage"] == "train"]
    assert [line["iteration"] for line in trained] == [0, 1]
    rule = ["credit={type: ./rule.py:Terse}", "shape={kind: star, group_size: 2}"]
    ranks = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m")
    code, said = spo("train", "recipe.yaml", "out=two", *rule, cwd=folder, run=ranks)
    assert code == 0, said
    assert latest_checkpoint(folder / "two").name == "iter-000002"
