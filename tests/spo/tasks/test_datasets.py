"""Data sets in the formats of their publishers, and what is refused."""

import csv
import json
import socket
import subprocess
import sys
from itertools import islice
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from sentences import one_sentence

from spo.tasks import get_task
from spo.tasks.sources import read_rows

QUESTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May and 48 in April. How many in all?"
GSM8K = [
    {"question": QUESTION, "answer": "48+24 = <<48+24=72>>72.\n#### 72"},
    {"question": "A house costs $1,000 a month. And for a year?", "answer": "It is\n#### 12,000"},
    {"question": "A line\u2028separator in a string", "answer": "#### -3"},
]
MATH = [
    {
        "problem": f"What is {i} + {i}?",
        "level": "Level 1",
        "type": "Algebra",
        "solution": f"First \\boxed{{0}} is wrong, then $\\boxed{{\\frac{{{2 * i}}}{{1}}}}$.",
    }
    for i in range(12)
]
KNIGHTS = [
    {
        "quiz": "You meet 3 inhabitants: Zoey, Riley, and Ella. So who is a knight?",
        "names": ["Zoey", "Riley", "Ella"],
        "knight_knave": {"knight": "knight", "knave": "knave"},
        "solution": [True, False, True],
        "solution_text_format": "(1) Zoey is a knight\n(2) Riley is a knave\n(3) Ella is a knight",
    },
    {
        "quiz": "You meet 2 inhabitants: Al and Bo.",
        "names": ["Al", "Bo"],
        "solution": [False, False],
    },
]


def write_lines(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), "utf-8")
    return path


