"""vLLM in this process: token ids in and out, exact weight updates, prefix caching.

One engine serves the whole file: it takes vLLM some ten seconds to start.
"""

import importlib.util

import pytest
import torch
from limits import check_limited, favouring
from sampling import (
    check_first_tokens,
    check_seeds_and_stops,
    check_truncated,
    check_truncated_seeds,
    check_update_reaches,
    drain,
    plain_logprobs,
    policy,
    shaken,
    spent_on_a_shared_prefix,
    weights,
    worst_difference,
)
from sentences import one_sentence

from spo.config.engine import TAKEN
from spo.engines.make import make_engine
from spo.engines.vllm import VLLMEngine
from spo.grow.rollout import RolloutOptions
from spo.grow.shapes import TreeShape
from spo.grow.stream import grow
from spo.records import LENGTH, Prompt, Request, Sampling

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"
)
CONTEXT = 128


@pytest.fixture(scope="module")
def engine(tiny_model):
    options = {"max_num_batched_tokens": 4096, "kv_cache_memory_bytes": 1 << 28}
    limits = {"max_num_seqs": 32, "max_model_len": CONTEXT}
    built = make_engine("vllm", tiny_model, **limits, options=options)
    yield built
    built.close()


def test_logprobs_are_those_of_the_policy_at_the_sampling_temperature(engine, plain):
    assert worst_difference(engine, plain) < 1e-4


@pytest.mark.parametrize("part", ["embed_tokens", "norm", "q_proj", "o_proj", "down_proj", ""])
def test_a_weight_update_reaches_every_parameter(engine, plain, tiny_model, part):
    check_update_reaches(engine, plain, shaken(tiny_model, 0.2, part=part))


def test_samples_in_flight_go_on_with_new_weights(engine, plain, tiny_model):
    changed = shaken(tiny_model, 0.2, seed=2)
    before, version = engine.counters(), engine.version
    prefix = tuple(2 + (3 * i) % 45 for i in range(40))
    engine.submit(Request(0, prefix, 34, 8, Sampling(1)))  # two more than run at once
    for _ in range(3):
        engine.poll()
    engine.load_weights(weights(changed), version + 1)
    done = drain(engine, 34)
    after = engine.counters()
    assert after["preempted"] - before["preempted"] == 32
    # Nothing old is left: the 42 tokens of the prefix and of each sample are computed again, but
    # for the full block of 32 that the samples share.
    assert after["prefill"] - before["prefill"] >= 40 + 31 * 8 + 42 + 31 * 10
    assert {(c.first_version, c.last_version) for c in done} == {
        (version, version + 1),
        (version + 1, version + 1),
    }
    for c in done:
        old = plain_logprobs(plain, prefix, c.token_ids)
        new = plain_logprobs(changed, prefix, c.token_ids)
        sampled = torch.tensor(c.logprobs)
        switch = 3 if c.first_version == version else 0
        torch.testing.assert_close(sampled[:switch], old[:switch], atol=1e-4, rtol=0)
        torch.testing.assert_close(sampled[switch:], new[switch:], atol=1e-3, rtol=0)
    engine.load_weights(weights(plain), version + 2)
    assert worst_difference(engine, plain) < 1e-4


def test_full_blocks_of_a_prefix_are_computed_once(engine):
    engine.reset_prefix_cache()
    spent = spent_on_a_shared_prefix(engine)
    assert spent["prefill"] == 65 + 3 and spent["cached"] == 3 * 64
    engine.reuse_prefixes = False
    assert spent_on_a_shared_prefix(engine)["prefill"] == 4 * 65
    engine.reuse_prefixes = True


def test_seeds_repeat_and_stops_stop(engine):
    check_seeds_and_stops(engine)


def test_truncated_samples_have_the_distribution_that_is_left(engine, plain):
    check_truncated_seeds(engine)
    check_truncated(engine, plain)


def test_ids_beyond_the_tokenizer_are_never_sampled(engine, plain, tiny_model):
    strong = favouring(policy(tiny_model), 40)
    engine.load_weights(weights(strong), engine.version + 1)
    engine.submit(Request(0, (5, 9, 3), 8, 12, Sampling(5)))
    assert any(token >= 40 for c in drain(engine, 8) for token in c.token_ids)
    check_limited(engine, strong, 40)
    engine.submit(Request(0, (5, 9, 3), 1, 12, Sampling(5, vocab_size=40)))
    with pytest.raises(ValueError, match="vocab_size=40, that of the 1 samples in flight, found"):
        engine.submit(Request(1, (5, 9, 3), 1, 12, Sampling(5)))
    drain(engine, 1)
    engine.load_weights(weights(plain), engine.version + 1)


def test_only_the_request_s_tokens_stop(engine):
    engine.submit(Request(0, (5, 9, 3), 24, 60, Sampling(3, 2.0)))  # the model's own EOS is 1
    done = drain(engine, 24)
    assert any(1 in c.token_ids for c in done)
    assert all(c.finish == LENGTH and len(c.token_ids) == 60 for c in done)


def test_aborted_samples_leave_the_engine(engine, plain):
    engine.submit(Request(0, (5, 9, 3), 40, 60, Sampling(1)))  # some of them wait for a place
    engine.poll()
    engine.abort()
    assert engine.room == 32 and engine.poll() == []
    assert worst_difference(engine, plain) < 1e-4


