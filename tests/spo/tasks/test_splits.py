"""Configurations, splits, doubles and mixtures: which problems train, which test, and when."""

import math
import shutil
from itertools import islice

import datasets
import pytest
from sentences import one_sentence
from test_datasets import GSM8K, rows, write_lines, write_parquet

from spo.config.data import DataConfig
from spo.config.recipe import Recipe, load_recipe
from spo.plan import describe
from spo.tasks import get_task, problems_of
from spo.tasks.memory import data_settings


def numbered(*numbers) -> list[dict]:
    return [{"question": f"Question {n}?", "answer": str(n)} for n in numbers]


def drawn(split="train", count=100, seed=0, task="rows", **data) -> list[str]:
    """The answers of the first problems of a recipe."""
    problems = problems_of(Recipe(task=task, data=DataConfig(**data)), split, seed)
    return [problem.answer for problem in islice(problems, count)]


# Configurations and splits


@pytest.fixture
def two(tmp_path):
    """gsm8k as it is published: the same questions in two configurations, of ten rows each."""
    for name, mark in (("main", "A"), ("socratic", "B")):
        table = [row | {"style": mark} for row in numbered(*range(10))]
        write_parquet(tmp_path / f"two/{name}/train-00000-of-00001.parquet", table)
    return tmp_path / "two"


def test_several_configurations_are_never_merged_unasked(two):
    with one_sentence(["main, socratic", "none chosen", f"write {two}:main, or {two}:* "]):
        drawn("test", train=str(two), test="same")
    assert len(drawn("test", train=f"{two}:socratic", test="same")) == 10
    with pytest.warns(UserWarning, match="of 20 train rows, these are left out: 10 there before"):
        assert len(drawn("test", train=f"{two}:*", test="same")) == 10
    with one_sentence([f"{two}:none: no configuration none; it holds main, socratic"]):
        rows(f"{two}:none", "train")


def test_configurations_beside_files_or_below_a_folder(two, tmp_path):
    with one_sentence(["two/main, two/socratic", f"write {tmp_path}:two/main,"]):
        rows(tmp_path, "train")
    assert len(rows(f"{tmp_path}:two/main", "train")) == 10
    shutil.copytree(two, tmp_path / "more")
    shutil.rmtree(tmp_path / "more/socratic")
    write_lines(tmp_path / "more/train.jsonl", numbered(77))
    with one_sentence([" ., main,", f"write {tmp_path}/more:main"]):
        rows(tmp_path / "more", "train")


def test_a_card_lists_the_configurations_of_a_folder(tmp_path):
    for name, numbers in (("a", (1, 2)), ("b", (3,)), ("c", (4, 5))):
        write_lines(tmp_path / f"{name}.jsonl", numbered(*numbers))
    head = "---\nconfigs:\n- config_name: easy\n  data_files:\n"
    head += "  - {split: train, path: a.jsonl}\n  - {split: exam, path: b.jsonl}\n"
    (tmp_path / "README.md").write_text(f"{head}---\n")
    assert len(rows(tmp_path, "train")) == 2 and len(rows(f"{tmp_path}#exam", "test")) == 1
    hard = "- config_name: hard\n  data_files: c.jsonl\n"
    (tmp_path / "README.md").write_text(f"{head}{hard}---\n")
    with one_sentence(["easy, hard", f"write {tmp_path}:easy"]):
        rows(tmp_path, "train")
    assert len(rows(f"{tmp_path}:hard", "train")) == 2
    assert len(rows(f"{tmp_path}:easy#exam", "test")) == 1


def test_splits_by_name(tmp_path):
    for name, size in (("train_sft", 2), ("train_gen", 3), ("validation", 4), ("test", 5)):
        write_parquet(tmp_path / f"data/{name}-00000-of-00001.parquet", numbered(*range(size)))
    with one_sentence(["splits of this kind", "train_gen, train_sft", f"{tmp_path}#train_gen"]):
        rows(tmp_path, "train")
    assert [len(rows(f"{tmp_path}#{n}", "train")) for n in ("train_sft", "train_gen")] == [2, 3]
    assert len(rows(f"{tmp_path}#val", "test")) == 4 and len(rows(tmp_path, "test")) == 5
    assert len(rows(f"{tmp_path}:data#test", "train")) == 5
    assert len(rows(f"{tmp_path}:*", "train")) == 5
    with one_sentence([f"{tmp_path}#exam: no exam files; it holds test, train, validation"]):
        rows(f"{tmp_path}#exam", "train")
    with one_sentence(["is one file, without parts"]):
        rows(f"{write_lines(tmp_path / 'one.jsonl', GSM8K)}#test", "train")
    assert len(drawn("test", train=f"{tmp_path}#train_sft", test=f"{tmp_path}#test")) == 5


