"""tree_values, tree_stats, tree_advantages: numbers worked by hand, then random forests."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import INTERPRETED, examples, needs_fast, slow_if_interpreted
from torch import Tensor

from spo_kernels import tree_advantages, tree_stats, tree_values
from spo_kernels.dispatch import unavailable
from spo_kernels.testing import DEVICE, FAST

OP = "tree"
NAN = math.nan
ULP = 2.0**-23  # one rounding of an fp32 result, relative


def forest(parent: list[int], rewards: list[float], in_value: list[int], dtype=torch.float32):
    return (
        torch.tensor(parent, dtype=torch.int32),
        torch.tensor(rewards, dtype=dtype),
        torch.tensor(in_value, dtype=torch.bool),
    )


def star(rewards: list[float], dtype=torch.float32):
    size = len(rewards)
    return forest([-1] + [0] * size, [NAN, *rewards], [0] + [1] * size, dtype)


def advantages_of(nodes, backend, **options) -> Tensor:
    parent, rewards, in_value = nodes
    values = tree_values(parent, rewards, in_value, backend=backend)
    return tree_advantages(parent, values, in_value, backend=backend, **options)


def expect(got: Tensor, want: list[float]) -> None:
    want = torch.tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got, want, rtol=2 * ULP, atol=1e-7, equal_nan=True)


# A 2-2 tree: node 2 ended early, so it weighs as much as node 1 with both its leaves.
TREE = ([-1, 0, 0, 1, 1], [NAN, NAN, 1, 1, 0], [0, 1, 1, 1, 1])
# A chain: trunk 0 -> 3 -> 6 -> 7 is trained but not counted; 1, 2 and 4, 5 are counted probes, and
# node 6 has none: its value would have to come from elsewhere.
CHAIN = (
    [-1, 0, 0, 0, 3, 3, 3, 6],
    [NAN, 1, 0, NAN, 0, 0, NAN, 1],
    [0, 1, 1, 0, 1, 1, 0, 0],
)


def test_tree_with_an_early_leaf(backend):
    parent, rewards, in_value = forest(*TREE)
    values = tree_values(parent, rewards, in_value, backend=backend)
    expect(values, [0.75, 0.5, 1, 1, 0])
    counts, variances = tree_stats(parent, values, in_value, backend=backend)
    assert counts.tolist() == [2, 2, 0, 0, 0] and counts.dtype == torch.int32
    expect(variances, [0.0625, 0.25, NAN, NAN, NAN])
    expect(advantages_of(forest(*TREE), backend), [0, -0.25, 0.25, 0.5, -0.5])
    expect(advantages_of(forest(*TREE), backend, scale="std"), [0, -1, 1, 1, -1])
    expect(advantages_of(forest(*TREE), backend, baseline="loo"), [0, -0.5, 0.5, 1, -1])
    options = {"baseline": "loo", "scale": "std", "eps": 0.25}
    expect(advantages_of(forest(*TREE), backend, **options), [0, -1, 1, 4 / 3, -4 / 3])


def test_chain_counts_probes_and_not_its_trunk(backend):
    parent, rewards, in_value = forest(*CHAIN)
    values = tree_values(parent, rewards, in_value, backend=backend)
    expect(values, [0.5, 1, 0, 0, 0, 0, NAN, 1])
    counts, variances = tree_stats(parent, values, in_value, backend=backend)
    assert counts.tolist() == [2, 0, 0, 2, 0, 0, 0, 0]
    expect(variances, [0.25, NAN, NAN, 0, NAN, NAN, NAN, NAN])
    # Segment 3 loses 0.5; 6 has no value, so neither it nor its child 7 has an advantage.
    expect(advantages_of(forest(*CHAIN), backend), [0, 0.5, -0.5, -0.5, 0, 0, NAN, NAN])
    # std of the probes at the segment's start; at 6 there is none.
    want = [0, 0.5 / (0.5 + 1e-8), -1, -1, 0, 0, NAN, NAN]
    expect(advantages_of(forest(*CHAIN), backend, scale="std"), want)


def test_root_value_from_elsewhere_is_used(backend):
    parent, rewards, in_value = forest([-1, 0, 0], [NAN, 1, 0], [0, 0, 0])
    values = tree_values(parent, rewards, in_value, backend=backend)
    expect(values, [NAN, 1, 0])
    values[0] = 0.25
    expect(tree_advantages(parent, values, in_value, backend=backend), [0, 0.75, -0.25])


def test_grpo_is_a_star_with_std(backend):
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0]
    std = math.sqrt(0.24)  # population: mean 0.6
    want = [0] + [(r - 0.6) / (std + 1e-8) for r in rewards]
    expect(advantages_of(star(rewards), backend, scale="std"), want)


def test_rloo_is_a_star_with_loo(backend):
    want = [0, 1 - 0.5, 0 - 0.75, 0 - 0.75, 1 - 0.5, 1 - 0.5]
    expect(advantages_of(star([1, 0, 0, 1, 1]), backend, baseline="loo"), want)


@pytest.mark.parametrize("baseline", ["parent", "loo"])
@pytest.mark.parametrize("scale", ["none", "std"])
def test_equal_rewards_and_only_children_give_exactly_zero(backend, baseline, scale):
    for size in (1, 3, 7):  # 0.1 is no binary fraction: its mean must not be off by a rounding
        options = {"baseline": baseline, "scale": scale}
        assert advantages_of(star([0.1] * size), backend, **options).eq(0).all()


def test_a_counted_child_without_a_value_is_never_skipped(backend):
    # 3 has no value: so neither has 1, nor the root, although 2 has one.
    nodes = forest([-1, 0, 0, 1, 1], [NAN, NAN, 1, NAN, 1], [0, 1, 1, 1, 1])
    expect(tree_values(*nodes, backend=backend), [NAN, NAN, 1, NAN, 1])
    # Uncounted, it takes nothing away.
    nodes = forest([-1, 0, 0, 1, 1], [NAN, NAN, 1, NAN, 1], [0, 1, 1, 0, 1])
    expect(tree_values(*nodes, backend=backend), [1, 1, 1, NAN, 1])


@pytest.mark.parametrize("scale", ["none", "std"])
def test_nan_reaches_the_siblings_it_is_compared_with_and_no_others(backend, scale):
    nodes = forest([-1, 0, 0, -1, 3, 3], [NAN, NAN, 1, NAN, 1, 0], [0, 1, 1, 0, 1, 1])
    for baseline in ("parent", "loo"):
        got = advantages_of(nodes, backend, baseline=baseline, scale=scale)
        assert got.isnan().tolist() == [False, True, True, False, False, False]
        assert got[0] == 0 and got[3] == 0
    only_child = forest([-1, 0], [NAN, NAN], [0, 1])
    got = advantages_of(only_child, backend, baseline="loo", scale=scale)
    assert got.isnan().tolist() == [False, True]


def test_values_keep_fp64_between_levels(backend):
    # 0, 0 and 5/6: the fp32 mean of these, already rounded to fp32, is an ulp off 5/18.
    parent = [-1] + [0] * 3 + [1] * 6 + [2] * 6 + [3] * 6
    rewards = [NAN] * 4 + [0] * 12 + [1] * 5 + [0]
    values = tree_values(*forest(parent, rewards, [0] + [1] * 21), backend=backend)
    assert values[0] == torch.tensor(5 / 18, dtype=torch.float32)
    assert values[0] != (values[3].double() / 3).float()


def test_empty_forest(backend):
    parent, rewards, in_value = forest([], [], [])
    assert tree_values(parent, rewards, in_value, backend=backend).shape == (0,)
    counts, variances = tree_stats(parent, rewards, in_value, backend=backend)
    assert counts.shape == variances.shape == (0,)
    for scale in ("none", "std"):
        got = tree_advantages(parent, rewards, in_value, scale=scale, backend=backend)
        assert got.shape == (0,)


def test_views_with_strides(backend):
    parent, rewards, in_value = (t.repeat_interleave(2)[::2] for t in forest(*TREE))
    assert not parent.is_contiguous()
    values = tree_values(parent, rewards, in_value, backend=backend)
    expect(values, [0.75, 0.5, 1, 1, 0])
    assert tree_stats(parent, values, in_value, backend=backend)[0].tolist() == [2, 2, 0, 0, 0]
    strided = values.repeat_interleave(2)[::2]
    got = tree_advantages(parent, strided, in_value, scale="std", backend=backend)
    expect(got, [0, -1, 1, 1, -1])


def test_inputs_are_left_alone_and_no_gradient_comes_out(backend):
    parent, rewards, in_value = forest(*TREE)
    before = rewards.clone()
    rewards.requires_grad_()
    values = tree_values(parent, rewards, in_value, backend=backend)
    assert not values.requires_grad
    values.requires_grad_()
    for got in (
        tree_stats(parent, values, in_value, backend=backend)[1],
        tree_advantages(parent, values, in_value, backend=backend),
    ):
        assert not got.requires_grad
    torch.testing.assert_close(rewards.detach(), before, rtol=0, atol=0, equal_nan=True)


def test_fp64_runs_on_the_reference_and_keeps_its_input():
    parent, rewards, in_value = forest(*TREE, dtype=torch.float64)
    before = rewards.clone()
    values = tree_values(parent, rewards, in_value)
    assert values.dtype == torch.float64 and values.tolist() == [0.75, 0.5, 1, 1, 0]
    torch.testing.assert_close(rewards, before, rtol=0, atol=0, equal_nan=True)
    if not unavailable("tree", FAST):
        with pytest.raises(ValueError, match="float64 runs on the reference only"):
            tree_values(parent, rewards, in_value, backend=FAST)


@pytest.mark.parametrize(
    "parent, sentence",
    [
        ([-1, 1], r"parent\[1\]: expected -1 or the index of an earlier node, found 1"),
        ([1, -1], r"parent\[0\]: expected -1 or the index of an earlier node, found 1"),
        ([-1, 7], r"parent\[1\]: expected -1 or the index of an earlier node, found 7"),
        ([-1, -2], r"parent\[1\]: expected -1 or the index of an earlier node, found -2"),
        ([1, 0], r"parent\[0\]: expected -1 or the index of an earlier node, found 1"),
    ],
)
def test_malformed_parents(backend, parent, sentence):
    parent, values, in_value = forest(parent, [NAN, 1], [1, 1])
    with pytest.raises(ValueError, match=sentence):
        tree_values(parent, values, in_value, backend=backend)
    with pytest.raises(ValueError, match=sentence):
        tree_stats(parent, values, in_value, backend=backend)
    for baseline in ("parent", "loo"):
        with pytest.raises(ValueError, match=sentence):
            tree_advantages(parent, values, in_value, baseline=baseline, backend=backend)


def test_a_reward_above_counted_children_is_refused(backend):
    nodes = forest([-1, 0, 1], [NAN, 0.5, 1], [0, 1, 1])
    with pytest.raises(ValueError, match=r"rewards\[1\]: expected NaN, .* found 0.5"):
        tree_values(*nodes, backend=backend)
    uncounted = forest([-1, 0, 1], [NAN, 0.5, 1], [0, 1, 0])
    expect(tree_values(*uncounted, backend=backend), [0.5, 0.5, 1])


def test_loo_refuses_nodes_that_are_not_counted(backend):
    parent, values, in_value = forest([-1, 0, 0], [0.5, 1, 0], [0, 1, 0])
    with pytest.raises(ValueError, match=r"in_value\[2\]: expected True, .* found False"):
        tree_advantages(parent, values, in_value, baseline="loo", backend=backend)


def test_bad_arguments():
    parent, rewards, in_value = forest(*TREE)
    with pytest.raises(TypeError, match="parent: expected int32, found int64"):
        tree_values(parent.long(), rewards, in_value)
    with pytest.raises(TypeError, match="rewards: expected float32 or float64, found bfloat16"):
        tree_values(parent, rewards.bfloat16(), in_value)
    with pytest.raises(TypeError, match="in_value: expected bool, found int32"):
        tree_stats(parent, rewards, in_value.int())
    with pytest.raises(ValueError, match="in_value: expected 5 entries, found 4"):
        tree_values(parent, rewards, in_value[:4])
    with pytest.raises(ValueError, match=r"rewards: expected a 1-D tensor, found shape \(1, 5\)"):
        tree_values(parent, rewards[None], in_value)
    with pytest.raises(TypeError, match="rewards: expected a tensor, found list"):
        tree_values(parent, rewards.tolist(), in_value)
    with pytest.raises(ValueError, match="baseline: expected 'parent' or 'loo', found 'mean'"):
        tree_advantages(parent, rewards, in_value, baseline="mean")
    with pytest.raises(ValueError, match="scale: expected 'none' or 'std', found None"):
        tree_advantages(parent, rewards, in_value, scale=None)
    with pytest.raises(ValueError, match="eps: expected 0 or more, found -1"):
        tree_advantages(parent, rewards, in_value, eps=-1.0)


@st.composite
def forests(draw):
    """Forests from flat to deep; a node without counted children has a reward or is NaN."""
    size = draw(st.integers(0, 40))
    reach = draw(st.sampled_from([1, 2, 5, 40]))  # 1: paths; 40: anything, stars among it
    parent = [draw(st.integers(max(-1, n - reach), n - 1)) if n else -1 for n in range(size)]
    in_value = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    reward = st.floats(-4, 4, width=32) | st.sampled_from([0.0, 1.0]) | st.just(NAN)
    rewards = draw(st.lists(reward, min_size=size, max_size=size))
    for node, counted in enumerate(in_value):
        if counted and parent[node] >= 0:
            rewards[parent[node]] = NAN
    return parent, rewards, in_value


def children_of(parent, in_value, node):
    return [c for c, p in enumerate(parent) if p == node and in_value[c]]


def mean(numbers):  # math.fsum is exact, whatever the order
    return NAN if any(map(math.isnan, numbers)) else math.fsum(numbers) / len(numbers)


@settings(max_examples=examples(200), deadline=None)
@given(nodes=forests())
def test_random_forests_against_plain_python(backend, nodes):
    parent, rewards, in_value = nodes
    exact = list(rewards)
    for node in reversed(range(len(parent))):
        if children := children_of(parent, in_value, node):
            exact[node] = mean([exact[c] for c in children])
    tensors = forest(*nodes)
    values = tree_values(*tensors, backend=backend)
    expect(values, exact)

    given_values = values.tolist()
    groups = [
        [given_values[c] for c in children_of(parent, in_value, n)] for n in range(len(parent))
    ]
    means = [mean(g) if g else NAN for g in groups]
    variances = [
        mean([(v - m) ** 2 for v in g]) if g else NAN for g, m in zip(groups, means, strict=True)
    ]
    counts, got = tree_stats(tensors[0], values, tensors[2], backend=backend)
    assert counts.tolist() == [len(g) for g in groups]
    expect(got, variances)

    for scale in ("none", "std"):
        want = [
            0.0
            if p < 0
            else (v - given_values[p]) / (math.sqrt(variances[p]) + 1e-3 if scale == "std" else 1)
            for v, p in zip(given_values, parent, strict=True)
        ]
        got = tree_advantages(
            tensors[0], values, tensors[2], scale=scale, eps=1e-3, backend=backend
        )
        expect(got, want)


@settings(max_examples=examples(100), deadline=None)
@given(rewards=st.lists(st.floats(-4, 4, width=32), min_size=2, max_size=20))
def test_loo_is_the_group_advantage_stretched(backend, rewards):
    # r - mean(others) = (r - mean) * k / (k - 1).
    size = len(rewards)
    centre = math.fsum(rewards) / size
    want = [0] + [(r - centre) * size / (size - 1) for r in rewards]
    expect(advantages_of(star(rewards), backend, baseline="loo"), want)


def random_forest(size: int, reach: int, seed: int):
    """A large forest: a node hangs under one of the `reach` before it, one in 50 is a root."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    back = torch.randint(1, reach + 1, (size,), generator=generator)
    parent = (torch.arange(size) - back).clamp(min=-1)
    parent[torch.rand(size, generator=generator) < 0.02] = -1
    in_value = torch.rand(size, generator=generator) < 0.8
    inner = torch.zeros(size, dtype=torch.bool)
    inner[parent[in_value & (parent >= 0)]] = True
    rewards = torch.randint(0, 9, (size,), generator=generator) / 8
    return parent.int(), rewards.masked_fill(inner, NAN), in_value


