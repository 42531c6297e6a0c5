"""A shape from outside of the package: set by its recipe, counted by a dry run, grown, trained."""

from pathlib import Path

import pytest

from spo import load_recipe, rollout, train
from spo.plan import describe

RECIPE = Path(__file__).parent / "recipe.yaml"


def test_it_grows_what_it_says():
    forest, cost = rollout(RECIPE)
    assert cost.trees == 4
    lengths = forest.cu_tokens.diff()
    for tree in range(4):
        (root,) = ((forest.prompt == tree) & (forest.parent < 0)).nonzero()[:, 0].tolist()
        for rung in range(3):
            children = (forest.parent == root).nonzero()[:, 0]
            trunk = children[(forest.finish[children] == 3) & (lengths[children] == 6)]
            assert children.numel() == 3 + (rung < 2)  # no response here ends within 12 tokens
            if rung < 2:
                (root,) = trunk.tolist()


def test_the_dry_run_counts_with_it():
    text = describe(load_recipe(RECIPE))
    assert "4 prompts, 36 responses to grade" in text
    assert f"{4 * (12 + 3 * (40 + 34 + 28)):,} sampled tokens" in text


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["shape.width=0"], ["shape.width", "greater than or equal to 1"]),
        (["shape.widths=[2]"], ["shape.widths", "rungs, step, width", "Ladder"]),
        (["shape.step=20"], ["2 rungs of 20 tokens leave nothing"]),
        (["credit.type=correct"], ["credit.type=correct", "whole responses"]),
    ],
)
def test_bad_settings_are_one_sentence(overrides, words):
    with pytest.raises(ValueError) as error:
        load_recipe(RECIPE, overrides)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_it_trains(tmp_path):
    (line,) = (x for x in train(RECIPE, [f"out={tmp_path}"]).metrics if x["stage"] == "train")
    assert line["grad_norm"] > 0 and line["segments_per_trajectory"] > 1
