"""Iterations that overlap: prompts of the next one fill the slots that this one leaves empty."""

import dataclasses

import pytest
import torch
from sampling import (
    canonical,
    check_first_tokens,
    drain,
    plain_logprobs,
    rewarded,
    shaken,
    weights,
)

from spo.engines.hf import HFEngine
from spo.engines.lanes import Lane
from spo.engines.pool import EnginePool
from spo.grow.rollout import Rollout, RolloutOptions
from spo.grow.shapes import TreeShape, star
from spo.grow.stream import Stream, grow, require_fitting
from spo.named import name_of
from spo.records import Prompt, Request, Sampling, concat
from spo.reward import FailedReward
from spo.tasks import get_task
from spo.tasks.grading import AGAIN, Grader

PROMPTS = [Prompt((5, 9, 3 + i), 7, "arithmetic") for i in range(12)]
OPTIONS = RolloutOptions(Sampling(3, stop_token_ids=(1, 2, 3, 4, 5, 6)))
TREE = TreeShape((3, 2, 2), (3, 3), 40)


@pytest.fixture
def engine(tiny_model):
    return HFEngine(tiny_model, max_num_seqs=16)


def overlapping(engine, grader, depth, after=lambda: None):
    stream = Stream(PROMPTS, 3, Rollout(engine, TREE, grader, rewarded, OPTIONS), depth)
    out = []
    for forest, stats in stream:
        out.append((forest, stats))
        after()
    return out


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_iterations_hold_their_own_prompts_and_the_same_trees(engine, grader, depth):
    grown = overlapping(engine, grader, depth)
    assert len(grown) == 4
    for iteration, (forest, stats) in enumerate(grown):
        mine = PROMPTS[3 * iteration : 3 * iteration + 3]
        assert list(forest.prompts) == mine and stats.trees == 3
        options = dataclasses.replace(OPTIONS, iteration=iteration)
        alone, _ = grow(mine, engine, TREE, grader, rewarded, options)
        assert canonical(forest) == canonical(alone)


def test_streaming_fills_the_engine(tiny_model, grader):
    share = {}
    for depth in (0, 1):
        engine = HFEngine(tiny_model, max_num_seqs=12)
        overlapping(engine, grader, depth)
        counted = engine.counters()
        share[depth] = counted["running"] / counted["steps"] / 12
    assert share[1] > 1.15 * share[0]
    assert share[1] > 0.75  # the last iteration's tail has nothing to fill it


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_ages_are_recorded_and_bounded(engine, grader, depth):
    def update():
        engine.load_weights(weights(engine.model), engine.version + 1)

    grown = overlapping(engine, grader, depth, update)
    for iteration, (forest, stats) in enumerate(grown):
        ages = iteration - forest.born[forest.parent >= 0]
        assert stats.max_age == int(ages.max()) <= min(depth, iteration)
        sizes = forest.cu_tokens.diff()[forest.parent >= 0]
        assert stats.mean_age == pytest.approx(float((ages * sizes).sum() / sizes.sum()))
    assert max(stats.max_age for _, stats in grown) == depth


def test_tokens_keep_the_logprobs_of_the_weights_that_sampled_them(
    engine, tiny_model, grader, plain
):
    models = [plain]

    def update():
        models.append(shaken(tiny_model, 0.05, seed=1 + len(models)))
        engine.load_weights(weights(models[-1]), engine.version + 1)

    checked = 0
    for forest, _ in overlapping(engine, grader, 1, update):
        for node in (forest.parent >= 0).nonzero()[:, 0].tolist():
            tokens = forest.tokens(node)
            prefix = forest.path_ids(node)[: -len(tokens)]
            found = forest.rollout_logprobs[forest.cu_tokens[node] : forest.cu_tokens[node + 1]]
            born, errors = int(forest.born[node]), []
            for model in models[born : born + 2]:  # an update may have come in its middle
                errors.append((found - plain_logprobs(model, prefix, tokens)).abs())
            assert float(torch.stack(errors).amin(0).max()) < 2e-5
            assert float(errors[0][0]) < 2e-5
            checked += born < len(models) - 1
    assert checked > 20