@needs_fast(OP)
@pytest.mark.parametrize(
    "size, reach",
    [
        (530 if INTERPRETED else 700, 1),
        (600 if INTERPRETED else 2000, 30),  # two programs of lanes, or four
        *(
            pytest.param(*sizes, marks=slow_if_interpreted)
            for sizes in ((1_000_000, 1_000_000), (1_000_000, 30), (9999, 1))
        ),
    ],
)
def test_large_forests(size, reach):
    parent, rewards, in_value = random_forest(size, reach, seed=size + reach)
    values = tree_values(parent, rewards, in_value, backend=FAST)
    exact = tree_values(parent, rewards.double(), in_value)
    torch.testing.assert_close(
        values.double(), exact, rtol=ULP / 2 * 1.0001, atol=1e-30, equal_nan=True
    )
    assert values.isfinite().float().mean() > 0.9
    for got, want in zip(
        tree_stats(parent, values, in_value, backend=FAST),
        tree_stats(parent, values, in_value, backend="reference"),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=ULP, atol=1e-30, equal_nan=True)
    counted = in_value | (parent < 0)
    for options in ({"scale": "std"}, {"baseline": "loo", "scale": "std"}):
        flags = torch.ones_like(in_value) if "baseline" in options else counted
        got = tree_advantages(parent, values, flags, backend=FAST, **options)
        want = tree_advantages(parent, values, flags, backend="reference", **options)
        torch.testing.assert_close(got, want, rtol=ULP, atol=1e-30, equal_nan=True)


