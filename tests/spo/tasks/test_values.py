"""The values of rows: exactly those of the file or of the caller, as JSON has them."""

import csv
import datetime
import json
import warnings

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from sentences import one_sentence
from test_datasets import rows, write_lines, write_parquet

from spo.tasks import get_task
from spo.tasks.files import rows_of_files
from spo.tasks.memory import data_settings, name_of
from spo.tasks.rules import Answer, Exact, Number
from spo.tasks.sources import Source, read_rows

# Of each list the values stand in one column, so that a reader with types would change some.
MIXED = [
    ["007", 2],
    [2, "007"],
    ["1.50", 2.5],
    ["[1]", [2]],
    ["true", False],
    ["null", 3],
    [["007", 2], ["x"]],
    ["2020-01-01", "2020-01-02 10:00:00"],
    [2**63, 3],
    [2**53 + 1, 2.5],
    [12345678901234567890123, "x"],
    [{"id": "007", "a": [1]}, {"id": 5, "b": {}}],
    [0.1, 1e300, -0.0],
    ["", " a\u2028b ", "\U0001f600"],
]


def same(found: object, expected: object) -> bool:
    """Equal with types: 1 is neither 1.0 nor True."""
    return json.dumps(found) == json.dumps(expected)


@pytest.mark.parametrize("values", MIXED, ids=repr)
@pytest.mark.parametrize("kind", ["a.jsonl", "a.json", "lines.json", "list.jsonl"])
def test_json_is_what_the_file_says(tmp_path, values, kind):
    table = [{"q": "Why?", "answer": v, "reward_model": {"ground_truth": v}} for v in values]
    path = tmp_path / kind
    if kind in ("a.jsonl", "lines.json"):
        write_lines(path, table)
    else:
        path.write_text(json.dumps(table, indent=1))
    assert same(rows(path, "test"), table)
    assert same([row for row, _ in rows_of_files([path], 1)], table[:1])


def test_a_json_object_is_one_row_and_a_mark_of_byte_order_is_none(tmp_path):
    row = {"problem": "p", "level": 2}
    (tmp_path / "a.json").write_text(json.dumps(row, indent=1), "utf-8-sig")
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n\n", "utf-8-sig")
    assert rows(tmp_path / "a.json", "test") == rows(tmp_path / "a.jsonl", "test") == [row]
    (tmp_path / "a.json").write_text(" \n")
    with one_sentence(["hold no rows"]):
        rows(tmp_path / "a.json", "test")


def test_cells_of_csv_are_texts(tmp_path):
    texts = ["007", "1.10", "1e3", "True", "None", "2020-01-01", "12345678901234567890123", ""]
    long = 'x, "\n' * 50_000
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8-sig") as file:
        lines = csv.writer(file)
        lines.writerows([["", "question", "answer"], *([0, long, text] for text in texts)])
        file.write("\r\n0,short\r\n")
    limit = csv.field_size_limit()
    found = rows(tmp_path / "a.csv", "test")
    assert found[:-1] == [{"question": long, "answer": text} for text in texts]
    assert found[-1] == {"question": "short", "answer": None}
    assert csv.field_size_limit() == limit


def test_rules_and_graders_take_the_texts_of_csv(tmp_path):
    (tmp_path / "a.csv").write_text("problem,answer\np,007\nq,1.10\n")
    first, second = get_task("rows").problems("test", 0, source=str(tmp_path / "a.csv"))
    assert Number()("It is 7", first.answer) == Number()("11/10", second.answer) == 1
    assert Exact()("007", first.answer) == Answer()("<answer>1.10</answer>", second.answer) == 1
    assert Exact()("7", first.answer) == 0
    (tmp_path / "a.csv").write_text("problem,answer\np,073\n")
    for task in ("gsm8k", "math", "aime24"):
        (found,) = get_task(task).problems("test", 0, source=str(tmp_path / "a.csv"))
        assert get_task(task).grade("#### 73" if task == "gsm8k" else "\\boxed{73}", found.answer)


def test_a_row_without_a_column_has_none_in_it(tmp_path):
    table = [{"q": "a", "x": 1}, {"q": "b", "y": 2}, {"q": "c"}]
    expected = [{"q": "a", "x": 1, "y": None}, {"q": "b", "x": None, "y": 2}]
    expected += [{"q": "c", "x": None, "y": None}]
    path = write_lines(tmp_path / "a.jsonl", table)
    assert rows(path, "test") == rows(name_of(table), "test") == expected
    table = [{"question": "a", "answer": "1"}, {"Question": "b"}, {"question": "c", "target": 3}]
    for source in (str(write_lines(path, table)), name_of(table)):
        with pytest.warns(UserWarning, match="1 without a value in answer or target"):
            found = list(get_task("rows").problems("test", 0, source=source))
        assert [(p.text, p.answer) for p in found] == [("a", "1"), ("c", 3)]


@pytest.mark.parametrize("columns", [{}, {"answer": "reward_model.ground_truth"}])
def test_a_row_without_what_a_column_holds_is_left_out(columns):
    table = [{"prompt": "a", "reward_model": {"ground_truth": 1}}, {"prompt": "b"}]
    table += [{"prompt": "c", "reward_model": {"style": "rule"}}] if columns else []
    mine = name_of(table[::-1])
    with pytest.warns(UserWarning, match=f"{len(table) - 1} without a value in reward_model"):
        (found,) = get_task("rows").problems("test", 0, source=Source(mine, columns))
    assert (found.text, found.answer) == ("a", 1)
    with one_sentence(["data.columns.answer: expected one of the columns", "'reward_model.x'"]):
        wrong = Source(mine, {"answer": "reward_model.x"})
        get_task("rows").problems("test", 0, source=wrong)


