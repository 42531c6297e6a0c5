"""Any table as a task: its columns, TRL's and verl's layouts, and chats that the data brings."""

import json
from dataclasses import replace

import datasets
import pytest
import test_datasets
from forests import random_forest
from sentences import one_sentence
from test_datasets import GSM8K, write_lines, write_parquet

from spo.config.data import DataConfig
from spo.config.recipe import Recipe, load_recipe
from spo.models.tokenizer import load_tokenizer
from spo.records import Forest, Prompt
from spo.tasks import Problem, get_task, prompts_of
from spo.tasks.sources import Source

USER = {"role": "user", "content": "What is 1 + 1?"}
SYSTEM = {"role": "system", "content": "Be brief."}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [USER],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"split": "train", "index": 0, "answer": "It is 2"},
}
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def read(path, columns=(), split="test") -> list[Problem]:
    return list(get_task("rows").problems(split, 0, source=Source(str(path), dict(columns))))


def one(tmp_path, row, columns=()) -> Problem:
    (problem,) = read(write_lines(tmp_path / "rows.jsonl", [row]), columns)
    return problem


@pytest.mark.parametrize(
    "write", ["jsonl", "parquet", "saved_to_disk", "arrow_file", "csv", "json_list"]
)
def test_every_kind_of_file(tmp_path, write):
    getattr(test_datasets, f"gsm8k_{write}")(tmp_path)
    found = read(tmp_path)
    assert [p.text for p in found] == [row["question"] for row in GSM8K]
    assert [p.columns for p in found] == [{"answer": row["answer"]} for row in GSM8K]


def test_a_data_set_that_was_saved_alone(tmp_path):
    datasets.Dataset.from_list(GSM8K).save_to_disk(tmp_path / "saved")
    assert [p.answer for p in read(tmp_path / "saved")] == [row["answer"] for row in GSM8K]


@pytest.mark.parametrize("problem", ["Problem", "question", "PROMPT", "instruction"])
@pytest.mark.parametrize("answer", ["answer", "Solution", "final_answer", "ground_truth", "target"])
def test_usual_names_in_any_case(tmp_path, problem, answer):
    found = one(tmp_path, {"id": 3, answer: [1, "x"], problem: "Why?"})
    assert found == Problem("Why?", [1, "x"], columns={"id": 3, answer: [1, "x"]})


def test_columns_that_the_recipe_names(tmp_path):
    row = {"Question": "no", "Text": "Why?", "answer": "no", "Final": {"Value": 7}}
    found = one(tmp_path, row, {"problem": "TEXT", "answer": "final.value"})
    assert (found.text, found.answer) == ("Why?", 7)
    assert found.columns == {"Question": "no", "answer": "no", "Final": {"Value": 7}}
    assert one(tmp_path, row, {"answer": "final"}).answer == {"Value": 7}


@pytest.mark.parametrize("task", ["gsm8k", "math", "aime24"])
def test_tasks_that_ship_take_columns_too(tmp_path, task):
    path = write_lines(tmp_path / "a.jsonl", [{"problem": "no", "q": "Why?", "a": "#### 7"[-1]}])
    source = Source(str(path), {"problem": "q", "answer": "a"})
    (found,) = get_task(task).problems("test", 0, source=source)
    assert (found.text, str(found.answer)) == ("Why?", "7")
    assert found.columns == {"problem": "no", "a": "7"}  # for rewards


def test_columns_that_are_not_there(tmp_path):
    row = {"a": 1, "B": "x"}
    with one_sentence(["problem or question or prompt", "found a, b", "data.columns.problem"]):
        one(tmp_path, row)
    with one_sentence(["data.columns.answer", "a, B", "found 'final.x'"]):
        one(tmp_path, row, {"problem": "B", "answer": "final.x"})
    assert one(tmp_path, row, {"problem": "b"}).answer is None  # a reward may need none


def test_trl_s_layouts(tmp_path):
    text = {"prompt": "Say it.", "solution": "x", "length": 20}
    assert one(tmp_path, text) == Problem("Say it.", "x", columns={"solution": "x", "length": 20})
    found = one(tmp_path, {"prompt": [SYSTEM, USER], "length": 20, "problem": "raw"})
    assert (found.text, found.messages) == (USER["content"], (SYSTEM, USER))
    assert found.columns == {"length": 20, "problem": "raw"} and found.answer is None
    named = one(tmp_path, {"prompt": [USER], "q": "Why?"}, {"problem": "q"})
    assert (named.text, named.messages, named.columns) == ("Why?", None, {"prompt": [USER]})
    same = one(tmp_path, {"prompt": [USER], "said": USER["content"], "question": ""})
    assert same.columns == {"said": USER["content"], "question": ""}