def write_parquet(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def read(task: str, split: str, source: Path, **options) -> list:
    """The problems of one pass, as (text, answer)."""
    stream = get_task(task, options).problems(split, 0, str(source))
    return [(p.text, p.answer) for p in islice(stream, 100)]


def rows(source: object, split: str) -> list[dict]:
    return [
        {name.lower(): value for name, value in row.items()}
        for row, _ in read_rows(str(source), split)
    ]


# Formats


def gsm8k_jsonl(root):
    write_lines(root / "train.jsonl", GSM8K[:1])
    write_lines(root / "test.jsonl", GSM8K)


def gsm8k_parquet(root):
    write_parquet(root / "main/train-00000-of-00001.parquet", GSM8K[:1])
    write_parquet(root / "main/test-00000-of-00002.parquet", GSM8K[:1])
    write_parquet(root / "main/test-00001-of-00002.parquet", GSM8K[1:])
    (root / "README.md").write_text("about test")


def gsm8k_saved_to_disk(root):
    splits = {"train": GSM8K[:1], "test": GSM8K}
    whole = datasets.DatasetDict({k: datasets.Dataset.from_list(v) for k, v in splits.items()})
    whole.save_to_disk(root)
    (root / "test/cache-1f.arrow").write_bytes(b"not for us")


def gsm8k_arrow_file(root):
    table = pa.Table.from_pylist(GSM8K)
    for split, size in (("train", 1), ("test", 3)):
        with pa.ipc.new_file(root / f"{split}.arrow", table.schema) as writer:
            writer.write_table(table[:size])


def gsm8k_csv(root):
    for split, size in (("train", 1), ("test", 3)):
        with (root / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["question", "answer"])
            writer.writeheader()
            writer.writerows(GSM8K[:size])


def gsm8k_json_list(root):
    for split, size in (("train", 1), ("test", 3)):
        (root / f"{split}.json").write_text(json.dumps(GSM8K[:size], indent=1), "utf-8-sig")


@pytest.mark.parametrize(
    "write",
    [
        gsm8k_jsonl,
        gsm8k_parquet,
        gsm8k_saved_to_disk,
        gsm8k_arrow_file,
        gsm8k_csv,
        gsm8k_json_list,
    ],
)
def test_gsm8k_in_every_format(tmp_path, write):
    write(tmp_path)
    expected = [(row["question"], n) for row, n in zip(GSM8K, ["72", "12,000", "-3"], strict=True)]
    assert read("gsm8k", "test", tmp_path) == expected
    assert read("gsm8k", "train", tmp_path) == expected[:1] * 100


def test_a_named_file_is_read_whole_whatever_its_split(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", GSM8K)
    assert len(read("gsm8k", "test", path)) == 3


def test_math_folders_are_read_in_the_order_of_their_numbers(tmp_path):
    for i, row in enumerate(MATH):
        for split in ("train", "test"):
            path = tmp_path / split / "counting_and_probability" / f"{i}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(row | {"problem": f"{split} {row['problem']}"}))
    expected = [(f"test {r['problem']}", f"\\frac{{{2 * i}}}{{1}}") for i, r in enumerate(MATH)]
    assert read("math", "test", tmp_path) == expected


def test_math_parquet_of_several_subjects_is_read_as_one_if_asked(tmp_path):
    write_parquet(tmp_path / "algebra/test-00000-of-00001.parquet", MATH[:2])
    write_parquet(tmp_path / "geometry/test-00000-of-00001.parquet", MATH[2:3])
    write_parquet(tmp_path / "geometry/train-00000-of-00001.parquet", MATH[3:])
    found = read("math", "test", f"{tmp_path}:*")
    assert [text for text, _ in found] == [row["problem"] for row in MATH[:3]]
    assert len(read("math", "test", f"{tmp_path}:geometry")) == 1
    with one_sentence(["algebra, geometry", "found none chosen", f"write {tmp_path}:algebra"]):
        read("math", "test", tmp_path)
    assert len(read("math", "train", tmp_path)) == 100  # geometry alone has such files


def test_math500_takes_the_answer_column(tmp_path):
    row = {
        "problem": "Convert the point $(0,3)$",
        "solution": "We get $\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.$",
        "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
        "subject": "Precalculus",
        "level": 2,
        "unique_id": "test/precalculus/807.json",
    }
    write_lines(tmp_path / "test.jsonl", [row, {"problem": "p", "answer": "\\boxed{7}"}])
    assert [answer for _, answer in read("math", "test", tmp_path)] == [row["answer"], "7"]


def test_published_solutions_with_odd_boxes(tmp_path):
    solutions = {
        "So $\\boxed 2$.": "2",
        "It is \\fbox{x+1}.": "x+1",
        "$\\boxed{\\{1,2\\}}$": "\\{1,2\\}",
    }
    rows = [{"problem": "p", "solution": text} for text in solutions]
    found = read("math", "test", write_lines(tmp_path / "a.jsonl", rows))
    assert [answer for _, answer in found] == list(solutions.values())


@pytest.mark.parametrize(
    "row",
    [
        {"id": 60, "problem": "Every morning", "solution": "\\boxed{073}", "answer": "073"},
        {"ID": "2024-II-4", "Problem": "Every morning", "Solution": "s", "Answer": 73},
        {"id": 0, "problem": "Every morning", "solution": "Thus $\\boxed{73}$."},
    ],
)
def test_aime24_of_three_publishers_is_a_test_set_whatever_its_file_says(tmp_path, row):
    write_parquet(tmp_path / "data/train-00000-of-00001.parquet", [row])
    assert read("aime24", "test", tmp_path) == [("Every morning", 73)]


@pytest.mark.parametrize("write", [write_lines, write_parquet])
def test_knights_and_knaves_of_the_asked_size(tmp_path, write):
    suffix = "jsonl" if write is write_lines else "parquet"
    write(tmp_path / f"test/people3_num100.{suffix}", KNIGHTS[:1])
    write(tmp_path / f"test/people2_num100.{suffix}", KNIGHTS[1:])
    ((text, answer),) = read("knights_knaves", "test", tmp_path)
    assert text == KNIGHTS[0]["quiz"]
    assert answer == {"people": ["Zoey", "Riley", "Ella"], "knights": ["Zoey", "Ella"]}
    right = f"<think>...</think><answer>{KNIGHTS[0]['solution_text_format']}</answer>"
    assert get_task("knights_knaves").grade(right, answer)
    assert not get_task("knights_knaves").grade(right.replace("knave", "knight"), answer)
    ((_, nobody),) = read("knights_knaves", "test", tmp_path, people=2)
    assert nobody == {"people": ["Al", "Bo"], "knights": []}
    with pytest.raises(ValueError, match="no test problem has 5 people"):
        read("knights_knaves", "test", tmp_path, people=5)


def test_a_training_stream_shuffles_all_problems_again_and_again(tmp_path):
    path = str(write_lines(tmp_path / "m.jsonl", MATH))
    streams = [get_task("math").problems("train", seed, source=path) for seed in (0, 0, 1)]
    first, same, other = ([p.text for p in islice(s, 24)] for s in streams)
    texts = [row["problem"] for row in MATH]
    assert first == same != other
    assert sorted(first[:12]) == sorted(first[12:]) == sorted(texts)
    assert first[:12] != first[12:] and first[:12] != texts


# What is refused


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"question": "q"', ["a.jsonl", "damaged"]),
        ("a.jsonl", '{"a": 1}\n\n{"b"\n', ["a.jsonl: damaged", "line 3: Expecting ':' delimiter"]),
        ("a.jsonl", "[" * 100_000 + "\n", ["a.jsonl: damaged", "maximum recursion depth"]),
        ("a.jsonl", "[1]\n", ["a.jsonl", "expected a row, {column: value}, found 1"]),
        ("a.jsonl", '{"a": 1}\n3\n', ["a.jsonl", "line 2: expected a row", "found 3"]),
        ("a.jsonl", "{}\n{}\n", ["a.jsonl: expected rows with columns, found {} in each"]),
        ("a.jsonl", "", ["hold no rows"]),
        ("a.json", "[", ["a.json", "damaged"]),
        ("a.jsonl", '{"text": "x"}\n', ["expected a column answer, found text"]),
        ("a.jsonl", '{"question": "q", "answer": "#### many"}\n', ["expected a number", "many"]),
        ("a.parquet", "PAR1 no more", ["a.parquet", "damaged"]),
        ("a.arrow", "ARROW", ["a.arrow", "damaged"]),
        ("a.parquet", "", ["a.parquet", "damaged"]),
        ("a.csv", "question,answer", ["hold no rows"]),
        ("a.csv", "question,answer\n1,2\n1,2,3\n", ["a.csv", "line 3: expected 2 cells, found 3"]),
        ("a.csv", "answer,b,answer\n1,2,3\n", ["line 1: expected each column once, found answer"]),
        ("a.csv", 'question,answer\n"1,2\n', ["a.csv", "line 2: unexpected end of data"]),
        ("a.txt", "question,answer", ["a.txt", ".parquet, .arrow, .jsonl, .json, .csv"]),
        ("a.jsonl", b"\xff\xfe", ["a.jsonl", "damaged"]),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with one_sentence(words):
        read("gsm8k", "test", tmp_path / name)


def test_the_row_of_a_bad_answer_is_named(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", [MATH[0], {"problem": "p", "solution": "\\boxed{1"}])
    with pytest.raises(ValueError, match=r"m.jsonl, row 2: expected a boxed answer, found .*boxed"):
        read("math", "test", path)
    with pytest.raises(ValueError, match="expected an integer answer, found 'x"):
        read("aime24", "test", write_lines(path, [{"problem": "p", "answer": "x + 1"}]))


def test_a_missing_split_says_what_there_is(tmp_path):
    write_lines(tmp_path / "train.jsonl", GSM8K)
    with pytest.raises(ValueError, match="no test files; it holds train"):
        rows(tmp_path, "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no test files; none ends in .parquet"):
        rows(tmp_path / "empty", "test")
    with pytest.raises(ValueError, match="aime24 has no train problems: name a file in data.train"):
        get_task("aime24").problems("train", 0)


# Columns


def test_columns_of_mixed_types_are_read_as_they_are(tmp_path):
    answers = [7, "x+1", 2.5, None, [1, "a"], {"b": 1}]
    path = write_lines(tmp_path / "m.jsonl", [{"Problem": "p", "ANSWER": a} for a in answers])
    assert [row["answer"] for row in rows(path, "test")] == answers


def test_a_type_that_changes_far_down_is_read_too(tmp_path):
    """Beyond the first ten megabytes, by which the library would fix the types of the columns."""
    text, found = "x" * 20_000, [*range(600), "x+1"]
    path = write_lines(tmp_path / "m.jsonl", [{"problem": text, "answer": a} for a in found])
    assert path.stat().st_size > 12e6
    assert [row["answer"] for row in rows(path, "test")] == found


def test_words_of_a_table_that_stand_for_nothing_elsewhere_are_answers(tmp_path):
    (tmp_path / "m.csv").write_text('problem,answer\nWhich?,None\n"Two, or one?",NA\n')
    assert read("math", "test", tmp_path) == [("Which?", "None"), ("Two, or one?", "NA")]


def test_many_small_files_are_read_in_order_and_named(tmp_path):
    count = 70
    for i in range(count):
        row = {"problem": f"p{i}", "solution": f"\\boxed{{{i}}}"}
        (tmp_path / f"{i}.json").write_text(json.dumps(row))
    expected = [(f"p{i}", str(i)) for i in range(count)]
    assert read("math", "test", tmp_path) == expected
    (tmp_path / "3.json").write_text('{"problem": "p3", "answer": 3, "more": {}}')  # more columns
    assert read("math", "test", tmp_path) == expected
    (tmp_path / "20.json").write_text('{"problem": "p20", "solution": "no box"}')
    with pytest.raises(ValueError, match=r"/20.json: expected a boxed answer"):
        read("math", "test", tmp_path)
    (tmp_path / "40.json").write_text("{")
    with pytest.raises(ValueError, match=r"/40.json: damaged"):
        read("math", "test", tmp_path)


def test_paths_with_signs_of_patterns_are_plain_names(tmp_path):
    for name in ("a*[b]?", "ab"):
        write_lines(tmp_path / name / "test.jsonl", GSM8K[: len(name) - 1])
    assert len(rows(tmp_path / "a*[b]?", "test")) == 3 and len(rows(tmp_path / "ab", "test")) == 1


# What reading leaves alone


def test_local_files_ask_no_server_and_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, lambda *_: pytest.fail("it asked a server"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    gsm8k_parquet(tmp_path / "data")
    assert len(rows(tmp_path / "data", "test")) == 3
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_home_that_cannot_be_written_does_not_matter(tmp_path):
    """A file stands where the home should be, so that not even root can write there."""
    path = write_lines(tmp_path / "g.jsonl", GSM8K)
    (tmp_path / "home").write_text("")
    script = (
        "from spo.tasks import get_task\n"
        f"print(sum(1 for _ in get_task('gsm8k').problems('test', 0, {str(path)!r})))"
    )
    env = {"HOME": str(tmp_path / "home"), "PYTHONPATH": ":".join(p or "." for p in sys.path)}
    ran = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert (ran.stdout, ran.stderr) == ("3\n", "")


def test_without_the_library_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    words = r"^task gsm8k reads data sets: pip install 'spo-kernels\[train\]'$"
    with pytest.raises(ValueError, match=words):
        read("gsm8k", "test", write_lines(tmp_path / "g.jsonl", GSM8K))
