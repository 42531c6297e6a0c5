"""Packed batches against one sequence per node, in fp64."""

import dataclasses
import math

import pytest
import torch
from forests import RHO, forest_of, load_fp64, packed, random_forest
from hypothesis import given, settings
from hypothesis import strategies as st

from spo.config.loss import PolicyLossConfig
from spo.learn.attention import BACKENDS
from spo.learn.loss import policy_loss
from spo.learn.pack import pack


def row_loss(model, forest, advantages, threshold):
    """The loss of algorithm.md, one sequence per trained node, plain PyTorch."""
    total, norm = 0.0, 0
    for node in range(forest.num_nodes):
        if not forest.trained[node] or abs(float(advantages[node])) <= 1e-6:
            continue
        ids = torch.tensor([forest.path_ids(node)])
        logits = model(ids).logits[0, :-1]
        logprobs = torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[:, 0]
        tokens = slice(int(forest.cu_tokens[node]), int(forest.cu_tokens[node + 1]))
        old = forest.rollout_logprobs[tokens].double()
        logprobs = logprobs[-old.numel() :]
        mask = old < math.log(threshold) if threshold else torch.ones_like(old, dtype=torch.bool)
        ratio = (logprobs - old).clamp(-10, 10).exp()
        a = advantages[node].double()
        term = torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        weight = int(forest.weight[node])
        total = total - weight * (term * mask).sum()
        norm += weight * int(mask.sum())
    return total / max(norm, 1)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.fixture(scope="module")
def models(tiny_model):
    """The plain model, and those that train on batches: by packing and attention."""
    plain = load_fp64(tiny_model, "sdpa")
    return plain, {
        "dense": load_fp64(tiny_model, "spo_dense"),
        "grouped": load_fp64(tiny_model, "spo_grouped"),
        "rows": plain,
    }


def check(models, kind, forest, advantages, threshold, budget, ranks=1):
    """Loss and gradient of the batches, of all ranks in turn, against one sequence per node."""
    plain, trained = models[0], models[1][kind]
    expected = row_loss(plain, forest, advantages, threshold)
    if not isinstance(expected, torch.Tensor):
        expected = sum(p.sum() for p in plain.parameters()) * 0.0
    wanted = gradients(plain, expected)
    packing = "rows" if kind == "rows" else "tree"
    shares = [
        packed(forest, advantages, budget, threshold, packing=packing, share=(rank, ranks))
        for rank in range(ranks)
    ]
    assert len({(len(batches), stats) for batches, stats in shares}) == 1
    batches, stats = [b for batches, _ in shares for b in batches], shares[0][1]
    if not batches:
        assert float(expected.detach()) == 0
        return stats
    trained.zero_grad()
    loss = 0.0
    for batch in batches:
        out = policy_loss(trained, batch, PolicyLossConfig(prob_threshold=threshold), 1.0).loss
        out.backward()
        loss += float(out.detach())
    assert loss == pytest.approx(float(expected.detach()), rel=1e-9, abs=1e-12)
    for mine, theirs in zip((p.grad for p in trained.parameters()), wanted, strict=True):
        assert (mine - theirs).norm() <= 1e-9 * (1e-3 + theirs.norm())
    return stats


@pytest.mark.parametrize("kind", ["dense", "grouped", "rows"])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    budget=st.sampled_from([12, 25, 60, 10**6]),
    weights=st.booleans(),
    ranks=st.sampled_from([1, 2, 3]),
)
def test_gradients_equal_one_sequence_per_node(models, kind, seed, budget, weights, ranks):
    forest, advantages = random_forest(seed, weights=weights)
    check(models, kind, forest, advantages, RHO, budget, ranks)


@pytest.mark.parametrize("budget", [15, 10**6])
def test_without_mask(models, budget):
    check(models, "grouped", *random_forest(3), None, budget)


def test_rows_are_cut_and_counted(models):
    forest, advantages = random_forest(5, trees=1, nodes=12)
    stats = check(models, "rows", forest, advantages, RHO, 10**6)
    low = forest.rollout_logprobs < math.log(RHO)
    rows = 0
    for node in range(forest.num_nodes):
        start, end = int(forest.cu_tokens[node]), int(forest.cu_tokens[node + 1])
        active = torch.nonzero(low[start:end])[:, 0].tolist()
        if advantages[node] != 0 and active:
            rows += len(forest.path_ids(node)) - (end - start) + active[-1]
    assert stats.packed_tokens == rows
    tree = check(models, "grouped", forest, advantages, RHO, 10**6)
    assert stats.packed_tokens - stats.repeated_tokens == tree.packed_tokens < rows


