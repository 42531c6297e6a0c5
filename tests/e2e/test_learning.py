"""The main path learns: SPO-tree on the embedded task, with each engine, ends above its start."""

import importlib.util
from pathlib import Path

import pytest

from spo.config.recipe import load_recipe
from spo.loop import train

RECIPE = Path(__file__).parents[2] / "spo" / "recipes" / "demo-tree.yaml"


def run(out, *more):
    return train(load_recipe(RECIPE, [f"out={out}", "eval.every=0", *more]))


@pytest.mark.timeout(600)
def test_spo_tree_improves_by_more_than_two_standard_errors(tmp_path):
    lines = run(
        tmp_path, "engine.name=hf", "train.max_generated_tokens=120000", "eval.problems=300"
    )
    first, last = (line for line in lines if line["stage"] == "eval")
    for kind in ("greedy", "sampled"):
        error = (first[f"{kind}_stderr"] ** 2 + last[f"{kind}_stderr"] ** 2) ** 0.5
        assert last[kind] - first[kind] > 2 * error, (first, last)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("depth", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_vllm_samples_from_the_weights_that_were_trained(tmp_path, depth):
    lines = run(
        tmp_path,
        "train.iterations=3",
        "train.prompts=8",
        "train.learning_rate=3e-4",  # large steps, so that stale weights would show
        "eval.problems=10",
        f"train.stream_depth={depth}",
        "engine.max_num_seqs=64",  # with samples in flight while the weights change
    )
    trains = [line for line in lines if line["stage"] == "train"]
    assert len(trains) == 3
    for line in trains:
        assert line["probe_difference"] < 1e-3  # fp32 on both sides
        assert line["skipped_steps"] == 0 and line["dropped_prompts"] == 0
    assert max(line["max_age"] for line in trains) == depth