def test_a_forest_s_ids_are_what_vllm_sampled(engine, grader):
    seen = []
    poll = engine.poll

    def recording():
        done = poll()
        seen.extend(done)
        return done

    engine.poll = recording
    prompts = [
        Prompt(tuple(2 + (i + 3 * j) % 45 for j in range(33)), 7, "arithmetic") for i in (0, 1)
    ]
    shape = TreeShape((3, 2), (32,), 48)
    options = RolloutOptions(Sampling(4, stop_token_ids=(1,)))
    forest, stats = grow(prompts, engine, shape, grader, str, options)
    engine.poll = poll
    nodes = [n for n in range(forest.num_nodes) if forest.parent[n] >= 0]
    assert sorted(tuple(forest.tokens(n)) for n in nodes) == sorted(c.token_ids for c in seen)
    assert stats.engine["generated"] == forest.num_generated
    assert (forest.finish[forest.rewards.isnan() & (forest.parent >= 0)] != LENGTH).all()
    assert stats.engine["cached"] > 0
    assert stats.engine["prefill"] == stats.prefill_bound  # nothing was evicted


def test_a_request_beyond_the_context_is_refused(engine):
    with pytest.raises(ValueError, match=f"exceeds the context of {CONTEXT}"):
        engine.submit(Request(0, tuple([5] * 120), 1, 20, Sampling(0)))


def test_token_frequencies_of_a_forest_are_those_of_independent_samples(engine, plain, grader):
    """First tokens of many branches of one cached prefix, and their logprobs."""
    prompt = Prompt(tuple(2 + (7 * i) % 45 for i in range(33)), 7, "arithmetic")
    shape = TreeShape((2, 1500), (32,), 34)  # two full blocks of each branch's prefix are cached
    forest, stats = grow([prompt], engine, shape, grader, str, RolloutOptions(Sampling(6)))
    assert stats.engine["prefill"] == stats.prefill_bound < 3000 * 2 + 100
    check_first_tokens(forest, plain, 1500)


def test_a_forest_larger_than_the_cache_pays_for_eviction(engine, grader):
    """The same trees with every block of the cache and with a fraction of them."""
    prompts = [
        Prompt(tuple(2 + (i + 5 * j) % 45 for j in range(33)), 7, "arithmetic") for i in range(6)
    ]
    shape = TreeShape((4, 3), (32,), 80, align=32)
    pool = engine.engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    options, paid = RolloutOptions(Sampling(4, stop_token_ids=(1,))), {}
    for free in (None, 40):
        engine.reset_prefix_cache()
        held = [] if free is None else pool.get_new_blocks(pool.get_num_free_blocks() - free)
        _, paid[free] = grow(prompts, engine, shape, grader, str, options)
        pool.free_blocks(held)
        assert paid[free].trees == 6
    assert paid[None].recomputed == 0 and paid[None].engine["preempted"] == 0
    assert paid[40].recomputed > 0
    assert paid[40].engine["prefill"] == paid[40].prefill_bound + paid[40].recomputed


class Card:
    """Stands in for vLLM's engine, whose sleep needs a GPU: what the card holds, what is lost."""

    def __init__(self):
        self.awake, self.weights, self.cached = {"weights", "kv_cache"}, "start", True

    def reset_prefix_cache(self, reset_running_requests):
        assert "kv_cache" in self.awake and reset_running_requests
        self.cached = False
        return True

    def sleep(self, level, mode):
        assert not self.cached, "samples in flight are lost with their blocks"
        assert self.awake and level == 2 and mode == "keep"
        self.awake, self.weights = set(), None

    def wake_up(self, tags):
        assert "kv_cache" not in tags or self.weights is not None, "the update needs the room"
        self.awake |= set(tags)

    def collective_rpc(self, name, kwargs):
        assert name == "reload_weights" and "weights" in self.awake
        self.weights, self.cached = dict(kwargs["weights_iterator"]), True  # by stale weights


def test_a_sleeping_engine_wakes_for_new_weights():
    sleeper, card = object.__new__(VLLMEngine), Card()
    sleeper.engine, sleeper._requests, sleeper.version = card, {}, 0
    sleeper.sleep_mode, sleeper._asleep, sleeper._on_cpu = True, False, False
    for version in (1, 2):
        sleeper.sleep()
        sleeper.sleep()  # once is enough
        assert card.awake == set()
        sleeper.load_weights([("w", version)], version)
        assert card.awake == {"weights", "kv_cache"} and not card.cached
        assert card.weights == {"w": version} and sleeper.version == version
    sleeper.load_weights([("w", 3)], 3)  # awake
    assert card.weights == {"w": 3} and not card.cached


def test_options_reach_vllm(engine, tiny_model, monkeypatch):
    """The engine of this file has some."""
    config = engine.engine.vllm_config
    assert config.scheduler_config.max_num_batched_tokens == 4096
    assert config.cache_config.kv_cache_memory_bytes == 1 << 28
    given = []
    monkeypatch.setattr("vllm.EngineArgs.__post_init__", lambda self: given.append(vars(self)))
    monkeypatch.setattr("spo.engines.vllm.build_apart", lambda build, arguments: 1 / 0)
    with pytest.raises(ValueError, match=r"with engine.options=.*'quantization'.*\(division"):
        make_engine("vllm", tiny_model, options={"quantization": "fp8"})
    assert given[0]["quantization"] == "fp8" and given[0]["model"] == tiny_model
    assert set(TAKEN) <= set(given[0])


def test_an_unknown_option_is_one_sentence(tiny_model):
    with one_sentence(["engine.options", "'tensor_paralel_size'", "tensor_parallel_size"]):
        make_engine("vllm", tiny_model, options={"tensor_paralel_size": 2})


def test_sleep_mode_needs_a_gpu(tiny_model):
    with pytest.raises(ValueError, match="sleep_mode"):
        make_engine("vllm", tiny_model, sleep_mode=True)