def test_shards_of_one_split_are_one_set(tmp_path):
    for i in (1, 2, 10):
        write_lines(tmp_path / f"train-{i}.jsonl", numbered(i))
    assert [row["answer"] for row in rows(tmp_path, "train")] == ["1", "2", "10"]


# Train and test


def test_one_set_for_both_needs_a_word(tmp_path):
    path = str(write_lines(tmp_path / "mine.jsonl", numbered(*range(40))))
    choices = ["data.test=same", "data.test_share=0.05", "another set"]
    with one_sentence([f"data.test: expected a test split in data set {path}, found", *choices]):
        drawn("test", train=path)
    with one_sentence(["each of the 40 train problems is a test problem too", *choices]):
        drawn("train", train=path, test=path)
    assert len(set(drawn("train", train=path))) == 40  # a rollout tests nothing
    test = drawn("test", train=path, test="same")
    assert test == [str(n) for n in range(40)]
    assert sorted(drawn("train", 40, train=path, test="same")) == sorted(test)


def test_a_test_split_of_the_training_set_needs_no_word(tmp_path):
    write_lines(tmp_path / "train.jsonl", numbered(1, 2))
    write_lines(tmp_path / "test.jsonl", numbered(3))
    assert drawn("test", train=str(tmp_path)) == ["3"]
    assert set(drawn("train", train=str(tmp_path))) == {"1", "2"}


def test_a_share_is_held_out_whatever_the_order_of_the_rows(tmp_path):
    path = write_lines(tmp_path / "mine.jsonl", numbered(*range(40)))
    held = drawn("test", train=str(path), test_share=0.1)
    assert held == HELD
    train = drawn("train", 36, train=str(path), test_share=0.1)
    assert len({*train, *held}) == 40 and not {*train} & {*held}
    write_lines(path, numbered(*reversed(range(40))))
    assert sorted(drawn("test", train=str(path), test_share=0.1)) == sorted(held)
    assert len(drawn("test", train=str(path), test_share=0.001)) == 1
    write_lines(path, numbered(1))
    with one_sentence(["data.test_share: 0.5 of the 1 problems", "leaves none to train on"]):
        drawn("train", train=str(path), test_share=0.5)


def test_what_is_left_out_is_counted(tmp_path):
    table = [*numbered(1, 2, 3, 3, 1), {"question": "Which?", "answer": " "}]
    table += [{"question": None, "answer": "5"}, {"question": "Question 2?", "answer": "two"}]
    train = str(write_lines(tmp_path / "train.jsonl", table))
    shown = {"question": "\nQuestion 3? ", "answer": "3"}
    test = str(write_lines(tmp_path / "test.jsonl", [shown, *numbered(3, 4)]))
    words = "1 without a value in answer, 1 .* in question, 2 there before, 1 in the test"
    with pytest.warns(UserWarning, match=words) as warned:
        assert {*drawn("train", train=train, test=test)} == {"1", "2", "two"}
    assert len(warned) == 1
    with pytest.warns(UserWarning, match="of 3 test rows, these are left out: 1 there before$"):
        assert drawn("test", train=train, test=test) == ["3", "4"]
    write_lines(tmp_path / "train.jsonl", [{"question": "Which?", "answer": None}] * 2)
    with one_sentence(
        ["none of 2 train rows has a problem and an answer: 2 without a value in answer"]
    ):
        drawn("train", train=train, test=test)


