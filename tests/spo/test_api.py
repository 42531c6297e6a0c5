"""The Python door: light to import, functions whatever was imported before, objects come back."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sentences import one_sentence

import spo
from spo.engines.hf import HFEngine

SMALL = [
    "engine={name: hf, max_num_seqs: 64, max_model_len: 96}",
    "sampling.max_new_tokens=32",
    "shape={widths: [2, 2], segment_tokens: [8]}",
    "train={iterations: 1, prompts: 2, minibatches: 1}",
    "eval={every: 0, problems: 4}",
]


def anything(value: Any) -> Any:
    return value


def python(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_spo_loads_nothing_heavy():
    heavy = ("torch", "transformers", "pydantic", "yaml", "rich", "datasets", "numpy")
    code = f"import sys, spo; print([m for m in {heavy} if m in sys.modules])"
    assert python(code) == "[]"


def test_a_recipe_loads_without_transformers():
    code = "import sys, spo; spo.load_recipe('spo-tree'); print('transformers' in sys.modules)"
    assert python(code) == "False"


def test_a_forest_s_numbers_need_neither_transformers_nor_pandas():
    file = Path(__file__).parents[2] / "docs" / "tree.safetensors"
    code = f"import sys, spo; forest = spo.Forest.load({str(file)!r}); forest.advantages(); "
    code += "print([m for m in ('transformers', 'pandas') if m in sys.modules])"
    assert python(code) == "[]"


def test_its_functions_are_functions_whatever_was_imported():
    imports = "spo.loop, spo.cli, spo.grow.rollout, spo.grow.evaluate, spo.config.train"
    names = ("train", "evaluate", "rollout", "load_recipe")
    code = f"import {imports}; print(*[type(getattr(spo, n)).__name__ for n in {names}])"
    assert python(code) == "function function function function"
    for name in names:
        assert importlib.util.find_spec(f"spo.{name}") is None
    assert set(spo.__all__) <= set(dir(spo))
    with pytest.raises(AttributeError, match="'spo' has no attribute 'trian'"):
        _ = spo.trian


def test_one_engine_serves_all_three(tmp_path):
    engine = HFEngine(spo.Recipe().policy.source, max_num_seqs=64, max_model_len=96)
    forest, cost = spo.rollout("spo-tree", SMALL, engine=engine)
    assert isinstance(forest, spo.Forest) and cost.trees == len(forest.prompts) == 2
    greedy, sampled = spo.evaluate("spo-tree", SMALL, engine=engine, samples=2)
    assert (greedy.temperature, sampled.samples, greedy.problems) == (0, 2, 4)
    lines = spo.train("spo-tree", [*SMALL, f"out={tmp_path}"], engine=engine).metrics
    assert [line["stage"] for line in lines] == ["eval", "train", "eval"]
    tested = spo.evaluate("spo-tree", SMALL, checkpoint=tmp_path, engine=engine)
    assert tested[0].pass_at_1 == lines[-1]["greedy"]  # it holds the trained weights
    trained = spo.Forest.load(tmp_path / "forest-last.safetensors")
    assert trained.origin == forest.origin
    assert trained.token_ids.equal(forest.token_ids)  # the first iteration's
    assert trained.rollout_logprobs.allclose(forest.rollout_logprobs, atol=1e-5)
    assert trained.node(1).text == forest.node(1).text != ""
    engine.close()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: spo.train("no-such-recipe"), ["no-such-recipe", "spo-tree"]),
        (lambda: spo.evaluate("spo-tree", SMALL, samples=-1), ["samples", "-1"]),
        (lambda: spo.evaluate("spo-tree", SMALL, limits=[0]), ["limits", "0"]),
        (lambda: spo.evaluate("spo-tree", SMALL, limits=anything([2.5])), ["limits", "2.5"]),
        (lambda: spo.evaluate("spo-tree", SMALL, samples=anything(2.0)), ["samples", "2.0"]),
        (
            lambda: spo.evaluate("spo-tree", SMALL, temperature=anything("1")),
            ["temperature", "'1'"],
        ),
        (lambda: spo.rollout("spo-tree", SMALL, engine=object()), ["engine", "found object"]),
        (lambda: spo.rollout(anything(3)), ["recipe: expected a name, a path or a Recipe", "int"]),
        (lambda: spo.train(anything({"task": "rows"})), ["recipe: expected a name", "dict"]),
        (lambda: spo.evaluate("spo-tree", SMALL, checkpoint="nowhere"), ["nowhere", "checkpoint"]),
        (lambda: spo.rollout(spo.Recipe(), SMALL), ["overrides"]),
    ],
)
def test_bad_calls_are_one_sentence(call, words):
    with one_sentence(words):
        call()
