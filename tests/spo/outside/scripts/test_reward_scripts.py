"""Reward scripts written for TRL and for verl train unchanged, on data in the layout of each.

Every run starts in a folder outside of the package, from YAML and from Python, and its rewards are
those that the script's functions give when they are called as the other library calls them.
"""

import asyncio
import importlib
import inspect
import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset

import spo
from spo.cli import main
from spo.config.policy import EMBEDDED

SCRIPTS = Path(__file__).parent
SMALL = {
    "engine": {"name": "hf", "max_num_seqs": 32, "max_model_len": 96},
    "sampling": {"max_new_tokens": 40, "truncated": "reward"},
    "shape": {"kind": "star", "group_size": 2},
    "train": {"iterations": 1, "prompts": 8, "minibatches": 1},
    "eval": {"every": 0, "problems": 1},
}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def row_of(layout, index):
    """A sum, as each library's data sets have one."""
    a, b = index % 9 + 1, 5 * index % 7 + 2
    asked, level = f"arithmetic {a} + {b}\n", ("easy", "hard")[index % 2]
    chat = [{"role": "user", "content": asked}]
    if layout == "trl text":
        return {"prompt": asked, "ground_truth": str(a + b), "level": level, "index": index}
    if layout == "trl chat":
        return {"prompt": chat, "answer": a + b, "level": level, "index": index}
    return {
        "data_source": ("sums/strict", "sums/shaped", "sums/long")[index % 3],
        "prompt": chat,
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(a + b)},
        "extra_info": {"split": "train", "index": index, "bonus": index / 10},
    }


@pytest.fixture(scope="module")
def chat_policy(tmp_path_factory):
    """The embedded policy with a chat template that writes what is asked."""
    folder = tmp_path_factory.mktemp("policy") / "chat"
    shutil.copytree(EMBEDDED, folder)
    settings = folder / "tokenizer_config.json"
    given = json.loads(settings.read_text()) | {"chat_template": TEMPLATE}
    settings.write_text(json.dumps(given))
    return folder


@pytest.fixture
def script(tmp_path, monkeypatch, layout):
    """The module of a script in the current folder, which is none of the package's."""
    name = f"{layout.split()[0]}_script"
    shutil.copy(SCRIPTS / f"{name}.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def reward_of(script, layout, door):
    """The script's functions, by their names in a recipe or themselves."""

    def given(function):
        return function if door == "python" else f"./{script.__name__}.py:{function.__name__}"

    if layout == "verl":
        return given(script.compute_score)
    terms = script.TEXT_REWARDS if layout == "trl text" else script.CHAT_REWARDS
    return [{"function": given(f), "weight": weight} for f, weight in terms.items()]


def as_trl(terms, rows, texts, ids):
    """TRL calls each function once with all completions; None counts for nothing in the sum."""
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    prompts = [row["prompt"] for row in rows]
    completions = texts
    if not isinstance(prompts[0], str):
        completions = [[{"role": "assistant", "content": text}] for text in texts]
    columns |= {"prompts": prompts, "completions": completions, "completion_ids": ids}
    totals = [0.0] * len(rows)
    for function, weight in terms.items():
        found = function(**columns)
        found = asyncio.run(found) if inspect.iscoroutine(found) else found
        totals = [t + weight * (f or 0.0) for t, f in zip(totals, found, strict=True)]
    return totals


def as_verl(compute_score, rows, texts):
    """verl calls the function with one solution at a time; of a dict the score trains."""
    scores = [
        compute_score(
            data_source=row["data_source"],
            solution_str=text,
            ground_truth=row["reward_model"]["ground_truth"],
            extra_info=dict(row["extra_info"]),
        )
        for row, text in zip(rows, texts, strict=True)
    ]
    return [score["score"] if isinstance(score, dict) else score for score in scores]


@pytest.mark.parametrize("door", ["yaml", "python"])
@pytest.mark.parametrize("layout", ["trl text", "trl chat", "verl"])
def test_a_script_of_another_trainer_trains_unchanged(script, layout, door, chat_policy):
    table = [row_of(layout, index) for index in range(12)]
    data = "sums.parquet" if layout == "verl" else "sums.jsonl"
    write = Dataset.to_parquet if layout == "verl" else Dataset.to_json
    write(Dataset.from_list(table), data)
    policy = str(EMBEDDED if layout == "trl text" else chat_policy)
    reward = reward_of(script, layout, door)
    if door == "python":
        spo.train("grpo", policy=policy, data=data, reward=reward, out="run", **SMALL)
    else:
        own = {"task": "rows", "data": {"train": data, "test_share": 0.1}, "reward": reward}
        recipe = SMALL | own | {"policy": {"path": policy}, "out": "run"}
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert main(["train", "recipe.yaml"]) == 0
    forest = spo.Forest.load("run/forest-first.safetensors")
    leaves = [leaf for tree in forest.trees for leaf in tree.leaves]
    columns = [leaf.tree.prompt.columns for leaf in leaves]
    rows = [table[row.get("extra_info", row)["index"]] for row in columns]
    ids = [leaf.token_ids for leaf in leaves]
    texts = [forest.tokenizer.decode(one, skip_special_tokens=True) for one in ids]
    if layout == "verl":
        expected = as_verl(script.compute_score, rows, texts)
    else:
        terms = script.TEXT_REWARDS if layout == "trl text" else script.CHAT_REWARDS
        expected = as_trl(terms, rows, texts, ids)
    rewards = [leaf.reward for leaf in leaves]
    assert len(rewards) == 16 and len(set(rewards)) > 4
    assert rewards == pytest.approx(expected, abs=1e-6)
