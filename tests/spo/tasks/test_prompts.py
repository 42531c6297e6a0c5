"""Prompts: problems in their template, tokenised, those that are too long left out."""

from itertools import islice
from pathlib import Path

import pytest
from sentences import one_sentence
from test_datasets import GSM8K, QUESTION, write_lines
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spo.config.data import DataConfig
from spo.config.recipe import Recipe
from spo.models.tokenizer import model_vocab_size
from spo.tasks import prompts_of


@pytest.fixture
def tokenizer():
    words = ["<unk>", "<s>", "[ASK]", "[END]", "<think>", *sorted(set(QUESTION.split()))]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>")


def recipe(path: Path, **data) -> Recipe:
    return Recipe(task="gsm8k", data=DataConfig(**{"train": str(path), "test": str(path)} | data))


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
    config = recipe(path, test="same", max_prompt_tokens=5)
    answers = {p.answer for p in islice(prompts_of(config, "train", tokenizer), 20)}
    assert answers == {"1"} and len(list(prompts_of(config, "test", tokenizer))) == 2
    monkeypatch.setattr("spo.tasks.ALL_TOO_LONG", 50)
    with pytest.raises(ValueError, match="data.max_prompt_tokens: 50 gsm8k problems in a row"):
        next(prompts_of(recipe(path, test="same", max_prompt_tokens=2), "train", tokenizer))


def test_options_that_a_task_lacks_are_refused(tokenizer):
    config = Recipe(task="countdown", data=DataConfig(options={"people": 3}))
    with pytest.raises(ValueError, match="data.options.people; known here: numbers"):
        prompts_of(config, "train", tokenizer)
    config = Recipe(task="arithmetic", data=DataConfig(train="here"))
    with pytest.raises(ValueError, match="data.train: task arithmetic reads no data set"):
        prompts_of(config, "train", tokenizer)


def test_a_task_from_outside_must_yield_problems(tmp_path, tokenizer):
    (tmp_path / "odd.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\n"
        "class Odd:\n"
        "    def problems(self, split, seed):\n"
        "        yield 'What is 1 + 1?', 2\n"
        "    def grade(self, text, answer):\n"
        "        return False\n"
    )
    config = Recipe(task=f"{tmp_path}/odd.py:Odd")
    with pytest.raises(ValueError, match=r"odd.py:Odd: expected problems .*, found \('What is"):
        next(prompts_of(config, "train", tokenizer))


def test_tokens_that_the_model_lacks_are_named(tmp_path, tokenizer):
    path = write_lines(tmp_path / "g.jsonl", GSM8K[:1])
    tokenizer.add_tokens([f"<more{i}>" for i in range(200)])  # of which the model was never told
    size = model_vocab_size(recipe(path).policy)
    last, first = f"<more{size - 1 - len(tokenizer) + 200}>", f"<more{size - len(tokenizer) + 200}>"
    next(prompts_of(recipe(path, template=f"{{problem}} {last}"), "test", tokenizer))
    unknown = recipe(path, template=f"{{problem}} {first}")
    with one_sentence([f"the tokenizer writes '{first}' as {size}", f"tokens below {size} only"]):
        next(prompts_of(unknown, "test", tokenizer))


def test_a_prompt_without_a_token_is_named(tmp_path, tokenizer):
    path = write_lines(tmp_path / "g.jsonl", GSM8K[:1])
    tokenizer.chat_template = "{% if false %}{{ messages }}{% endif %}"
    with one_sentence(["expected prompts of at least one token", "gives none"]):
        next(prompts_of(recipe(path, system="Think."), "test", tokenizer))
