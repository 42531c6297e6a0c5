"""The replay buffer: what is drawn, what stays, what is dropped."""

import dataclasses

import pytest
import torch
from forests import random_forest

from spo.credit.nodes import of_nodes, of_tokens
from spo.credit.replay import merge
from spo.records import Credit, Prompt, Replay, concat, select


def forest(seed, born=0, trees=3):
    grown, advantages = random_forest(seed, trees=trees, weights=True)
    prompts = tuple(Prompt((seed, i), seed, "arithmetic") for i in range(trees))
    born = torch.full_like(grown.born, born)
    return dataclasses.replace(grown, prompts=prompts, born=born), advantages


def trees_of(f):
    """Every tree as (prompt, nodes); a node as its path and its own figures."""
    return [
        (
            prompt,
            [
                (f.path_ids(n), f.rollout_logprobs[f.cu_tokens[n] : f.cu_tokens[n + 1]].tolist())
                + (int(f.weight[n]), int(f.born[n]), bool(f.in_value[n]))
                for n in (f.prompt == i).nonzero()[:, 0].tolist()
            ],
        )
        for i, prompt in enumerate(f.prompts)
    ]


def test_concat_and_select_keep_trees_whole():
    a, _ = forest(1)
    b, _ = forest(2, trees=2)
    both = concat([a, b])
    assert trees_of(both) == trees_of(a) + trees_of(b)
    some = select(both, torch.tensor([True, False, False, False, True]))
    assert trees_of(some) == [trees_of(a)[0], trees_of(b)[1]]


def step(new, buffer, iteration, nodes=2, age=8, seed=0, most=None):
    """`merge` of a forest with (S,) advantages, which come back."""
    grown, advantages = new
    chosen, credit, left = merge(
        grown, Credit(of_tokens(grown, advantages)), buffer, iteration=iteration,
        nodes_per_prompt=nodes, max_age=age, seed=seed, max_nodes=most,
    )  # fmt: skip
    return chosen, of_nodes(chosen, credit.tokens), left


def eligible(f, advantages):
    return f.trained & (advantages.abs() > 1e-6)


def test_off_passes_the_forest_through():
    new = forest(1)
    credit = Credit(torch.ones(new[0].token_ids.numel()))
    passed = merge(new[0], credit, Replay(), iteration=0, nodes_per_prompt=0, max_age=8, seed=0)
    assert passed[0] is new[0] and passed[1] is credit and passed[2] == Replay()


def test_draws_at_most_n_per_prompt_and_keeps_the_rest():
    new = forest(3)
    able = eligible(*new)
    chosen, advantages, left = step(new, Replay(), 0, nodes=2)
    assert chosen.prompts == new[0].prompts
    for tree in range(3):
        mine = chosen.prompt == tree
        assert int(chosen.trained[mine].sum()) == min(2, int(able[mine].sum()))
    assert not (chosen.trained & ~able).any()
    assert int(left.forest.trained.sum()) == int(able.sum()) - int(chosen.trained.sum())
    assert torch.equal(advantages, new[1])


def test_an_iteration_takes_no_more_than_its_samples():
    new = forest(3)
    able = int(eligible(*new).sum())
    chosen, _, left = step(new, Replay(), 0, nodes=2, most=3)
    assert int(chosen.trained.sum()) == 3 and int(left.forest.trained.sum()) == able - 3
    others = {tuple(step(new, Replay(), 0, seed=s, most=3)[0].trained.tolist()) for s in range(9)}
    assert len(others) > 1
    drawn = [step(new, Replay(), 0, seed=s, most=1)[0].prompts for s in range(40)]
    assert all(len(prompts) == 1 for prompts in drawn)  # no step is spent on other trees
    assert len({prompts[0].prompt_ids for prompts in drawn}) == 3


def test_every_node_trains_exactly_once():
    first, second = forest(4), forest(5)
    total = int(eligible(*first).sum()) + int(eligible(*second).sum())
    chosen, _, buffer = step(first, Replay(), 0, nodes=1, age=50)
    trained = int(chosen.trained.sum())
    chosen, credit, buffer = step(second, buffer, 1, nodes=1, age=50)
    trained += int(chosen.trained.sum())
    empty = dataclasses.replace(second[0], trained=torch.zeros_like(second[0].trained))
    for iteration in range(2, 12):
        chosen, credit, buffer = step((empty, second[1]), buffer, iteration, nodes=1, age=50)
        assert (credit[chosen.trained].abs() > 1e-6).all()
        trained += int(chosen.trained.sum())
    assert trained == total and buffer.forest is None


def test_old_nodes_are_dropped_and_counted():
    """Whatever version sampled them: a stream's nodes may be older than their iteration."""
    old, new = forest(6, born=0), forest(7, born=1)
    first, _, buffer = step(old, Replay(), 3, nodes=1, age=2)
    assert set(first.born[first.trained].tolist()) == {0}  # three versions old, and yet it trains
    waiting = int(buffer.forest.trained.sum())
    assert waiting == int(eligible(*old).sum()) - int(first.trained.sum()) > 0
    assert buffer.received.tolist() == [3] * len(buffer.forest.prompts)
    credit = Credit(of_tokens(*new), {"reward_mean": 0.5})
    for iteration, dropped, ages in ((4, 0, {0, 1}), (5, waiting, {1})):
        chosen, kept, left = merge(
            new[0], credit, buffer, iteration=iteration, nodes_per_prompt=100, max_age=2, seed=0
        )
        assert set(chosen.born[chosen.trained].tolist()) == ages
        assert kept.figures == {"reward_mean": 0.5, "replay_dropped": dropped}
        assert left == Replay()
    _, _, mixed = step(new, buffer, 4, nodes=1, age=3)
    by_prompt = {p.answer: i for p, i in zip(mixed.forest.prompts, mixed.received, strict=True)}
    assert {k: int(v) for k, v in by_prompt.items()} == {6: 3, 7: 4}
    chosen, kept, left = merge(
        new[0], credit, Replay(), iteration=9, nodes_per_prompt=1, max_age=1, seed=0
    )
    others = int(eligible(*new).sum()) - int(chosen.trained.sum())
    assert kept.figures["replay_dropped"] == others > 0 and left == Replay()  # at once


@pytest.mark.parametrize("seed", [0, 1])
def test_same_seed_same_draw(seed):
    first, _, _ = step(forest(8), Replay(), 0, seed=seed)
    second, _, _ = step(forest(8), Replay(), 0, seed=seed)
    assert torch.equal(first.trained, second.trained)
    other, _, _ = step(forest(8), Replay(), 0, seed=seed + 10)
    assert not torch.equal(first.trained, other.trained)
