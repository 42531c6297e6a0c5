"""A credit rule from outside of the package: set by its recipe, worked by hand, trained with."""

from pathlib import Path

import pytest
import torch

from spo import load_recipe, train
from spo.credit.nodes import of_nodes
from spo.grow.assemble import assemble
from spo.grow.shapes import Node, Tree
from spo.records import STOP, Prompt

RECIPE = Path(__file__).parent / "recipe.yaml"


def star(*leaves):
    tree = Tree(0, Prompt((2, 3), "1", "arithmetic"))
    for size, reward in leaves:
        tree.nodes.append(Node(0, (5,) * size, (-1.0,) * size, True, True, STOP, 0, reward))
    return assemble([tree], 1.0)


def test_credit_by_hand():
    rule = load_recipe(RECIPE).credit
    forest = star((2, 1.0), (6, 0.0))  # means: reward 1/2, length 4
    credit = rule.assign(forest, None)
    torch.testing.assert_close(of_nodes(forest, credit.tokens), torch.tensor([0, 0.6, -0.6]))
    assert credit.figures["reward_mean"] == 0.5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("credit.cost=-1", ["credit.cost", "greater than or equal to 0", "found -1"]),
        ("credit.hold=maybe", ["credit.hold", "'off' or 'on'"]),
        ("credit.price=1", ["credit.price", "cost, hold", "Terse"]),
        ("credit.type=./rule.py:Verbose", ["credit.type", "has no class Verbose"]),
        ("shape={kind: tree}", ["this rule", "whole responses"]),
    ],
)
def test_bad_settings_are_one_sentence(override, words):
    with pytest.raises(ValueError) as error:
        load_recipe(RECIPE, [override])
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_it_trains_and_its_hook_is_called_before_every_step(tmp_path):
    def line(name, *overrides):
        lines = train(RECIPE, [f"out={tmp_path / name}", "train.epochs=2", *overrides]).metrics
        (found,) = (x for x in lines if x["stage"] == "train")
        assert found["grad_norm"] > 0 and found["skipped_steps"] == 0
        return found

    plain, held = line("plain"), line("held", "credit.hold=on")
    assert "mean_moved" not in plain
    assert held["mean_moved"] > 1e-4  # 0 in the first epoch, but not in the second
    assert held["loss"] != plain["loss"]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ("Credit(worth)", ["one number for each", "of_tokens"]),
        ("Credit(of_tokens(forest, worth / 0))", ["expected finite numbers"]),
        ("Credit(*models.score(['reference'], forest, of_tokens(forest, worth)))", ["reference"]),
    ],
)
def test_a_rule_that_is_wrong_is_told_so(broken, words, tmp_path):
    source = (RECIPE.parent / "rule.py").read_text()
    head, tail = source.split("        return Credit(of_tokens(forest, worth), figures", 1)
    tail = tail.split("\n", 1)[1]
    (tmp_path / "rule.py").write_text(f"{head}        return {broken}\n{tail}")
    (tmp_path / "recipe.yaml").write_text(RECIPE.read_text())
    with pytest.raises(ValueError) as error:
        train(tmp_path / "recipe.yaml", [f"out={tmp_path / 'run'}"])
    assert all(word in str(error.value) for word in words)