def test_lanes_see_their_own_samples_only(engine, grader):
    lane = Lane(engine)
    other = lane.new_lane()
    stream = Stream(PROMPTS, 3, Rollout(lane, TREE, grader, rewarded, OPTIONS), 1)
    first, _ = next(stream)
    assert len(engine.running) > 0  # the next iteration is under way
    other.submit(Request(0, (5, 9, 3), 2, 4, Sampling(1)))
    assert [(c.key, c.index) for c in drain(other, 2)] == [(0, 0), (0, 1)]
    evaluated, _ = grow(PROMPTS[:2], other, star(1, 12), grader, rewarded, OPTIONS)
    assert evaluated.num_nodes == 4
    second, _ = next(stream)
    options = dataclasses.replace(OPTIONS, iteration=1)
    alone, _ = grow(PROMPTS[3:6], HFEngine(engine.model.name_or_path), TREE, grader, rewarded,
                    options)  # fmt: skip
    assert canonical(second) == canonical(alone)


def test_token_frequencies_of_a_forest_are_those_of_independent_samples(tiny_model, grader, plain):
    """First tokens of the branches of one fixed prefix, in a tree and one by one."""
    engine = HFEngine(tiny_model, max_num_seqs=256, num_cached=64, min_shared=2)
    options = dataclasses.replace(OPTIONS, sampling=Sampling(3))
    shape = TreeShape((2, 1500), (4,), 6)
    forest, _ = grow(PROMPTS[:1], engine, shape, grader, rewarded, options)
    check_first_tokens(forest, plain, 1500)


def test_aborted_samples_leave_the_engine(engine, grader):
    pool = EnginePool([engine, HFEngine(engine.model.name_or_path, max_num_seqs=16)])
    lane = Lane(pool)
    next(Stream(PROMPTS, 3, Rollout(lane, TREE, grader, rewarded, OPTIONS), 1))
    assert pool.room < 32
    lane.abort()
    assert pool.room == 32 and lane.poll() == []
    anew, _ = grow(PROMPTS[:3], lane, TREE, grader, rewarded, OPTIONS)
    alone, _ = grow(PROMPTS[:3], engine, TREE, grader, rewarded, OPTIONS)
    assert canonical(anew) == canonical(alone)


def test_the_shape_may_change_between_prompts(engine, grader):
    """Trees under way keep theirs: a longer limit for the next ones does not reach them."""
    rollout = Rollout(engine, TREE, grader, rewarded, OPTIONS)
    stream = Stream(PROMPTS[:6], 3, rollout, 0)
    rollout.shape = star(2, 9)
    first, _ = next(stream)
    rollout.shape = TREE
    second, _ = next(stream)
    assert first.num_nodes == 3 + 3 * 2 and int(first.cu_tokens.diff()[1:].max()) <= 9
    options = dataclasses.replace(OPTIONS, iteration=1)
    alone, _ = grow(PROMPTS[3:6], engine, TREE, grader, rewarded, options)
    assert canonical(second) == canonical(alone)


LONG = Prompt((5,) * 120, 7, "arithmetic")


@pytest.mark.parametrize("depth", [0, 1])
def test_prompts_that_do_not_fit_are_left_out_and_counted(engine, grader, depth):
    """They keep their places, so that the other trees grow as beside prompts that fit."""
    mixed = [*PROMPTS[:2], LONG, LONG, *PROMPTS[4:6], LONG, LONG, LONG]
    options = dataclasses.replace(OPTIONS, told=set())  # what warns, warns once in a run
    stream = Stream(mixed, 3, Rollout(engine, TREE, grader, rewarded, options), depth)
    with pytest.warns(UserWarning, match="left out: they are longer than 88 tokens and exceed"):
        grown = list(stream)
    plain = list(Stream(PROMPTS[:6], 3, Rollout(engine, TREE, grader, rewarded, OPTIONS)))
    assert [stats.too_long for _, stats in grown] == [1, 1, 3]
    assert [(stats.trees, stats.dropped_prompts) for _, stats in grown] == [(2, 0), (2, 0), (0, 0)]
    for (forest, _), (other, _), kept in zip(grown, plain, ((0, 1), (1, 2)), strict=False):
        rows = [(kept.index(tree), *row) for tree, *row in canonical(other) if tree in kept]
        assert canonical(forest) == rows
    empty, first = grown[2][0], grown[0][0]
    assert empty.num_nodes == 0 and empty.prompts == ()
    for joined in (concat([empty, first]), concat([first, empty])):
        assert joined.prompts == first.prompts and canonical(joined) == canonical(first)
        assert joined.in_value.dtype == torch.bool == joined.trained.dtype
    stream = require_fitting([LONG, LONG, PROMPTS[0]], stream.rollout, 3)
    assert list(stream) == [LONG, LONG, PROMPTS[0]]
    with pytest.raises(ValueError, match="all of the first 2 prompts are .*max_new_tokens=40"):
        require_fitting([LONG, LONG, PROMPTS[0]], Rollout(engine, TREE, grader, str, OPTIONS), 2)