def test_ranks_get_equal_work():
    forest, advantages = random_forest(4, trees=12, nodes=8)
    shares = [packed(forest, advantages, 40, share=(rank, 2))[0] for rank in range(2)]
    tokens = [sum(b.token_ids.numel() for b in batches if b.targets.numel()) for batches in shares]
    assert len(shares[0]) == len(shares[1])
    assert abs(tokens[0] - tokens[1]) <= 20  # the smallest piece dealt last
    assert sum(tokens) == packed(forest, advantages, 40)[1].packed_tokens


def test_one_large_tree_is_split_between_ranks():
    forest, advantages = random_forest(6, trees=1, nodes=40)
    whole = packed(forest, advantages, 10**6)[1].packed_tokens
    shares = [packed(forest, advantages, 10**6, share=(rank, 2))[0] for rank in range(2)]
    tokens = [sum(b.token_ids.numel() for b in batches) for batches in shares]
    assert max(tokens) < 0.75 * whole < whole < sum(tokens)


def test_a_whole_tree_is_forwarded_once(models):
    forest, advantages = random_forest(5, trees=1, nodes=12)
    stats = check(models, "grouped", forest, advantages, RHO, 10**6)
    assert stats.repeated_tokens == 0
    split = check(models, "grouped", forest, advantages, RHO, 18)
    assert split.repeated_tokens > 0
    assert (split.kept_tokens, split.trained_tokens) == (stats.kept_tokens, stats.trained_tokens)


def tiny(sizes, parent, logprobs, trained):
    fields = {"rollout_logprobs": torch.tensor(logprobs), "trained": torch.tensor(trained)}
    return forest_of(parent, sizes, **fields)


def test_layout_by_hand():
    # prompt (2, 3); A (4, 5) under it; B (6, 7, 8) and C (9) under A; D (10, 11) untrained
    low, high = -1.0, -0.01
    forest = tiny(
        [2, 2, 3, 1, 2],
        [-1, 0, 1, 1, 1],
        [0.0, 0.0, high, low, high, low, high, low, low, low],
        [False, True, True, True, False],
    )
    advantages = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.0])
    (batch,), stats = packed(forest, advantages, 100)
    # B's last active token is its second: only its first is an input. C is predicted from A.
    assert batch.token_ids.tolist() == [2, 3, 4, 5, 6]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4]
    assert batch.visible_until.tolist() == [5, 5, 5, 5, 5]
    assert batch.targets.tolist() == [4, 5, 6, 7, 9]
    assert batch.hidden_index.tolist() == [1, 2, 3, 4, 3]
    assert batch.advantages.tolist() == [1, 1, -1, -1, 2]
    assert batch.policy_norm == 3.0 == stats.kept_tokens
    assert (stats.packed_tokens, stats.trained_tokens) == (5, 6)


def test_siblings_do_not_see_each_other():
    forest = tiny([1, 2, 2], [-1, 0, 0], [0.0] + [-1.0] * 4, [False, True, True])
    (batch,), _ = pack(
        forest, torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0]), prob_threshold=0.9, tokens_per_batch=100
    )
    assert batch.token_ids.tolist() == [2, 3, 5]
    assert batch.position_ids.tolist() == [0, 1, 1]
    ((start, end, mask),) = BACKENDS["dense"][0](batch.visible_until)
    assert (start, end) == (0, 3)
    assert mask.int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]


def test_nothing_to_train():
    forest, advantages = random_forest(1)
    batches, stats = pack(
        forest, torch.zeros(forest.token_ids.numel()), prob_threshold=RHO, tokens_per_batch=100
    )
    assert batches == [] and stats.kept_tokens == 0 and stats.packed_tokens == 0


def test_norm_is_that_of_the_step_not_of_the_batch():
    forest, advantages = random_forest(8, trees=4)
    whole, stats = packed(forest, advantages, 20)
    assert len(whole) > 2
    assert {b.policy_norm for b in whole} == {float(stats.kept_tokens)}
    some, part = packed(forest, advantages, 20, trees=[1, 3])
    assert 0 < part.kept_tokens < stats.kept_tokens
    assert sum(int(b.old_logprobs.lt(math.log(RHO)).sum()) for b in some) == part.kept_tokens


def test_masked_logprobs_cost_no_input_tokens():
    forest, advantages = random_forest(9)
    high = dataclasses.replace(
        forest, rollout_logprobs=torch.full_like(forest.rollout_logprobs, -0.01)
    )
    batches, stats = packed(high, advantages, 100)
    assert batches == []
    sizes = forest.cu_tokens.diff() * forest.weight  # nodes without any kept token count too
    all_of_them = forest.trained & (advantages.abs() > 1e-6)
    assert stats.trained_tokens == int(sizes[all_of_them].sum()) > stats.kept_tokens == 0
    batches, stats = packed(high, advantages, 100, every_token=True)
    assert batches and stats.kept_tokens == 0
