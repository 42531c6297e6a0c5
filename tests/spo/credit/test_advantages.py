"""Every advantage rule on forests small enough to work by hand."""

import dataclasses
import math
import warnings

import pytest
import torch

from spo.credit.nodes import figures, of_nodes, of_tokens
from spo.credit.values import Values
from spo.grow.assemble import assemble, is_leaf, leave_out_unrewarded
from spo.grow.chain import ChainShape, cutpoint_partition, fixed_partition, step_partition
from spo.grow.shapes import Node, Tree
from spo.grow.steps import line_ends
from spo.records import LENGTH, PROMPT, SEGMENT, STOP, Completion, Prompt, concat

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
    rule = Values(**rule)
    values = rule.values(forest)
    advantages = rule.advantages(forest, values)
    assert torch.equal(rule.assign(forest).tokens, of_tokens(forest, advantages))
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


def test_spo_tree_loo_and_std():
    top, low = 1 / 3, (2 / 9) ** 0.5  # of (1/3, 1) and of (1, 0, 0)
    expected = [0, -2 / 3 / top, 2 / 3 / top, 1 / low, -0.5 / low, -0.5 / low]
    check(TREE, expected, baseline="loo", scale="std")


def test_path_weights():
    # Two siblings at the top, three below A: 1/2 and 1/2 * 1/3.
    check(TREE, [0, -1 / 6, 1 / 6, 1 / 9, -1 / 18, -1 / 18], node_weight="path")
    check(TREE, [0, -1 / 3, 1 / 3, 1 / 6, -1 / 12, -1 / 12], node_weight="path", baseline="loo")
    check(STAR, [0, 1 / 4, *[-1 / 12] * 3], node_weight="path", baseline="loo")


def test_path_weights_follow_whitening():
    plain = of_nodes(TREE, Values(whiten="batch").assign(TREE).tokens)
    share = torch.tensor([1, 1 / 2, 1 / 2, 1 / 6, 1 / 6, 1 / 6])
    check(TREE, (plain * share).tolist(), whiten="batch", node_weight="path")


def test_only_counted_siblings_share_a_path():
    # A response cut by the limit was left out: the other two are 1/2 each.
    left_out = node(0, trained=False, in_value=False, finish=LENGTH)
    grown = forest(node(0, 1.0), left_out, node(0, 0.0))
    check(grown, [0, 1 / 4, 0, -1 / 4], node_weight="path")


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


def test_chain_root_value_mc():
    probes = [node(0, 1.0, trained=False), node(0, 1.0, trained=False)]
    check(chain(more=probes), [0, -0.5, 0.5, 0, -0.5, *[0] * 6], root_value="none")


def test_a_chain_whose_prompt_has_no_value_trains_behind_its_first_segments():
    check(chain(), [0, 0, 0.5, 0, -0.5, 0, 0, 0, 0], root_value="none")  # all root probes failed


def test_a_trained_node_without_a_value_is_refused():
    with pytest.raises(ValueError, match="has no value"):
        Values().assign(forest(node(0, 1.0), node(0, finish=STOP)))


def test_a_response_that_was_left_out_is_no_sibling():
    left_out = node(0, finish=STOP, trained=False, in_value=False)
    star = forest(node(0, 1.0), left_out, node(0, 0.0), node(0, 0.0))
    check(star, [0, 1.0, 0, -0.5, -0.5], baseline="loo")
    check(star, [0, 2 / 3, 0, -1 / 3, -1 / 3])


def test_sorting_puts_siblings_in_the_order_of_sampling():
    tree = Tree(0, Prompt((2, 3), "1", "arithmetic"))
    ended = [(0, 2, "c"), (0, 0, "a"), (2, 1, "ab"), (1, 0, "ca"), (0, 1, "b"), (2, 0, "aa")]
    for parent, index, name in ended:
        tree.add(dataclasses.replace(node(parent), token_ids=name, index=index))
    tree.sort()
    assert [n.token_ids for n in tree.nodes[1:]] == ["a", "aa", "ab", "b", "c", "ca"]
    assert [n.parent for n in tree.nodes] == [-1, 0, 1, 1, 0, 0, 5]