@pytest.mark.parametrize("world", [1, 2])
def test_further_trees_of_an_iteration_are_those_of_a_larger_one(engine, grader, world):
    """The seeds go on, each rank has its share, and the next iteration has the next prompts."""
    for rank in range(world):
        share = slice(rank, None, world)
        stream = Stream(
            PROMPTS, 3, Rollout(engine, TREE, grader, rewarded, OPTIONS), 0, rank, world
        )
        first, later = next(stream), [stream.more(1), stream.more(3)]
        prompts = [*PROMPTS[:3][share], *PROMPTS[3:4][share], *PROMPTS[4:7][share]]
        alone, cost = grow(prompts, engine, TREE, grader, rewarded, OPTIONS)
        joined = concat([forest for forest, _ in (first, *later)])
        assert list(joined.prompts) == prompts and canonical(joined) == canonical(alone)
        assert later[0][1].prompts == len(PROMPTS[3:4][share])
        tokens = sum(stats.generated_tokens for _, stats in (first, *later))
        assert tokens == cost.generated_tokens == alone.num_generated
        second, _ = next(stream)
        options = dataclasses.replace(OPTIONS, iteration=1)
        alone, _ = grow(PROMPTS[7:10][share], engine, TREE, grader, rewarded, options)
        assert canonical(second) == canonical(alone)
        last, _ = stream.more(9)
        assert list(last.prompts) == PROMPTS[10:][share] and stream.more(1) is None


def test_failed_gradings_are_counted_over_the_whole_iteration(engine, grader):
    """Of a wave all may fail, if not half of the iteration's."""
    bad = dataclasses.replace(PROMPTS[3], task="rows")  # which grades nothing
    options = dataclasses.replace(OPTIONS, truncated="reward")  # so that all are graded
    for good in (3, 1):
        prompts = [*PROMPTS[:good], bad, bad]
        stream = Stream(prompts, good, Rollout(engine, star(4, 9), grader, rewarded, options))
        first, _ = next(stream)
        assert len(first.prompts) == good
        if good == 3:
            forest, stats = stream.more(2)
            assert forest.prompts == () and stats.dropped_prompts == 2
        else:
            with pytest.raises(RuntimeError, match="8 of 12 gradings failed, .*: 8 × .*rows"):
                stream.more(2)


def test_answers_that_hung_before_stop_no_run(engine, tmp_path):
    """A policy that writes towers loses its rewards, not the run."""
    (tmp_path / "towers.py").write_text(
        "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass Towers:\n"
        "    def problems(self, split, seed):\n        yield from ()\n\n"
        "    def grade(self, text, answer):\n        while True:\n            pass\n"
    )
    task = get_task(f"{tmp_path}/towers.py:Towers")
    name = name_of("task", type(task))
    prompts = [dataclasses.replace(prompt, task=name) for prompt in PROMPTS[:3]]
    options = dataclasses.replace(OPTIONS, truncated="reward")
    with Grader({name: task}, timeout_s=0.5, workers=2) as grader:
        rollout = Rollout(engine, star(4, 9), grader, lambda ids: "\\boxed{9^{9^9}}", options)
        with pytest.warns(FailedReward, match=r"a response has no reward: timed out after 0.5 s"):
            forest, stats = next(Stream(prompts, 3, rollout))
    assert forest.prompts == () and stats.invalid_gradings == 12
    assert set(stats.invalid_reasons) == {AGAIN, "timed out after 0.5 s"}
    assert stats.untried_gradings == stats.invalid_reasons[AGAIN] >= 8


def test_bad_settings(engine, grader):
    rollout = Rollout(engine, TREE, grader, rewarded, OPTIONS)
    with pytest.raises(ValueError, match="stream_depth"):
        Stream(PROMPTS, 3, rollout, -1)
    assert list(Stream([], 3, rollout)) == []