@pytest.mark.parametrize("task", ["gsm8k", "math", "aime24", "rows"])
def test_rows_without_an_answer_are_left_out_in_every_task(tmp_path, task):
    table = [{"problem": "a", "answer": ""}, {"problem": "b", "answer": "#### 7"[-1:]}]
    path = write_lines(tmp_path / "a.jsonl", [*table, {"problem": "c", "answer": None}])
    with pytest.warns(UserWarning, match="2 without a value in answer"):
        found = list(get_task(task).problems("test", 0, source=str(path)))
    assert [problem.text for problem in found] == ["b"]


def test_rows_without_answers_differ_by_their_columns(tmp_path):
    asked = [{"prompt": "Write.", "length": n} for n in (1, 2, 2)]
    path = write_lines(tmp_path / "a.jsonl", asked)
    with pytest.warns(UserWarning, match="1 there before"):
        found = list(get_task("rows").problems("test", 0, source=str(path)))
    assert [problem.columns for problem in found] == [{"length": 1}, {"length": 2}]


# Mixtures


@pytest.fixture
def three(tmp_path):
    sizes = {"a": range(10), "b": range(100, 107), "c": range(200, 300)}
    return [str(write_lines(tmp_path / f"{k}.jsonl", numbered(*v))) for k, v in sizes.items()]


def test_a_mixture_draws_by_weight_and_uses_up_each_set(three):
    mixed = {three[0]: 6, three[1]: 3.0, three[2]: 1}
    found = [int(n) for n in drawn(count=2000, train=mixed, test="same")]
    parts = [[n for n in found if n // 100 == part] for part in range(3)]
    for part, share in zip(parts, (0.6, 0.3, 0.1), strict=True):
        assert abs(len(part) - 2000 * share) < 4 * math.sqrt(2000 * share * (1 - share))
    for part, size in zip(parts[:2], (10, 7), strict=True):
        passes = [part[i : i + size] for i in range(0, len(part) - size, size)]
        assert all(len(set(p)) == size for p in passes) and len(set(map(tuple, passes))) > 1
    assert drawn("test", 1000, train=mixed, test="same") == [
        str(n) for n in (*range(10), *range(100, 107), *range(200, 300))
    ]


def test_a_mixture_is_the_same_for_a_seed_and_goes_on_at_any_index(three):
    listed = [{"path": path, "weight": w} for path, w in zip(three, (2, 1, 1), strict=True)]
    found = drawn(count=300, train=listed, test="same")
    assert found[:12] == MIXED
    assert drawn(count=300, train=listed, test="same", seed=1) != found
    assert drawn(count=500, train=listed, test="same")[:300] == found


def test_no_part_of_a_mixture_trains_on_what_another_holds_out(three, tmp_path):
    copy = str(write_lines(tmp_path / "copy.jsonl", numbered(*range(5, 15))))
    parts = {three[0]: 1.0, copy: 1.0}
    held = {*drawn("test", train=parts, test_share=0.3)}
    train = {*drawn("train", 500, train=parts, test_share=0.3)}
    assert len(held) > 2 and held | train == {str(n) for n in range(15)} and not held & train


def test_a_mixture_needs_a_test_set_and_may_name_columns(three, tmp_path):
    with one_sentence(["data.test: expected the problems to test on beside a mixture"]):
        drawn("test", train={three[0]: 1, three[1]: 1})
    other = str(write_lines(tmp_path / "d.jsonl", [{"x": "Why?", "y": "900"}]))
    named = {"path": other, "columns": {"problem": "x", "answer": "y"}}
    found = drawn(train=[named, {"path": three[0], "weight": 2}], test=three[1])
    assert {*found} == {"900", *map(str, range(10))}


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.train={}", ["data.train: expected a data set, {path: weight} or a list", "{}"]),
        ("data.train=5", ["data.train: expected a data set", "found 5"]),
        ("data.train=[a, b]", ["data.train: expected a data set", "['a', 'b']"]),
        ("data.train={a: 0}", ["a positive weight for a, found 0"]),
        ("data.train={a: -1.5}", ["a positive weight for a, found -1.5"]),
        ("data.train={a: .inf}", ["a positive weight for a, found inf"]),
        ("data.train={a: yes}", ["a positive weight for a, found True"]),
        ("data.train={a: x}", ["a positive weight for a, found 'x'"]),
        ("data.train=[{weight: 1}]", ["expected a data set in each part, found None"]),
        ("data.train=[{path: a}, {path: a}]", ["each data set once, found a twice"]),
        ("data.train=[{path: a, wait: 1}]", ["expected path, weight or columns, found wait"]),
        ("data.columns={problem: q}", ["data.columns: expected data.train or data.test beside"]),
        ("data={train: a, columns: {promt: q}}", ["problem or answer, found promt"]),
        ("data={train: a, columns: {answer: 3}}", ["data.columns.answer", "name, found 3"]),
        ("data={train: a, test: b, test_share: 0.1}", ["data.test_share: expected no data.test"]),
        ("data.test_share=1.0", ["data.test_share", "less than 1"]),
    ],
)
def test_settings_that_cannot_be(setting, words):
    with one_sentence(words):
        load_recipe(None, ["task=rows", setting])


