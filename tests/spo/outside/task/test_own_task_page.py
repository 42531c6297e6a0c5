"""The task of docs/own-task.md: its ten lines, its recipe, its script, and what tests it."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from sentences import one_sentence
from trained import trained_weights

import spo
from spo.config.recipe import load_recipe
from spo.learn.checkpoint import latest_checkpoint
from spo.metrics import read_metrics
from spo.models.tokenizer import load_tokenizer
from spo.tasks import prompts_of

ROOT = Path(__file__).parents[4]
PAGE = (ROOT / "docs" / "own-task.md").read_text()
TASK, SCRIPT = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
(RECIPE,) = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SMALL = {
    "engine": {"name": "hf", "max_num_seqs": 32, "max_model_len": 64},
    "sampling": {"max_new_tokens": 40},
    "shape": {"kind": "star", "group_size": 4},
    "train": {"iterations": 1, "prompts": 4, "minibatches": 1, "learning_rate": 1e-3},
    "eval": {"every": 0, "problems": 2},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder; the page's files are in `mine`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for name, text in (("sums.py", TASK), ("script.py", SCRIPT), ("recipe.yaml", RECIPE)):
        (tmp_path / "mine" / name).write_text(text)
    return tmp_path


def test_ten_lines_make_a_task():
    lines = [line for line in TASK.splitlines() if line and not line.startswith(("import", "from"))]
    assert len(lines) == 10


def test_the_same_run_from_yaml_and_from_python(folder):
    """A relative file is searched beside the recipe, then in the current folder."""
    given = yaml.safe_load(RECIPE)
    (folder / "mine" / "small.yaml").write_text(yaml.safe_dump(given | SMALL))
    spo.train("mine/small.yaml", out="yaml")
    name = "./mine/sums.py:Sums"
    spo.train(spo.Recipe(), task=name, data=given["data"], out="python", **SMALL)
    (line,) = (line for line in read_metrics(Path("yaml", "metrics.jsonl")) if "loss" in line)
    assert line["grad_norm"] > 0 and line["invalid_gradings"] == 0
    one, other = trained_weights("yaml"), trained_weights("python")
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    prompts = spo.Forest.load("yaml/forest-first.safetensors").prompts
    assert {prompt.task for prompt in prompts} == {f"{folder / 'mine' / 'sums.py'}:Sums"}


def test_the_script_of_the_page_runs_from_another_folder(folder, monkeypatch):
    """The grading worker imports the class from beside the script, as the script does."""
    monkeypatch.syspath_prepend(folder / "mine")
    monkeypatch.delitem(sys.modules, "sums", raising=False)
    runpy.run_path("mine/script.py")
    saved = latest_checkpoint(folder / "runs" / "sums") / "recipe.yaml"
    assert yaml.safe_load(saved.read_text())["task"] == "sums:Sums"
    forest = spo.Forest.load("runs/sums/forest-first.safetensors")
    assert max(prompt.answer for prompt in forest.prompts) <= 10
    for leaf in (leaf for tree in forest.trees for leaf in tree.leaves):
        right = f"<answer> {leaf.tree.prompt.answer} </answer>" in leaf.response
        assert leaf.reward == right


class Plain:
    pass


def test_a_class_that_cannot_be_a_task_is_one_sentence():
    class Inner:
        pass

    words = ["task: expected a class that the grading worker can import", "Inner", "./file.py"]
    with one_sentence(words):
        load_recipe("grpo", task=Inner)
    Inner.__module__, Inner.__qualname__ = "__main__", "Inner"  # as in a script or a notebook
    with one_sentence([*words, "of __main__"]):
        load_recipe("grpo", task=Inner)
    with one_sentence(["task: expected", "Plain to be a dataclass"]):
        load_recipe("grpo", task=Plain)


COUNTING = """
from dataclasses import dataclass
from itertools import count
from spo.tasks import Problem

@dataclass(frozen=True)
class Counting:
    def problems(self, split, seed):
        for n in count():
            yield Problem(f"arithmetic {n} + 0\\n", n)

    def grade(self, text, answer):
        return True
"""


def test_the_first_test_problems_are_tested_and_there_may_be_endless_ones(folder):
    (folder / "counting.py").write_text(COUNTING)
    recipe = load_recipe(None, task="counting.py:Counting")
    tokenizer = load_tokenizer(recipe.policy)
    assert [p.answer for p in prompts_of(recipe, "test", tokenizer, most=3)] == [0, 1, 2]
