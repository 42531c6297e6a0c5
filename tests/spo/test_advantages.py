"""Every advantage rule on forests small enough to work by hand."""

import dataclasses

import pytest
import torch

from spo.advantages import assign, summarize
from spo.config import AdvantageConfig
from spo.records import LENGTH, PROMPT, SEGMENT, STOP, Prompt
from spo.rollout import assemble
from spo.shapes import Node, Tree

NAN = float("nan")


def node(parent, reward=NAN, trained=True, in_value=True, finish=None, weight=1, tokens=2):
    if finish is None:
        finish = SEGMENT if reward != reward else STOP
    logprobs = (-1.0,) * tokens
    return Node(parent, (5,) * tokens, logprobs, trained, in_value, finish, 0, reward, weight)


def forest(*nodes):
    tree = Tree(0, Prompt((2, 3), "1", "arithmetic"))
    tree.nodes += nodes
    assert tree.nodes[0].finish == PROMPT
    return assemble([tree], 1.0)


def check(forest, expected, **rule):
    values, advantages = assign(forest, AdvantageConfig(**rule))
    torch.testing.assert_close(
        advantages, torch.tensor(expected, dtype=torch.float32), atol=1e-6, rtol=0
    )
    return values


# prompt -> A(inner), B(early leaf, 1); A -> 1, 0, 0.  V(A) = 1/3, V(prompt) = 2/3
TREE = forest(node(0), node(0, 1.0), node(1, 1.0), node(1, 0.0), node(1, 0.0))


def test_spo_tree():
    values = check(TREE, [0, -1 / 3, 1 / 3, 2 / 3, -1 / 3, -1 / 3])
    torch.testing.assert_close(values, torch.tensor([2 / 3, 1 / 3, 1, 1, 0, 0]))


def test_spo_tree_loo():
    check(TREE, [0, -2 / 3, 2 / 3, 1, -0.5, -0.5], baseline="loo")


def test_spo_tree_std():
    std = (2 / 9) ** 0.5  # of (1, 0, 0)
    check(TREE, [0, -1, 1, 2 / 3 / std, -1 / 3 / std, -1 / 3 / std], scale="std")


STAR = forest(node(0, 1.0), node(0, 0.0), node(0, 0.0), node(0, 0.0))


def test_grpo():
    std = (3 / 16) ** 0.5
    check(STAR, [0, 0.75 / std, *[-0.25 / std] * 3], scale="std")


def test_grpo_of_equal_rewards_is_zero():
    check(forest(node(0, 1.0), node(0, 1.0)), [0, 0, 0], scale="std")


def test_rloo():
    check(STAR, [0, 1, -1 / 3, -1 / 3, -1 / 3], baseline="loo")
    check(forest(node(0, 1.0)), [0, 0], baseline="loo")  # an only child


def chain(**first):
    """Two trajectories: A(probes 1,0) -> B(probes 1,1) -> C = 1;  A -> D = 0."""
    trunk = {"in_value": False}
    return forest(
        node(0, **trunk, weight=2),  # 1: A
        node(1, **trunk),  # 2: B
        node(2, 1.0, **trunk),  # 3: C
        node(1, 0.0, **trunk),  # 4: D
        node(1, 1.0, trained=False),
        node(1, 0.0, trained=False),
        node(2, 1.0, trained=False),
        node(2, 1.0, trained=False),
        *first.get("more", ()),
    )


def test_spo_chain():
    # V(A) = 1/2, V(B) = 1, the ends are realised rewards; the group's mean is 1/2.
    check(chain(), [0, 0, 0.5, 0, -0.5, 0, 0, 0, 0])


def test_chain_root_value_weighs_trajectories():
    # C = 1 was reached by three of four trajectories: V(prompt) = 3/4.
    grown = chain()
    weight = grown.weight.clone()
    weight[3] = 3
    grown = dataclasses.replace(grown, weight=weight)
    check(grown, [0, -0.25, 0.5, 0, -0.5, 0, 0, 0, 0])


def test_chain_root_value_none():
    check(chain(), [0, 0, 0.5, 0, -0.5, 0, 0, 0, 0], root_value="none")


def test_chain_root_value_mc():
    probes = [node(0, 1.0, trained=False), node(0, 1.0, trained=False)]
    check(chain(more=probes), [0, -0.5, 0.5, 0, -0.5, *[0] * 6], root_value="mc")


def test_missing_root_probes_are_refused():
    with pytest.raises(ValueError, match="has no value"):
        assign(chain(), AdvantageConfig(root_value="mc"))


def test_whitening_is_over_trained_nodes():
    _, advantages = assign(TREE, AdvantageConfig(whiten="batch"))
    trained = advantages[1:]
    assert trained.mean().abs() < 1e-6 and trained.std(correction=0) == pytest.approx(1, abs=1e-5)
    raw = torch.tensor([-1 / 3, 1 / 3, 2 / 3, -1 / 3, -1 / 3])
    torch.testing.assert_close(trained, (raw - raw.mean()) / raw.std(correction=0))


def test_summary():
    values, advantages = assign(STAR, AdvantageConfig())
    figures = summarize(STAR, values, advantages)
    assert figures["reward_mean"] == 0.25 and figures["value_mean"] == 0.25
    assert figures["zero_advantage_share"] == 0 and figures["segments_per_trajectory"] == 1
    assert figures["mean_abs_advantage"] == pytest.approx((0.75 + 3 * 0.25) / 4)
    cut = forest(node(0, 0.0, finish=LENGTH), node(0, 0.0))
    assert summarize(cut, *assign(cut, AdvantageConfig()))["zero_advantage_share"] == 1
