"""Data sets in the formats of their publishers, the hub offline, templates and prompts."""

import json
import time
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spo.config.data import DataConfig
from spo.config.recipe import Recipe
from spo.tasks import TASKS, datafiles, prompts_of
from spo.tasks.datafiles import read_rows, state

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
    stream = TASKS[task].problems(split, 0, source=str(source), **options)
    return [(p.text, p.answer) for p in islice(stream, 100)]


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
    for split, rows in (("train", GSM8K[:1]), ("test", GSM8K)):
        (root / split).mkdir()
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(root / split / "data-00000-of-00001.arrow", table.schema) as writer:
            writer.write_table(table)
        (root / split / "state.json").write_text('{"_split": "test"}')
        (root / split / "cache-1f.arrow").write_bytes(b"not for us")
    (root / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')


@pytest.mark.parametrize("write", [gsm8k_jsonl, gsm8k_parquet, gsm8k_saved_to_disk])
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


def test_math_parquet_of_several_subjects(tmp_path):
    write_parquet(tmp_path / "algebra/test-00000-of-00001.parquet", MATH[:2])
    write_parquet(tmp_path / "geometry/test-00000-of-00001.parquet", MATH[2:3])
    write_parquet(tmp_path / "geometry/train-00000-of-00001.parquet", MATH[3:])
    found = read("math", "test", tmp_path)
    assert [text for text, _ in found] == [row["problem"] for row in MATH[:3]]


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
    assert TASKS["knights_knaves"].grade(right, answer)
    assert not TASKS["knights_knaves"].grade(right.replace("knave", "knight"), answer)
    ((_, nobody),) = read("knights_knaves", "test", tmp_path, people=2)
    assert nobody == {"people": ["Al", "Bo"], "knights": []}
    with pytest.raises(ValueError, match="no test problem has 5 people"):
        read("knights_knaves", "test", tmp_path, people=5)


def test_a_training_stream_shuffles_all_problems_again_and_again(tmp_path):
    path = str(write_lines(tmp_path / "m.jsonl", MATH))
    streams = [TASKS["math"].problems("train", seed, source=path) for seed in (0, 0, 1)]
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
        ("a.jsonl", '{"a": 1}\n\n{"b"\n', ["a.jsonl, line 3", "damaged"]),
        ("a.jsonl", "[" * 100_000 + "\n", ["a.jsonl, line 1", "damaged"]),
        ("a.jsonl", "[1]\n", ["a.jsonl", "expected an object with named columns, found [1]"]),
        ("a.jsonl", "", ["hold no rows"]),
        ("a.json", "[", ["a.json", "damaged"]),
        ("a.jsonl", '{"text": "x"}\n', ["expected a column answer, found text"]),
        ("a.jsonl", '{"question": "q", "answer": "#### many"}\n', ["expected a number", "many"]),
        ("a.parquet", "PAR1 no more", ["a.parquet", "damaged"]),
        ("a.arrow", "ARROW", ["a.arrow", "damaged"]),
        ("a.csv", "question,answer", ["a.csv", ".parquet, .arrow, .jsonl, .json"]),
        ("a.jsonl", b"\xff\xfe", ["a.jsonl", "damaged"]),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as error:
        read("gsm8k", "test", tmp_path / name)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_the_row_of_a_bad_answer_is_named(tmp_path):
    path = write_lines(tmp_path / "m.jsonl", [MATH[0], {"problem": "p", "solution": "\\boxed{1"}])
    with pytest.raises(ValueError, match=r"m.jsonl, row 2: expected a boxed answer, found .*boxed"):
        read("math", "test", path)
    with pytest.raises(ValueError, match="expected an integer answer, found 'x"):
        read("aime24", "test", write_lines(path, [{"problem": "p", "answer": "x + 1"}]))


def test_a_missing_split_says_what_there_is(tmp_path):
    write_lines(tmp_path / "train.jsonl", GSM8K)
    with pytest.raises(ValueError, match="no test files; it holds train"):
        read_rows(str(tmp_path), "test")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no test files; none ends in .parquet"):
        read_rows(str(tmp_path / "empty"), "test")
    with pytest.raises(ValueError, match="no training problems"):
        TASKS["aime24"].problems("train", 0)


# The hub


@pytest.mark.parametrize("source", ["none.jsonl", "data/none.parquet", "./none", "/none/x", "none"])
def test_a_missing_file_is_no_hub_name(source):
    with pytest.raises(ValueError, match="there is no such file or folder"):
        read_rows(source, "train")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache and an address where nobody listens."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return constants


def test_an_unreachable_hub_is_one_sentence_at_once(hub):
    start = time.monotonic()
    with pytest.raises(ValueError, match="openai/gsm8k/main: no such file.*does not give it") as e:
        TASKS["gsm8k"].problems("train", 0)
    assert time.monotonic() - start < 5 and "\n" not in str(e.value)


def test_offline_mode_asks_no_one(hub, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datafiles.urllib.request, "urlopen", lambda *_, **__: 1 / 0)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set"):
        read_rows("a/b", "train")


def test_what_the_hub_lists_is_chosen_as_in_a_folder(hub, monkeypatch, tmp_path):
    import huggingface_hub

    gsm8k_parquet(tmp_path)
    write_parquet(tmp_path / "socratic/test-00000-of-00001.parquet", GSM8K * 2)
    names = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.*")]
    asked = []

    def download(repo, name, *, repo_type, revision):
        asked.append((repo, name, repo_type, revision))
        return str(tmp_path / name)

    monkeypatch.setattr(datafiles, "_ask_hub", lambda repo, revision: (names, f"sha of {revision}"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert len(read_rows("openai/gsm8k@v1/main", "test")) == 3
    files = [f"main/test-0000{i}-of-00002.parquet" for i in range(2)]
    assert asked == [("openai/gsm8k", name, "dataset", "sha of v1") for name in files]
    one = "openai/gsm8k/main/train-00000-of-00001.parquet"
    assert len(read_rows(one, "test")) == 1
    with pytest.raises(ValueError, match="openai/gsm8k/none: no test files"):
        read_rows("openai/gsm8k/none", "test")


def test_the_cache_serves_without_a_network(hub, tmp_path):
    repo = tmp_path / "cache/datasets--openai--gsm8k"
    write_parquet(repo / "snapshots/abc/main/test-00000-of-00001.parquet", GSM8K)
    assert state("openai/gsm8k/main") == "download"
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("abc")
    assert state("openai/gsm8k/main") == "cached" and state(str(tmp_path)) == "local"
    assert len(read_rows("openai/gsm8k/main", "test")) == 3


# Prompts


@pytest.fixture
def tokenizer():
    words = ["<unk>", "<s>", "[ASK]", "[END]", "<think>", *sorted(set(QUESTION.split()))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


def recipe(path: Path, **data) -> Recipe:
    return Recipe(task="gsm8k", data=DataConfig(train=str(path), test=str(path), **data))


def test_a_template_holds_the_problem_and_spells_out_special_tokens(tmp_path, tokenizer):
    path = write_lines(tmp_path / "g.jsonl", GSM8K[:1])
    config = recipe(path, template="<s> [ASK] {problem} [END]")
    (prompt,) = prompts_of(config, "test", tokenizer)
    inner = tokenizer(QUESTION, add_special_tokens=False)["input_ids"]
    assert list(prompt.prompt_ids) == [1, 2, *inner, 3]
    assert (prompt.answer, prompt.task, prompt.opening) == ("72", "gsm8k", "")
    (prompt,) = prompts_of(recipe(path, template="{problem} <think>\n"), "test", tokenizer)
    assert prompt.opening == "<think>"
    for template in ("[ASK]", "{problem} {problem}"):
        with pytest.raises(ValueError, match="data.template: expected {problem} once"):
            prompts_of(recipe(path, template=template), "test", tokenizer)


def test_long_problems_are_left_out_of_training_only(tmp_path, tokenizer, monkeypatch):
    short = {"question": "clips in May", "answer": "#### 1"}
    path = write_lines(tmp_path / "g.jsonl", [GSM8K[0], short])
    config = recipe(path, max_prompt_tokens=5)
    answers = {p.answer for p in islice(prompts_of(config, "train", tokenizer), 20)}
    assert answers == {"1"} and len(list(prompts_of(config, "test", tokenizer))) == 2
    monkeypatch.setattr("spo.tasks.ALL_TOO_LONG", 50)
    with pytest.raises(ValueError, match="data.max_prompt_tokens: 50 gsm8k problems in a row"):
        next(prompts_of(recipe(path, max_prompt_tokens=2), "train", tokenizer))


def test_options_that_a_task_lacks_are_refused(tokenizer):
    config = Recipe(task="countdown", data=DataConfig(options={"people": 3}))
    with pytest.raises(ValueError, match="data.options.people: task countdown .* it takes numbers"):
        prompts_of(config, "train", tokenizer)
    config = Recipe(task="arithmetic", data=DataConfig(train="here"))
    with pytest.raises(ValueError, match="data.train: task arithmetic .* it takes operations"):
        prompts_of(config, "train", tokenizer)