# Values that JSON has no word for

DAY, TIME = datetime.date(2020, 1, 2), datetime.datetime(2020, 1, 2, 3, 4, 5)
ODD = [
    (np.int64(4), 4),
    (np.float32(0.5), 0.5),
    (np.bool_(True), True),
    (np.str_("007"), "007"),
    (np.array(3), 3),
    (np.array([1, 2]), [1, 2]),
    (np.array([[1.5], [2.5]]), [[1.5], [2.5]]),
    ([np.int64(4), {"a": np.float32(0.5)}], [4, {"a": 0.5}]),
    (np.array(["x", None], object), ["x", None]),
    ((1, (2,)), [1, [2]]),
    ({1: "a"}, {"1": "a"}),
    (torch.tensor([1, 2]), [1, 2]),
    (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    (DAY, "2020-01-02"),
    (TIME, "2020-01-02T03:04:05"),
    (datetime.time(3, 4), "03:04:00"),
    (pd.Timestamp(TIME), "2020-01-02T03:04:05"),
    (np.datetime64(TIME, "ns"), "2020-01-02T03:04:05"),
    (np.array(["2020-01-02"], "datetime64[D]"), ["2020-01-02T00:00:00"]),
]


@pytest.mark.parametrize(("given", "expected"), ODD, ids=lambda v: f"{v!r:.40}")
def test_numbers_arrays_and_dates_become_plain_values(given, expected):
    mine = name_of([{"prompt": "Why?", "answer": given, "more": given}])
    (found,) = get_task("rows").problems("test", 0, source=mine)
    assert same([found.answer, found.columns["more"]], [expected, expected])
    assert mine == name_of([{"prompt": "Why?", "answer": expected, "more": expected}])


@pytest.mark.parametrize("kind", ["parquet", "memory", "data set"])
def test_columns_that_json_cannot_hold_are_left_out_with_one_warning(tmp_path, kind):
    table = [{"prompt": p, "answer": 1, "raw": b"x", "day": DAY, "bits": [b"y"]} for p in "abc"]
    if kind == "parquet":
        source = str(write_parquet(tmp_path / "a.parquet", table))
    else:
        source = name_of(table if kind == "memory" else datasets.Dataset.from_list(table))
    called = f"data set {source}" if kind == "parquet" else "your rows"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        found = list(get_task("rows").problems("test", 0, source=source))
    assert [p.columns for p in found] == [{"answer": 1, "day": "2020-01-02"}] * 3
    (said,) = (str(w.message) for w in warned)
    assert said == f"{called}: columns that JSON cannot hold are left out: raw, bits"


def test_what_cannot_be_a_problem_or_an_answer(tmp_path):
    for row, words in (
        ({"prompt": "Why?", "answer": b"x"}, ["expected an answer that JSON can hold", "b'x'"]),
        ({"prompt": b"Why?"}, ["expected a text or messages, found b'Why?'"]),
        ({"prompt": "\ud83d?"}, ["expected a problem of Unicode text, found '\\ud83d?'"]),
    ):
        with one_sentence(["your rows, row 1", *words]):
            get_task("rows").problems("test", 0, source=name_of([row]))


# What a Python caller may give


@pytest.mark.parametrize("layout", [None, "pandas", "arrow", "numpy", "torch"])
def test_a_data_set_in_any_format_is_its_rows(layout):
    table = [{"question": f"q{i}", "answer": 1.1 * i, "ids": [i]} for i in range(3)]
    given = datasets.Dataset.from_list(table).with_format(layout)
    assert name_of(given) == name_of(table)
    assert rows(name_of(given), "train") == table
    chosen = datasets.Dataset.from_list(table).with_format(layout, columns=["question"])
    assert rows(name_of(chosen), "train") == [{"question": row["question"]} for row in table]


def test_a_transform_of_a_data_set_is_kept():
    given = datasets.Dataset.from_list([{"a": 1}, {"a": 2}])
    given = given.with_transform(lambda batch: {"question": [f"q{a}" for a in batch["a"]]})
    assert rows(name_of(given), "train") == [{"question": "q1"}, {"question": "q2"}]


def test_a_pandas_frame_is_its_rows():
    frame = pd.DataFrame({"question": ["q", "r"], "answer": ["x", None], "when": [TIME, pd.NaT]})
    expected = [
        {"question": "q", "answer": "x", "when": TIME.isoformat()},
        {"question": "r", "answer": None, "when": None},
    ]
    assert rows(name_of(frame), "train") == expected


def test_what_a_caller_changes_later_changes_nothing():
    table = [{"question": "q", "answer": [1]}]
    name = name_of(table)
    table[0]["answer"].append(2)
    rows(name, "train")[0]["answer"].append(3)
    assert rows(name, "train") == [{"question": "q", "answer": [1]}]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([{"q": 1}, {5: 6}], ["data: row 2: expected columns named by texts, found 5"]),
        (pd.DataFrame([[1, 2]]), ["data: row 1: expected columns named by texts, found 0"]),
        ({"train": [{"q": 1}], "test": []}, ["data.test: expected rows, found none"]),
        ({"train": {"train": []}}, ["data.train: expected rows", "found dict"]),
    ],
    ids=["key", "frame", "empty test", "dict"],
)
def test_what_rows_cannot_be(data, words):
    with one_sentence(words):
        data_settings(data)


def test_rows_without_columns():
    with one_sentence(["your rows: expected rows with columns, found {} in each row"]):
        read_rows(Source(name_of([{}, {}])), "train")
