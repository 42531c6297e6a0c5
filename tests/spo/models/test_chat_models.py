"""Prompts, ends and texts of chat models, in the layout of each family's folder."""

import json
import re
import shutil
import warnings
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_folders import FAMILIES, chat_folder, write

from spo import train
from spo.config.recipe import load_recipe
from spo.grow.sampler import Sampler
from spo.models.chat import warn_about_turn_end
from spo.models.tokenizer import (
    exact_text,
    load_tokenizer,
    response_text,
    sampling_of,
    stop_token_ids,
    vocab_size,
)
from spo.records import Forest
from spo.tasks import prompts_of

TASK = """
from dataclasses import dataclass

from spo.tasks import Problem


@dataclass(frozen=True)
class One:
    def problems(self, split, seed):
        while True:
            yield Problem("1 + 1?", 2)

    def grade(self, text, answer):
        return "2" in text
"""
OWN_CHAT = TASK.replace('"1 + 1?", 2', '"1 + 1?", 2, ({"role": "user", "content": "1 + 1?"},)')
CHATS = {
    "qwen2.5": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday: 01 Jan 2025"
    "\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n1 + 1?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma3": "<bos><start_of_turn>user\nBe brief.\n\n1 + 1?<end_of_turn>\n<start_of_turn>model\n",
    "deepseek": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>1 + 1?<｜Assistant｜><think>\n",
    "gpt-oss": "<|start|>system<|message|>Current date: 2025-01-01\n\nReasoning: medium<|end|>"
    "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>"
    "<|start|>user<|message|>1 + 1?<|end|><|start|>assistant",
}
CHATS["qwen3"] = CHATS["qwen2.5"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Family -> its folder."""
    root = tmp_path_factory.mktemp("chat")
    (root / "one.py").write_text(TASK)
    return {name: chat_folder(root, name) for name in FAMILIES}


def recipe(folder, *settings):
    return load_recipe(
        None, [f"policy.path={folder}", f"task={folder.parent}/one.py:One", *settings]
    )


def prompt(folder, *settings):
    """The first prompt, and its text."""
    config = recipe(folder, *settings)
    tokenizer = load_tokenizer(config.policy)
    (found,) = islice(prompts_of(config, "train", tokenizer), 1)
    return found, exact_text(tokenizer, found.prompt_ids)


def ids_of(folder, *texts):
    tokenizer = load_tokenizer(recipe(folder).policy)
    return [tokenizer.convert_tokens_to_ids(text) for text in texts]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_chat_is_written_as_the_family_writes_it(folders, name):
    family = FAMILIES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, text = prompt(folders[name], "data.system=Be brief.")
    assert text == CHATS[name]
    if family.start:
        (start,) = ids_of(folders[name], family.start)
        assert found.prompt_ids[0] == start and found.prompt_ids.count(start) == 1
    specials = [t for t in (*family.specials, *family.plain) if t in text]
    counts = [found.prompt_ids.count(i) for i in ids_of(folders[name], *specials)]
    assert counts == [text.count(t) for t in specials]  # each is one token
    assert found.opening == ("<think>" if name == "deepseek" else "")
    own = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "{problem}"}]
    assert prompt(folders[name], f"data.messages={json.dumps(own)}")[0] == found


def test_the_template_s_own_switches(folders):
    say = "data.system=Be brief."
    thoughtless = prompt(folders["qwen3"], say, "data.thinking=false")[1]
    assert thoughtless == CHATS["qwen3"] + "<think>\n\n</think>\n\n"
    assert prompt(folders["qwen3"], say, "data.thinking=true")[1] == CHATS["qwen3"]
    low = prompt(folders["gpt-oss"], say, "data.chat_options={reasoning_effort: low}")[1]
    assert low == CHATS["gpt-oss"].replace("medium", "low")
    for name, then in (("gpt-oss", "2026-02-03"), ("llama3", "03 Feb 2026")):
        assert f": {then}\n" in prompt(folders[name], say, "data.date=2026-02-03")[1]
    shown = prompt(folders["llama3"], say, "data.chat_options={date_string: 1 May 1990}")[1]
    assert "Today: 1 May 1990\n" in shown


def test_settings_that_the_tokenizer_cannot_follow(folders):
    say = "data.system=Be brief."
    with pytest.raises(ValueError, match="data.thinking: the chat template has no variable enable"):
        prompt(folders["qwen2.5"], say, "data.thinking=false")
    with pytest.raises(ValueError, match="data.chat_options: .* no variable reasoning_efort"):
        prompt(folders["gpt-oss"], say, "data.chat_options={reasoning_efort: low}")
    odd = "data.messages=[{role: user, content: '{problem}'}, {role: user, content: b}]"
    with pytest.raises(ValueError, match="refuses the roles user, user .roles must alternate"):
        prompt(folders["gemma3"], odd)
    bare = shutil.copytree(folders["gpt-oss"], folders["gpt-oss"].parent / "bare")
    (bare / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="a tokenizer with a chat template, found none"):
        next(prompts_of(recipe(bare, say), "train", load_tokenizer(policy(bare))))


def policy(folder):
    return load_recipe(None, [f"policy.path={folder}"]).policy


def test_a_plain_template_that_lacks_chat_or_start_is_named(folders):
    with pytest.warns(UserWarning) as said:
        assert prompt(folders["gemma3"])[1] == "1 + 1?"
    chat, start = (str(warning.message) for warning in said)
    assert "data.system or data.messages" in chat and "do not begin with '<bos>'" in start
    with pytest.warns(UserWarning, match="the model has a chat template"):
        prompt(folders["qwen3"])  # it has no start token
    with pytest.warns(UserWarning, match="do not begin with '<.begin_of_text.>'.*template can"):
        prompt(folders["llama3"], "data.template='<|start_header_id|>user {problem}'")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, start in (("gemma3", "<bos>"), ("llama3", "<|begin_of_text|>")):
            found, text = prompt(folders[name], f"data.template='{start}Q: {{problem}}'")
            assert text == f"{start}Q: 1 + 1?"
            assert found.prompt_ids[0] == ids_of(folders[name], start)[0]
        config = load_recipe()  # the embedded policy has neither
        next(prompts_of(config, "train", load_tokenizer(config.policy)))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_end_of_the_folder_stops_a_response(folders, name):
    family, config = FAMILIES[name], recipe(folders[name], "data.system=Be brief.")
    tokenizer = load_tokenizer(config.policy)
    sampling = sampling_of(config, tokenizer)
    assert set(sampling.stop_token_ids) == set(ids_of(folders[name], *family.ends))
    assert sampling.stop_token_ids[0] == tokenizer.eos_token_id
    known = tokenizer.backend_tokenizer.get_vocab_size()
    assert sampling.vocab_size == (known if family.padding > 0 else None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_about_turn_end(config.data, tokenizer, sampling.stop_token_ids)


def test_ends_that_a_folder_or_a_recipe_names_otherwise(folders):
    folder = shutil.copytree(folders["llama3"], folders["llama3"].parent / "other-ends")
    (folder / "generation_config.json").unlink()
    text_end, message_end, turn_end = ids_of(folder, *FAMILIES["llama3"].ends)
    tokenizer = load_tokenizer(policy(folder))
    assert stop_token_ids(policy(folder), tokenizer) == (text_end,)
    config = json.loads((folder / "config.json").read_text())
    bare = {key: value for key, value in config.items() if "eos" not in key}
    inner = bare | {"model_type": "gemma3_text", "eos_token_id": turn_end}
    for named in (
        bare | {"eos_token_id": [1000, turn_end]},  # of which one has no logit
        {"model_type": "gemma3", "text_config": inner},  # a text model inside another
    ):
        write(folder / "config.json", named)
        assert stop_token_ids(policy(folder), tokenizer) == (text_end, turn_end)
    write(folder / "config.json", config)

    def sampler(*settings):
        idle: Any = SimpleNamespace(abort=list)  # nothing is sampled
        return Sampler(recipe(folder, *settings), engine=idle)

    more = [f"sampling.stop_token_ids=[{turn_end}, {message_end}]", 'sampling.stop=["2", " x"]']
    (folder.parent / "own.py").write_text(OWN_CHAT)
    own = f"task={folder.parent}/own.py:One"
    for settings in (["data.system=Be brief."], [own], [own, "data.system=Be brief."]):
        said = rf"response with '<.eot_id.>' \({turn_end}\), which is none"
        with pytest.warns(UserWarning, match=said):
            prompt(folder, *settings)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            prompt(folder, *settings, *more)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with sampler("data.system=Be brief.", *more) as made:
            assert made.sampling.stop_token_ids == (text_end, turn_end, message_end)
            assert made.sampling.stop == ("2", " x") and made.options(0).sampling.stop
    with pytest.raises(ValueError, match="sampling.stop_token_ids: expected ids below 262"):
        sampler("sampling.stop_token_ids=[262]")
    with pytest.raises(ValueError, match="sampling.stop: expected texts, found an empty one"):
        recipe(folders["llama3"], "sampling.stop=['']")
    (folder / "generation_config.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="policy.path: .*generation_config.json is no JSON object"):
        stop_token_ids(policy(folder), tokenizer)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_response_reads_as_its_tokens_spell_it(folders, name):
    """Special tokens inside it, and spaces that a clean-up of English would remove."""
    family, folder = FAMILIES[name], folders[name]
    tokenizer = load_tokenizer(policy(folder))
    stops = stop_token_ids(policy(folder), tokenizer)
    inside = [t for t in (*family.plain, *family.specials) if t not in family.ends][-1]
    text = f" I do n't . <answer> 4 </answer>{inside} ' s\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert response_text(tokenizer, ids, stops) == text
    for stop in stops:
        assert response_text(tokenizer, [*ids, stop], stops) == text
    if family.pad and family.pad not in family.ends:
        assert response_text(tokenizer, [*ids, tokenizer.pad_token_id, stops[0]], stops) == text
    assert response_text(tokenizer, [], stops) == ""


PAGE = Path(__file__).parents[3] / "docs" / "prompts.md"
SMALL = [
    "engine={name: hf, max_num_seqs: 32, max_model_len: 256}",
    "sampling.max_new_tokens=40",
    "shape={widths: [2, 2], segment_tokens: [8]}",
    "train={iterations: 1, prompts: 8, minibatches: 1}",
    "eval={every: 0, problems: 4}",
]


def test_the_recipes_of_the_page_train_and_write_their_prompts(folders, tmp_path):
    chat, plain = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    (tmp_path / "chat.yaml").write_text(chat)
    (tmp_path / "plain.yaml").write_text(plain)
    settings = [*SMALL, f"policy.path={folders['qwen3']}", f"out={tmp_path / 'run'}"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", ".* trains nothing: all .* have the reward 0")  # random
        lines = train(tmp_path / "chat.yaml", settings).metrics
    (trained,) = (line for line in lines if line["stage"] == "train")
    assert trained["too_long"] == 0 and trained["probe_difference"] < 1e-3
    known = vocab_size(load_tokenizer(policy(folders["qwen3"])))
    forest = Forest.load(tmp_path / "run" / "forest-last.safetensors")
    assert int(forest.token_ids.max()) < known and forest.num_generated > 500
    starts = {"chat": "<|im_start|>system\nReason", "plain": "<bos>Problem: arithmetic"}
    for name, family in (("chat", "qwen3"), ("plain", "gemma3")):
        config = load_recipe(tmp_path / f"{name}.yaml", [f"policy.path={folders[family]}"])
        tokenizer = load_tokenizer(config.policy)
        first = next(prompts_of(config, "train", tokenizer))
        assert exact_text(tokenizer, first.prompt_ids).startswith(starts[name])
