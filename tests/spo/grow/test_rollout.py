"""Forests grown by the real embedded engine and the real grader on the tiny policy."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from sampling import canonical, rewarded

from spo.engines.hf import HFEngine
from spo.grow.chain import ChainShape, cutpoint_partition
from spo.grow.rollout import Rollout, RolloutOptions, path_seed
from spo.grow.shapes import TreeShape, star
from spo.grow.stream import Stream, grow
from spo.records import FOREST_FORMAT, LENGTH, PROMPT, SEGMENT, STOP, Forest, Prompt, Sampling

PROMPTS = [Prompt((5, 9, 3 + i), 7, "arithmetic") for i in range(5)]
OPTIONS = RolloutOptions(Sampling(3, stop_token_ids=(1, 2, 3, 4, 5, 6)))


@pytest.fixture
def engine(tiny_model):
    return HFEngine(tiny_model, max_num_seqs=16)


def run(engine, grader, shape, options=OPTIONS, prompts=PROMPTS, text=rewarded):
    return grow(prompts, engine, shape, grader, text, options)


TREE = TreeShape((3, 2, 2), (3, 3), 12)


def test_forest_holds_what_the_engine_sampled(engine, grader):
    seen = []
    poll = engine.poll
    engine.poll = lambda: seen.extend(done := poll()) or done
    forest, stats = run(engine, grader, TREE)
    pieces = sorted(tuple(c.token_ids) for c in seen)
    nodes = [n for n in range(forest.num_nodes) if forest.parent[n] >= 0]
    assert sorted(tuple(forest.tokens(n)) for n in nodes) == pieces
    sampled = sorted((c.token_ids, c.logprobs) for c in seen)
    kept = sorted(
        (
            tuple(forest.tokens(n)),
            tuple(forest.rollout_logprobs[forest.cu_tokens[n] : forest.cu_tokens[n + 1]].tolist()),
        )
        for n in nodes
    )
    for (ids, logprobs), (other, stored) in zip(sampled, kept, strict=True):
        assert ids == other and stored == pytest.approx(logprobs, abs=1e-6)
    assert stats.trees == 5 and stats.engine["generated"] == forest.num_generated
    for tree, prompt in enumerate(PROMPTS):
        root = int((forest.prompt == tree).nonzero()[0])
        assert tuple(forest.tokens(root)) == prompt.prompt_ids


def test_tree_structure_and_rewards(engine, grader):
    forest, stats = run(engine, grader, TREE)
    children = torch.bincount(forest.parent[forest.parent >= 0].long(), minlength=forest.num_nodes)
    assert set(children[forest.finish == PROMPT].tolist()) == {3}
    assert set(children[forest.finish == SEGMENT].tolist()) == {2}
    leaf = (forest.finish == STOP) | (forest.finish == LENGTH)
    assert (children[leaf] == 0).all() and not forest.rewards[leaf].isnan().any()
    assert forest.rewards[~leaf].isnan().all()
    assert (forest.parent < torch.arange(forest.num_nodes)).all()
    for n in leaf.nonzero()[:, 0].tolist():
        response = forest.path_ids(n)[3:]
        expected = float(response[0] % 2 == 0) if forest.finish[n] == STOP else 0.0
        assert float(forest.rewards[n]) == expected
    assert int((forest.finish == LENGTH).sum()) == stats.truncated


@pytest.mark.parametrize("shape", [TREE, star(4, 12)], ids=["tree", "star"])
def test_same_seed_same_forest(tiny_model, grader, shape):
    first, _ = run(HFEngine(tiny_model, max_num_seqs=16), grader, shape)
    second, _ = run(HFEngine(tiny_model, max_num_seqs=16), grader, shape)
    assert first == second
    other, _ = run(HFEngine(tiny_model), grader, shape, dataclasses.replace(OPTIONS, iteration=1))
    assert canonical(other) != canonical(first)


def test_barriers_change_the_order_and_nothing_else(tiny_model, grader):
    grown = {}
    for barrier in ("none", "group", "level"):
        engine = HFEngine(tiny_model, max_num_seqs=7)
        options = dataclasses.replace(OPTIONS, barrier=barrier)
        forest, stats = run(engine, grader, TREE, options)
        grown[barrier] = canonical(forest)
    assert grown["none"] == grown["group"] == grown["level"]


def test_chain(engine, grader):
    shape = ChainShape(4, 3, cutpoint_partition(0.9, 2), 12)
    forest, _ = run(engine, grader, shape)
    trunk, probes = forest.trained, forest.in_value
    assert not (trunk & probes).any()
    inner = trunk & (forest.finish == SEGMENT)
    counts = torch.bincount(forest.parent[probes].long(), minlength=forest.num_nodes)
    assert inner.any() and set(counts[inner].tolist()) == {3}
    assert counts[~inner].sum() == 0
    ends = trunk & (forest.finish != SEGMENT)
    for tree in range(5):
        assert int(forest.weight[ends & (forest.prompt == tree)].sum()) == 4
    prefixes = [tuple(forest.path_ids(n)) for n in inner.nonzero()[:, 0].tolist()]
    keys = list(zip(forest.prompt[inner].tolist(), prefixes, strict=True))
    assert len(set(keys)) == len(keys)  # equal boundaries are probed once


def test_trees_are_yielded_as_they_finish(engine, grader):
    stream = Stream(PROMPTS, 5, Rollout(engine, TREE, grader, rewarded, OPTIONS))
    left = []
    for _ in stream.trees():
        left.append(len(engine.running) + len(engine.waiting))
    assert left[0] > 0 and left[-1] == 0


def test_costs_are_counted(engine, grader):
    _, stats = run(engine, grader, TREE)
    assert stats.recomputed == 0  # every prefix was computed once
    assert stats.engine["prefill"] == stats.prefill_bound
    assert 0 < stats.engine["step_seconds"] < stats.seconds
    assert 0 < stats.loop_seconds <= stats.seconds
    small = HFEngine(engine.model.name_or_path, max_num_seqs=4, num_cached=1)
    _, stats = run(small, grader, TREE)
    assert stats.recomputed > 0  # parents were forgotten before their children came


class Failing(HFEngine):
    """Fails chosen samples of chosen requests, a given number of times."""

    def fail(self, name, times):
        self.failures = {name: times}

    def poll(self):
        out = []
        for done in super().poll():
            name = done.index
            if self.failures.get(name, 0) and len(done.token_ids) == 3:
                self.failures[name] -= 1
                done = dataclasses.replace(done, token_ids=(), logprobs=(), error="injected")
            out.append(done)
        return out


def test_a_failed_sample_is_repeated_with_its_seed(tiny_model, grader):
    plain, _ = run(HFEngine(tiny_model, max_num_seqs=16), grader, TREE)
    engine = Failing(tiny_model, max_num_seqs=16)
    engine.fail(2, 1)
    repaired, stats = run(engine, grader, TREE)
    assert stats.retried == 1 and stats.dropped_prompts == 0
    assert canonical(repaired) == canonical(plain)


def test_a_prompt_that_keeps_failing_is_dropped_whole(tiny_model, grader):
    engine = Failing(tiny_model, max_num_seqs=16)
    engine.fail(0, 10**6)
    options = dataclasses.replace(OPTIONS, sampling=Sampling(3, stop_token_ids=(1,)))
    with pytest.raises(RuntimeError, match="all 5 prompts were dropped"):
        run(engine, grader, TREE, options)


def test_settling_waits_for_a_grader_that_is_late(engine, grader):
    """Its verdicts come when all samples have ended; the trees are those of a prompt grader."""

    class Late:
        late = True

        def __getattr__(self, name):
            return getattr(grader, name)

        def poll(self, timeout_s=0.0):
            return [] if self.late else grader.poll(timeout_s)

    late = Late()
    rollout = Rollout(engine, TREE, late, rewarded, OPTIONS)
    trees = [rollout.admit(prompt, i, 0) for i, prompt in enumerate(PROMPTS)]
    while engine.room < 16:
        assert rollout.step() == []
    late.late = False
    ended = rollout.settle()
    assert sorted(tree.serial for tree in ended) == [tree.serial for tree in trees]
    assert rollout.settle() == []
    stats = rollout.take_stats()
    assert stats.trees == 5 <= stats.gradings and stats.invalid_gradings == 0


def test_truncated(tiny_model, grader):
    options = dataclasses.replace(OPTIONS, sampling=Sampling(3, stop_token_ids=(2, 3, 4, 5, 6)))
    rewards = {}
    for rule in ("zero", "penalty", "drop"):
        engine = HFEngine(tiny_model, max_num_seqs=16)
        grown, stats = run(engine, grader, TREE, dataclasses.replace(options, truncated=rule))
        cut = grown.finish == LENGTH
        assert stats.truncated > 0
        rewards[rule] = grown.rewards[cut]
        if rule == "drop":
            assert not grown.trained[cut].any() and not grown.in_value[cut].any()
            sole = grown.finish == SEGMENT
            for n in sole.nonzero()[:, 0].tolist():
                below = grown.in_value[grown.parent == n].any()
                assert bool(grown.in_value[n]) == bool(below)
    assert (rewards["zero"] == 0).all() and (rewards["penalty"] == -1).all()
    assert rewards["drop"].isnan().all()


def test_bad_input(engine, grader):
    long = [Prompt(tuple([5] * 120), 7, "arithmetic")]
    with pytest.raises(ValueError, match="all of the first 1 prompts are longer than 116 tok"):
        run(engine, grader, TREE, prompts=long)
    with pytest.raises(ValueError, match="task: expected one of .* found 'no such task'"):
        run(engine, grader, star(4, 12), prompts=[Prompt((5, 9, 3), 7, "no such task")])
    with pytest.raises(ValueError, match="expected at least one"):
        run(engine, grader, TREE, prompts=[])
    with pytest.raises(ValueError, match="barrier"):
        run(engine, grader, TREE, dataclasses.replace(OPTIONS, barrier="all"))


def test_path_seeds_are_apart():
    seeds = {
        path_seed(s, i, p, path)
        for s in range(3)
        for i in range(3)
        for p in range(5)
        for path in [(), (0,), (1,), (0, 0), (0, 1), (1, 0)]
    }
    assert len(seeds) == 3 * 3 * 5 * 6 and all(0 <= s < 2**62 for s in seeds)


def test_forest_file_round_trip(engine, grader, tmp_path):
    forest, _ = run(engine, grader, TREE)
    forest.save(tmp_path / "f.safetensors")
    assert Forest.load(tmp_path / "f.safetensors") == forest
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"bad\.safetensors"):
        Forest.load(tmp_path / "bad.safetensors")
    tensors = load_file(tmp_path / "f.safetensors")
    for header in ("[]", "{", '{"format": 2}', json.dumps({"format": FOREST_FORMAT})):
        save_file(tensors, tmp_path / "odd.safetensors", metadata={"spo": header})
        with pytest.raises(ValueError, match=r"odd\.safetensors is not a forest file"):
            Forest.load(tmp_path / "odd.safetensors")
