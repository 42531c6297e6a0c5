"""Own data in a folder outside of the package: a mixture that is resumed, a DatasetDict."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from trained import trained_weights

import spo
from spo.api import recipe_of
from spo.metrics import read_metrics
from spo.tasks import problems_of

RECIPE = """
task: rows
reward:
  - {rule: answer}
  - {rule: overlong, weight: 0.5, options: {max_tokens: 48, buffer_tokens: 40}}
data:
  train: {./sums.jsonl: 2, ./products.jsonl: 1}
  test_share: 0.1
engine: {name: hf, max_num_seqs: 32, max_model_len: 96}
shape: {kind: star, group_size: 3}
sampling: {max_new_tokens: 48, truncated: reward}
train: {iterations: 2, prompts: 4, minibatches: 1, learning_rate: 1.0e-3}
eval: {every: 0, problems: 2}
"""


def rows_of(sign, *numbers):
    """Sums or products with 3."""
    return [
        {"question": f"arithmetic {n} {sign} 3\n", "answer": n + 3 if sign == "+" else 3 * n}
        for n in numbers
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a recipe and the two files of its mixture."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    write(tmp_path / "sums.jsonl", rows_of("+", *range(2, 17)))
    write(tmp_path / "products.jsonl", rows_of("*", *range(2, 17)))
    return tmp_path


def test_a_mixture_that_is_interrupted_goes_on_as_if_nothing_had_happened(folder):
    def interrupt(line):
        if line["stage"] == "train" and line["iteration"] == 1:
            raise KeyboardInterrupt

    spo.train("recipe.yaml", out="whole")
    with pytest.raises(KeyboardInterrupt):
        spo.train("recipe.yaml", out="parts", report=interrupt)
    spo.train("recipe.yaml", out="parts", resume=True)
    whole, parts = trained_weights("whole"), trained_weights("parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    losses = []
    for out in ("whole", "parts"):
        lines = [line for line in read_metrics(Path(out, "metrics.jsonl")) if "loss" in line]
        assert [line["iteration"] for line in lines] == [0, 1]
        assert all(line["grad_norm"] > 0 for line in lines)
        losses.append([line["loss"] for line in lines])
    assert losses[0] == losses[1]
    asked = ""
    for which in ("first", "last"):
        file = f"forest-{which}.safetensors"
        forest = spo.Forest.load(Path("whole", file))
        assert forest == spo.Forest.load(Path("parts", file))  # prompts and responses
        asked += "".join(tree.root.text for tree in forest.trees)
    assert asked.count("+") + asked.count("*") == 8 and "+" in asked and "*" in asked


def test_a_dataset_dict_is_evaluated_on_its_test_split():
    test = rows_of("+", *range(5))
    splits = {"train": Dataset.from_list(rows_of("*", *range(9))), "test": Dataset.from_list(test)}
    small = {"engine": {"name": "hf", "max_num_seqs": 32, "max_model_len": 64}}
    small |= {"max_new_tokens": 40, "problems": 8}

    def tested(data):
        return spo.evaluate("grpo", data=data, reward={"rule": "answer"}, **small)

    both = tested(DatasetDict(splits))
    assert both[0].problems == 5
    assert both == tested(DatasetDict(test=splits["test"])) == tested(test)


def test_a_mixture_from_python_may_be_a_list_of_data_sets(folder):
    parts = [{"path": "./sums.jsonl", "weight": 2}, {"path": "./products.jsonl"}]
    given = recipe_of("grpo", data={"train": parts, "test_share": 0.1}, reward={"rule": "answer"})
    drawn = list(islice(problems_of(given, "train"), 100))
    assert drawn == list(islice(problems_of(recipe_of("recipe.yaml"), "train"), 100))
    assert {problem.text.split()[2] for problem in drawn} == {"+", "*"}
