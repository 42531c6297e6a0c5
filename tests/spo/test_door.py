"""The Python door: own rows, own reward, settings as keywords, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
from sentences import one_sentence

import spo
from spo.config.policy import EMBEDDED
from spo.config.recipe import load_recipe

SMALL = {
    "engine": {"name": "hf", "max_num_seqs": 32, "max_model_len": 96},
    "shape": {"kind": "star", "group_size": 4},
    "max_new_tokens": 24,
    "iterations": 1,
    "prompts": 4,
    "minibatches": 1,
    "problems": 4,
}
ROWS = [{"question": f"arithmetic {a} + {b}\n", "final": a + b} for a in range(8) for b in range(5)]


def half(response, final):
    """Half a point for each of two halves of the job."""
    return 0.5 * ("<answer>" in response) + 0.5 * (f" {final} " in response)


def test_rows_and_a_function_train_in_one_call(tmp_path):
    run = spo.train(
        "grpo",
        policy=EMBEDDED,
        data={"train": ROWS, "columns": {"problem": "question", "answer": "final"}},
        reward=half,
        out=tmp_path,
        learning_rate=1e-4,
        **SMALL,
    )
    start, line, end = run.metrics
    assert (start["stage"], line["stage"], end["stage"]) == ("eval", "train", "eval")
    assert 0 < line["reward_half"] <= 1 and line["invalid_gradings"] == 0
    forest = run.forest("first")
    assert set(forest.rewards[forest.is_leaf].tolist()) <= {0.0, 0.5, 1.0}
    assert forest.prompts[0].columns["final"] == forest.prompts[0].answer


def test_a_resumed_run_wants_the_same_rows_and_the_same_function(tmp_path):
    given = {"policy": EMBEDDED, "out": tmp_path, **SMALL}
    columns = {"problem": "question", "answer": "final"}
    spo.train("grpo", data={"train": ROWS, "columns": columns}, reward=half, **given)
    more = given | {"iterations": 2, "resume": True}
    same = {"train": [dict(row) for row in ROWS], "columns": columns}
    with pytest.raises(ValueError, match="reward"):
        spo.train("grpo", data=same, reward=lambda response: 1.0, **more)
    with pytest.raises(ValueError, match="data"):
        spo.train("grpo", data={"train": ROWS[:-1], "columns": columns}, reward=half, **more)
    lines = spo.train("grpo", data=same, reward=half, **more).metrics
    assert [line["iteration"] for line in lines if line["stage"] == "train"] == [0, 1]


def test_rollout_and_evaluate_take_the_same(tmp_path):
    small = {k: v for k, v in SMALL.items() if k not in ("iterations", "minibatches")}
    columns = {"columns": {"problem": "question", "answer": "final"}}
    data = columns | {"train": ROWS}
    forest, _ = spo.rollout("grpo", policy=EMBEDDED, data=data, reward=half, **small)
    assert len(forest.prompts) == 4
    rule = {"rule": "answer", "success": 1}
    data = columns | {"test": ROWS}
    (found,) = spo.evaluate("grpo", policy=EMBEDDED, data=data, reward=rule, **small)
    assert found.problems == 4 and 0 <= found.pass_at_1 <= 1


def test_rows_without_an_answer_are_refused_where_the_reward_needs_one(tmp_path):
    small = {k: v for k, v in SMALL.items() if k not in ("iterations", "minibatches")}
    data = {"train": [{"question": row["question"], "level": 2} for row in ROWS]}
    given = {"policy": EMBEDDED, "data": data, "reward": {"rule": "number"}}
    words = ["number needs answer", "columns: level", "data.columns.answer"]
    with one_sentence(words):
        spo.rollout("grpo", **given, **small)
    with one_sentence(words):
        spo.evaluate("grpo", **given | {"data": {"test": data["train"]}}, **small)
    forest, _ = spo.rollout("grpo", **given | {"reward": lambda level: level}, **small)
    assert set(forest.rewards[forest.finish == 1].tolist()) == {2.0}


def test_keywords_are_settings():
    recipe = load_recipe(
        "spo-tree",
        learning_rate=1e-3,
        train={"iterations": 7},
        shape={"kind": "star", "group_size": 3},
        group_size=5,
        out=Path("runs/x"),
        **{"sampling.temperature": 0.5},
    )
    assert (recipe.train.learning_rate, recipe.train.iterations) == (1e-3, 7)
    assert (recipe.shape_kind, recipe.shape.group_size, recipe.out) == ("star", 5, "runs/x")
    assert recipe.sampling.temperature == 0.5
    assert recipe.train.prompts == load_recipe("spo-tree").train.prompts  # what is not named stays
    assert load_recipe(recipe, seed=3).train.seed == 3 and recipe.train.seed != 3


BAD = {
    "learning_rat": (1, ["no group of a recipe has this setting", "train.learning_rate"]),
    "top_p": (0.9, ["several groups", "sampling.top_p", "eval.top_p"]),
    "train": (3, ["train: expected a dict of settings, found 3"]),
    "iterations": ("many", ["train.iterations"]),
    "train.none": (3, ["unknown key train.none"]),
    "nothing.at_all": (3, ["unknown key nothing"]),
    "group_size": (4, ["group_size: a setting of shape.kind=star", "shape={'kind': 'star'"]),
    "stop": ("</answer>", ["sampling.stop", "a list"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_keyword_is_one_sentence(name):
    value, words = BAD[name]
    with one_sentence(words):
        load_recipe("spo-tree", **{name: value})


def test_a_script_without_a_main_guard_trains(tmp_path):
    """Its function lives in the script alone, and goes to the grading worker all the same."""
    script = tmp_path / "script.py"
    script.write_text(
        "import spo\n"
        f"rows = {ROWS!r}\n"
        "bonus = 0.25\n"
        "def reward(response, answer):\n"
        "    return bonus + (f' {answer} ' in response)\n"
        f"spo.train('grpo', data={{'train': rows, 'columns': {{'problem': 'question', "
        f"'answer': 'final'}}}}, reward=reward, out={str(tmp_path / 'run')!r}, **{SMALL!r})\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    forest = spo.Forest.load(tmp_path / "run" / "forest-first.safetensors")
    assert set(forest.rewards[forest.finish == 1].tolist()) <= {0.25, 1.25}