def test_verl_s_layout(tmp_path):
    (found,) = read(write_parquet(tmp_path / "train.parquet", [VERL]))
    rest = {name: value for name, value in VERL.items() if name != "prompt"}
    assert found == Problem(USER["content"], "2", (USER,), rest)
    named = one(tmp_path, VERL, {"answer": "extra_info.index"})
    assert named.answer == 0 and named.columns == rest
    assert one(tmp_path, VERL | {"answer": "It is 2"}).answer == "2"  # as verl reads it
    empty = [VERL, VERL | {"reward_model": {"style": "rule", "ground_truth": ""}}]
    with pytest.warns(
        UserWarning, match="of 2 test rows, .*: 1 without a value in reward_model.ground_truth"
    ):
        assert read(write_parquet(tmp_path / "train.parquet", empty)) == [found]


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([USER, {"role": "assistant", "content": "2"}], ["the last message to be the user's"]),
        ([1, 2], ["expected a text or messages, found [1, 2]"]),
        ([{"role": "user"}], ["expected messages with role and content", "{'role': 'user'}"]),
    ],
)
def test_messages_that_no_chat_has(tmp_path, messages, words):
    with one_sentence(["rows.jsonl", *words]):
        one(tmp_path, {"prompt": messages})


def test_the_rows_alone_grade_nothing():
    with pytest.raises(ValueError, match="task rows compares nothing: expected reward"):
        get_task("rows").grade("2", "2")


def test_reading_leaves_the_library_as_the_caller_had_it(tmp_path):
    datasets.enable_progress_bars()
    datasets.logging.set_verbosity_warning()
    assert one(tmp_path, {"question": "1 + 1", "answer": "2"}).answer == "2"
    assert not datasets.are_progress_bars_disabled()
    assert datasets.logging.get_verbosity() == datasets.logging.WARNING


# Prompts


@pytest.fixture
def tokenizer():
    tokenizer = load_tokenizer(Recipe().policy)
    tokenizer.add_tokens(["[user]", "[system]", "[assistant]"])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def written(tmp_path, tokenizer, row, **data) -> str:
    path = write_lines(tmp_path / "rows.jsonl", [row])
    config = Recipe(task="rows", data=DataConfig(test=str(path), **data))
    # The small policy's words: a number is a token.
    (prompt,) = prompts_of(config, "test", tokenizer)
    return tokenizer.decode(prompt.prompt_ids)


def test_a_chat_of_the_data_is_written_in_the_tokenizer_s_template(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr("spo.models.tokenizer.model_vocab_size", lambda _: len(tokenizer))
    asked = {"prompt": [{"role": "user", "content": "1 + 1"}]}
    assert written(tmp_path, tokenizer, asked) == "[user] 1 + 1 [assistant]"
    with_system = written(tmp_path, tokenizer, asked, system="2")
    assert with_system == "[system] 2 [user] 1 + 1 [assistant]"
    own = {"prompt": [{"role": "system", "content": "3"}, *asked["prompt"]]}
    assert written(tmp_path, tokenizer, own) == "[system] 3 [user] 1 + 1 [assistant]"
    with one_sentence(["data.system: expected none", "have a system text"]):
        written(tmp_path, tokenizer, own, system="2")
    with one_sentence(["data.template: expected none", "chat messages"]):
        written(tmp_path, tokenizer, asked, template="{problem} .")
    with one_sentence(["data.messages: expected none", "chat messages"]):
        turn = {"role": "user", "content": "{problem}"}
        written(tmp_path, tokenizer, asked, messages=(turn,))
    with one_sentence(["data.thinking: the chat template has no variable enable_thinking"]):
        written(tmp_path, tokenizer, asked, thinking=False)
    with one_sentence(["data.thinking: expected data.system or data.messages beside it"]):
        written(tmp_path, tokenizer, {"prompt": "1 + 1"}, thinking=False)
    tokenizer.chat_template = None
    with one_sentence(["the problems' messages: expected a tokenizer with a chat template"]):
        written(tmp_path, tokenizer, asked)


def test_columns_go_with_the_prompt_into_the_forest_s_file(tmp_path, tokenizer):
    path = write_lines(tmp_path / "rows.jsonl", [{"prompt": "1 + 1", "level": 3, "by": {"a": []}}])
    config = load_recipe(
        None, ["task=rows", "reward={rule: exact}", f"data.train={path}", "data.test=same"]
    )
    with pytest.warns(UserWarning, match="the model has a chat template"):
        prompt = next(prompts_of(config, "train", tokenizer))
    assert prompt.columns == {"level": 3, "by": {"a": []}} and prompt.task == "rows"
    assert hash(prompt) == hash(Prompt(prompt.prompt_ids, None, "rows"))
    forest = replace(random_forest(0, trees=1)[0], prompts=(prompt,))
    forest.save(tmp_path / "new.safetensors")
    assert Forest.load(tmp_path / "new.safetensors").prompts == (prompt,)


def test_files_from_before_the_columns_load(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    random_forest(0)[0].save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["spo"])
    for prompt in header["prompts"]:
        assert prompt.pop("columns") == {}
    tensors = load_file(tmp_path / "new.safetensors")
    save_file(tensors, tmp_path / "old.safetensors", metadata={"spo": json.dumps(header)})
    old = Forest.load(tmp_path / "old.safetensors")
    assert old.prompts and all(prompt.columns == {} for prompt in old.prompts)