def test_tasks_without_data_refuse_its_settings():
    for data in ({"test_share": 0.1}, {"train": "a", "columns": {"answer": "x"}}):
        with one_sentence(["data.t", "task arithmetic reads no data set"]):
            drawn(task="arithmetic", **data)
    with one_sentence(["data.test: expected data.train beside it"]):
        drawn(test="same")


def test_a_saved_mixture_reads_back_and_is_described(three, tmp_path):
    mixed = f"{{{three[0]}: 0.7, {three[1]}: 0.3}}"
    config = load_recipe(
        None,
        ["task=rows", "reward={rule: exact}", f"data.train={mixed}", f"data.test={three[2]}"],
    )
    lines = describe(config).splitlines()
    assert [line.split()[1] for line in lines if ": local" in line] == [f"{p}:" for p in three]


# Rows of a Python caller


def test_rows_and_data_sets_of_python_have_names_that_follow_from_their_content(tmp_path):
    table = numbered(*range(6))
    mine = data_settings(table)
    again = data_settings(datasets.Dataset.from_list(table))
    assert mine == again == {"train": mine["train"]}
    assert data_settings(numbered(*range(7))) != mine
    table[0]["answer"] = "changed by its owner"
    assert drawn("test", **mine, test="same") == [str(n) for n in range(6)]
    both = datasets.DatasetDict(
        train=datasets.Dataset.from_list(numbered(1, 2)),
        test=datasets.Dataset.from_list(numbered(2, 3)),
    )
    with pytest.warns(UserWarning, match="of 2 train rows, .*: 1 in the test set too"):
        assert {*drawn(**data_settings(both))} == {"1"}
    assert drawn("test", **data_settings({"train": numbered(1), "test": both["test"]})) == [
        "2",
        "3",
    ]
    assert data_settings(tmp_path) == {"train": str(tmp_path)}
    with one_sentence(["data.test: expected a test split in your rows, found none"]):
        drawn("test", **mine)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "expected rows, found none"),
        ([{"a": 1}, 1], "row 2: expected a dict, found int"),
        (3, "expected rows .a list of dicts.*found int"),
        (iter(()), "expected rows .a list of dicts.*found tuple_iterator"),
        (datasets.Dataset.from_list([{"a": 1}]).to_iterable_dataset(), ".*found IterableDataset"),
        ({"dev": []}, "expected a split train or test, found dev"),
    ],
)
def test_other_data_of_python_is_refused(data, words):
    with pytest.raises(ValueError, match=f"^data: {words}"):
        data_settings(data)


def test_rows_of_another_process_are_named():
    with one_sentence(["data set memory:12ab: rows of a Python caller", "pass the same rows"]):
        drawn(train="memory:12ab", test="same")


def test_values_that_json_cannot_hold_stay_out_of_columns():
    mine = data_settings([{"prompt": "Why?", "raw": b"x", "answer": 1, "level": 2}])
    (found,) = get_task("rows").problems("test", 0, source=mine["train"])
    assert found.columns == {"answer": 1, "level": 2}
    mine = data_settings([{"prompt": "Why?", "answer": b"x"}])
    with one_sentence(["row 1: expected an answer that JSON can hold, found b'x'"]):
        get_task("rows").problems("test", 0, source=mine["train"])


# Orders that a resumed run relies on: the same on every machine, whatever the process's hashes

HELD = ["11", "22", "27", "39"]
MIXED = ["1", "295", "0", "3", "4", "103", "8", "2", "233", "7", "231", "255"]