def test_segments_per_trajectory_counts_those_on_a_path():
    inner = [node(0), node(0), node(1, 1.0), node(1, 0.0), node(2, 1.0), node(0, 1.0)]
    grown = forest(*inner)
    figures = Values().assign(grown).figures
    assert figures["segments_per_trajectory"] == pytest.approx((2 + 2 + 2 + 1) / 4)
    shared = forest(node(0, weight=2), node(1, 1.0, weight=1), node(1, 0.0, weight=1))
    figures = Values().assign(shared).figures
    assert figures["segments_per_trajectory"] == 2


UNSURE, SURE = math.log(0.5), math.log(0.95)
TEXT = "abcdefghi\n"  # of tokens 0 to 9
CUTPOINTS = cutpoint_partition(0.9, 2)


def grown_chain(partition, responses, rewards, probes, prompt_probes=()):
    """A chain grown by its shape. Responses are (token_ids, pattern), "x" a token below the
    threshold; `probes` has the rewards of every probed boundary by the tokens before it.
    """
    shape = ChainShape(len(responses), 2, partition, 20, probe_prompt=bool(prompt_probes))
    tree = Tree(0, Prompt((2, 3), "1", "arithmetic"))
    trunk, *groups = shape.start(tree)
    for index, (ids, pattern) in enumerate(responses):
        logprobs = tuple(UNSURE if c == "x" else SURE for c in pattern)
        groups += shape.extend(tree, trunk, Completion(0, index, ids, logprobs, STOP, 0, 0))
    wanted = {(): prompt_probes, **probes}
    assert sorted(tuple(tree.response_ids(g.parent)) for g in groups) == sorted(
        boundary for boundary, found in wanted.items() if found
    )
    for group in groups:
        for reward in wanted[tuple(tree.response_ids(group.parent))]:
            shape.extend(tree, group, Completion(0, 0, (8,), (-1.0,), STOP, 0, 0))
            tree.nodes[-1].reward = reward
    for index, grown in enumerate(tree.nodes):
        if is_leaf(grown) and grown.trained:
            grown.reward = rewards[tuple(tree.response_ids(index))]
    return assemble([tree], 1.0)


def check_trained(forest, expected, **rule):
    """The trained nodes' (tokens, advantage), in the order in which they were grown."""
    advantages = of_nodes(forest, Values(**rule).assign(forest).tokens)
    nodes = forest.trained.nonzero()[:, 0].tolist()
    assert [forest.tokens(n) for n in nodes] == [ids for ids, _ in expected]
    assert advantages[nodes].tolist() == pytest.approx([a for _, a in expected], abs=1e-6)


LINE = (4, 9, 5, 6, 9, 1)  # two lines and a stop token


@pytest.mark.parametrize(
    ("partition", "segments"),
    [
        (CUTPOINTS, [[4], [9, 5, 6], [9, 1]]),  # before cutpoints 1 and 3
        (fixed_partition(2), [[4, 9], [5, 6], [9, 1]]),
        (step_partition(TEXT.__getitem__, line_ends), [[4, 9], [5, 6, 9], [1]]),
    ],
)
def test_every_partition(partition, segments):
    first, second = tuple(segments[0]), (*segments[0], *segments[1])
    grown = grown_chain(
        partition,
        [(LINE, ".x.xx.")],
        {LINE: 1.0},
        {first: (1.0, 0.0), second: (0.0, 0.0)},
        prompt_probes=(1.0, 1.0),
    )
    # V: prompt 1, then 1/2, then 0; the response is right.
    check_trained(grown, list(zip(segments, [-0.5, -0.5, 1.0], strict=True)), root_value="none")


def test_no_cutpoint_is_one_segment_from_the_prompt():
    responses = [((4, 5, 1), "..."), ((6, 1), "..")]
    grown = grown_chain(CUTPOINTS, responses, {(4, 5, 1): 1.0, (6, 1): 0.0}, {})
    check_trained(grown, [([4, 5, 1], 0.5), ([6, 1], -0.5)])
    check_trained(grown, [([4, 5, 1], 0.0), ([6, 1], 0.0)], root_value="none")