def test_opcheck(backend):
    parent, rewards, in_value = forest(*TREE)
    values = tree_values(parent, rewards, in_value, backend=backend)
    ops = torch.ops.spo_kernels
    torch.library.opcheck(ops.tree_values, (parent, rewards, in_value, backend))
    # opcheck compares outputs as if NaN were not itself; the test of torch.compile has the rest.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.tree_stats, (parent, values, in_value, backend), test_utils=utils)
    args = (parent, values, in_value, "loo", "std", 1e-8, backend)
    torch.library.opcheck(ops.tree_advantages, args)
    strided = tuple(t.repeat_interleave(2)[::2] for t in (parent, rewards, in_value))
    torch.library.opcheck(ops.tree_values, (*strided, backend))


def test_compile_without_graph_breaks(backend):
    def figures(parent, rewards, in_value):
        values = tree_values(parent, rewards, in_value, backend=backend)
        counts, variances = tree_stats(parent, values, in_value, backend=backend)
        advantages = tree_advantages(parent, values, in_value, scale="std", backend=backend)
        return counts + 0, variances + 0, advantages

    compiled = torch.compile(figures, fullgraph=True, dynamic=True, backend="aot_eager")
    counts, variances, advantages = compiled(*forest(*TREE))
    assert counts.tolist() == [2, 2, 0, 0, 0]
    expect(variances, [0.0625, 0.25, NAN, NAN, NAN])
    expect(advantages, [0, -1, 1, 1, -1])
