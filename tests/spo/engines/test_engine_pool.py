"""Several embedded engines as one, some of which are lost while a forest grows."""

import pytest
import torch
from sampling import canonical, drain, shaken, weights

from spo.engines.hf import HFEngine
from spo.engines.pool import EnginePool
from spo.grow.rollout import RolloutOptions
from spo.grow.shapes import TreeShape
from spo.grow.stream import grow
from spo.records import Prompt, Request, Sampling

PROMPTS = [Prompt((5, 9, 3 + i, 8)[: 3 + i % 2], 7, "arithmetic") for i in range(6)]
OPTIONS = RolloutOptions(Sampling(3, stop_token_ids=(1, 2)))
TREE = TreeShape((3, 2, 2), (3, 3), 16)


class Mortal(HFEngine):
    """Its connection is lost after a number of steps."""

    steps_left = 10**6

    def poll(self):
        self.steps_left -= 1
        if self.steps_left < 0:
            raise ConnectionError("no answer")
        return super().poll()


def pool_of(tiny_model, *lives):
    engines = [Mortal(tiny_model, max_num_seqs=8, num_cached=64) for _ in lives]
    for engine, steps in zip(engines, lives, strict=True):
        engine.steps_left = steps
    return EnginePool(engines)


def run(engine, grader):
    return grow(PROMPTS, engine, TREE, grader, str, OPTIONS)


def test_a_tree_stays_on_the_engine_that_caches_it(tiny_model, grader):
    pool = pool_of(tiny_model, 10**6, 10**6)
    seen = [set(), set()]
    for engine, prefixes in zip((m.engine for m in pool.members), seen, strict=True):
        submit = engine.submit
        engine.submit = lambda r, submit=submit, prefixes=prefixes: (
            prefixes.add(r.prefix_ids),
            submit(r),
        )
    forest, stats = run(pool, grader)
    plain, _ = run(HFEngine(tiny_model), grader)
    assert canonical(forest) == canonical(plain)
    assert stats.recomputed == 0
    roots = [{p for p in prefixes if p in {q.prompt_ids for q in PROMPTS}} for prefixes in seen]
    assert all(roots) and not roots[0] & roots[1]
    for prefixes, mine in zip(seen, roots, strict=True):
        for prefix in prefixes:
            assert any(prefix[: len(root)] == root for root in mine)


@pytest.mark.parametrize("steps", [0, 1, 4, 9])
def test_a_lost_engine_s_samples_are_repeated_elsewhere(tiny_model, grader, steps):
    pool = pool_of(tiny_model, steps, 10**6)
    forest, stats = run(pool, grader)
    plain, _ = run(HFEngine(tiny_model), grader)
    assert canonical(forest) == canonical(plain)
    assert stats.retried > 0 and stats.dropped_prompts == 0
    assert [member.lost for member in pool.members] == ["no answer", None]


def test_without_engines_the_rollout_stops(tiny_model, grader):
    with pytest.raises(RuntimeError, match="every engine of the pool is lost: no answer"):
        run(pool_of(tiny_model, 3, 5), grader)
    with pytest.raises(ValueError, match="at least one"):
        EnginePool([])


def test_every_engine_gets_new_weights(tiny_model):
    pool = pool_of(tiny_model, 10**6, 10**6)
    changed = shaken(tiny_model, 0.1)
    pool.load_weights(weights(changed), 3)
    assert pool.version == 3
    for key in (0, 1):
        pool.submit(Request(key, (5, 9 + key, 3), 8, 4, Sampling(1)))
    assert {c.first_version for c in drain(pool, 16)} == {3}
    for member in pool.members:
        assert member.engine.counters()["generated"] == 32  # both had work
        for name, parameter in member.engine.model.named_parameters():
            assert torch.equal(parameter, changed.get_parameter(name))