def test_a_cutpoint_at_the_start_leaves_no_empty_segment():
    # Cutpoints 1 to 3 are the first three tokens; the boundary of number 1 is the prompt itself.
    grown = grown_chain(
        CUTPOINTS, [((4, 5, 6, 1), "xxx.")], {(4, 5, 6, 1): 0.0}, {(4, 5): (1.0, 0.0)}, (1.0, 0.0)
    )
    check_trained(grown, [([4, 5], 0.0), ([6, 1], -0.5)], root_value="none")


def test_a_response_of_one_token():
    responses = [((1,), "x"), ((4, 1), "..")]
    grown = grown_chain(CUTPOINTS, responses, {(1,): 0.0, (4, 1): 1.0}, {})
    check_trained(grown, [([1], -0.5), ([4, 1], 0.5)])


def test_equal_boundaries_are_probed_once():
    # Both responses stop at (4): two probes there, not four; its node stands for both.
    responses = [((4, 5, 1), ".x."), ((4, 6, 1), ".x."), ((4, 6, 1), ".x.")]
    grown = grown_chain(CUTPOINTS, responses, {(4, 5, 1): 1.0, (4, 6, 1): 0.0}, {(4,): (1.0, 0.0)})
    assert grown.weight[grown.trained].tolist() == [3, 1, 2]
    check_trained(grown, [([4], 1 / 2 - 1 / 3), ([5, 1], 0.5), ([6, 1], -0.5)])


def test_a_response_without_a_verdict_is_no_zero():
    tree = Tree(0, Prompt((2, 3), "1", "arithmetic"))
    tree.nodes += [node(0, 1.0), node(0, NAN, finish=STOP), node(0, 0.0)]
    leave_out_unrewarded(tree)
    check(assemble([tree], 1.0), [0, 0.5, 0, -0.5])


def test_whitening_is_over_trained_nodes():
    advantages = of_nodes(TREE, Values(whiten="batch").assign(TREE).tokens)
    trained = advantages[1:]
    assert trained.mean().abs() < 1e-6 and trained.std(correction=0) == pytest.approx(1, abs=1e-5)
    raw = torch.tensor([-1 / 3, 1 / 3, 2 / 3, -1 / 3, -1 / 3])
    torch.testing.assert_close(trained, (raw - raw.mean()) / raw.std(correction=0))


def test_summary():
    found = Values().assign(STAR).figures
    assert found["reward_mean"] == 0.25 and found["value_mean"] == 0.25
    assert found["zero_advantage_share"] == 0 and found["segments_per_trajectory"] == 1
    assert found["mean_abs_advantage"] == pytest.approx((0.75 + 3 * 0.25) / 4)
    cut = forest(node(0, 0.0, finish=LENGTH), node(0, 0.0))
    assert Values().assign(cut).figures["zero_advantage_share"] == 1


def test_figures_of_responses():
    tree = forest(
        node(0, tokens=3),
        node(0, 1.0, tokens=1),
        node(1, 1.0, tokens=4, finish=LENGTH),
        node(1, NAN, tokens=2, finish=STOP),  # its grading failed
    )
    both = concat([tree, forest(node(0, 0.5, tokens=6), node(0, 0.0, tokens=5))])
    found = figures(both, torch.zeros(both.num_nodes), torch.zeros(3))
    lengths = [1, 3 + 4, 3 + 2, 6, 5]
    assert found["response_tokens_mean"] == pytest.approx(sum(lengths) / 5)
    assert (found["response_tokens_min"], found["response_tokens_max"]) == (1, 7)
    assert found["truncated_share"] == pytest.approx(1 / 5)
    assert found["reward_mean"] == 0.625  # of 1, 1, 0.5 and 0
    deviations = [0.375, 0.375, -0.125, -0.625]
    assert found["reward_std"] == pytest.approx((sum(d * d for d in deviations) / 3) ** 0.5)
    assert found["same_reward_share"] == 0.5
    one = forest(node(0, 1.0))
    assert math.isnan(figures(one, torch.zeros(2), torch.zeros(1))["reward_std"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch's, of a deviation of nothing
        found = figures(one, torch.full((2,), math.nan), torch.zeros(1))
    assert math.isnan(found["value_stderr"]) and found["value_n"] == 0
