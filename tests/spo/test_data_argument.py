"""What `data` of `spo.train` means: rows, data sets, paths, mixtures, and dicts of these."""

import json

import datasets
import pytest
from sentences import one_sentence

from spo.api import HELD_OUT, data_of, recipe_of
from spo.tasks import problems_of

ROWS = [{"question": f"q{i}", "answer": i} for i in range(40)]
TESTS = [{"question": f"t{i}", "answer": i} for i in range(5)]
LONG = [{"question": "x" * 10_000, "answer": 1}]


@pytest.fixture
def folder(tmp_path):
    """A data set that `save_to_disk` wrote, with a test split."""
    train, test = (datasets.Dataset.from_list(table) for table in (ROWS, TESTS))
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "own")
    return str(tmp_path / "own")


def write(path, table) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return str(path)


def evaluated(data) -> list[str]:
    """The test problems of a run with this data."""
    recipe = recipe_of("grpo", data=data, reward={"rule": "number"}, engine="hf")
    return [problem.text for problem in problems_of(recipe, "test")]


def test_a_path_is_tested_on_its_own_test_split(folder, tmp_path):
    own = [row["question"] for row in TESTS]
    listed = [{"path": folder, "weight": 1}]
    for data in (folder, tmp_path / "own", {"train": folder}, {"train": {folder: 1}}, listed):
        assert evaluated(data) == own
    assert evaluated(datasets.DatasetDict.load_from_disk(folder)) == own
    assert data_of({"train": folder, "test_share": 0.1})["test_share"] == 0.1


def test_without_one_a_share_is_held_out(folder, tmp_path):
    path = write(tmp_path / "mine.jsonl", ROWS)
    for data in (path, ROWS, f"{folder}#train", {"train": {path: 1, folder: 2}}):
        assert data_of(data)["test_share"] == HELD_OUT
    assert len(evaluated(path)) == 2 and evaluated(path) == evaluated(ROWS)


def test_a_list_of_data_sets_with_weights_is_a_mixture_also_of_rows_in_memory(tmp_path):
    path = write(tmp_path / "mine.jsonl", TESTS)
    (rows, _) = data_of(ROWS).values()
    for data in (
        [{"path": path, "weight": 2}, {"path": ROWS}],
        {"train": [{"path": path, "weight": 2}, {"path": datasets.Dataset.from_list(ROWS)}]},
    ):
        assert data_of(data)["train"] == [{"path": path, "weight": 2}, {"path": rows}]
        assert data_of(data)["test_share"] == HELD_OUT
        assert len(evaluated(data)) == 3  # of each set at least one


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"train": ROWS, "test": []}, ["data.test: expected rows, found none"]),
        (
            {"train": datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS))},
            ["data.train: expected rows", "found DatasetDict"],
        ),
        ({"train": None}, ["data.train: expected rows", "found NoneType"]),
        ({"train": [{"path": 3}]}, ["data.train: expected rows", "found int"]),
        ([{}], ["your rows: expected rows with columns, found {} in each row"]),
        ({"train": ROWS, "test_share": LONG}, ["data.test_share", "x" * 9]),
        ({"train": {"a": LONG}}, ["data.train: expected a positive weight for a"]),
        ({"train": ROWS, "columns": LONG}, ["data.columns: expected {problem: column}, found"]),
        ({"train": ROWS, "columns": {"problem": LONG}}, ["data.columns.problem: expected a"]),
    ],
    ids=["empty", "splits", "none", "number", "no columns", "share", "weight", "columns", "column"],
)
def test_other_data_is_one_short_sentence(data, words):
    with pytest.raises(ValueError) as error:
        evaluated(data)
    said = str(error.value)
    assert len(said) < 250 and "\n" not in said and all(word in said for word in words)


def test_evaluation_sets_take_names_of_data_sets():
    sets = {"hard": {"data": {"test": LONG}}}
    with one_sentence(["eval.sets.hard.data.test: expected one data set", "found list; rows in m"]):
        recipe_of("grpo", data=ROWS, reward={"rule": "number"}, eval={"sets": sets})
