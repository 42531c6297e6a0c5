"""vLLM in this process: token ids in and out, exact weight updates, prefix caching.

One engine serves the whole file: it takes vLLM some ten seconds to start.
"""

import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM

from spo.engines.make import make_engine
from spo.grow.rollout import RolloutOptions
from spo.grow.shapes import TreeShape
from spo.grow.stream import grow
from spo.records import LENGTH, Prompt, Request
from spo.tasks.grading import Grader

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"
)
CONTEXT = 128


@pytest.fixture(scope="module")
def engine(tiny_model):
    built = make_engine("vllm", tiny_model, max_num_seqs=32, max_model_len=CONTEXT)
    yield built
    built.close()


@pytest.fixture(scope="module")
def plain(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def drain(engine, count):
    done = []
    while len(done) < count:
        done += engine.poll()
    return sorted(done, key=lambda c: (c.key, c.index))


def plain_logprobs(model, prefix, token_ids, temperature):
    ids = torch.tensor([[*prefix, *token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prefix) - 1 : -1].float() / temperature
    return torch.log_softmax(logits, -1).gather(-1, ids[0, len(prefix) :, None])[:, 0]


def worst_difference(engine, model, temperature=0.7, seed=5):
    prefix = tuple(2 + (7 * i) % 45 for i in range(16))
    engine.submit(Request(0, prefix, 8, 12, (1,), seed, temperature))
    return max(
        float((torch.tensor(c.logprobs) - plain_logprobs(model, prefix, c.token_ids, temperature))
        .abs().max())
        for c in drain(engine, 8)
    )  # fmt: skip


def test_logprobs_are_those_of_the_policy_at_the_sampling_temperature(engine, plain):
    assert worst_difference(engine, plain) < 1e-4


@pytest.mark.parametrize("part", ["embed_tokens", "norm", "q_proj", "o_proj", "down_proj", ""])
def test_a_weight_update_reaches_every_parameter(engine, plain, tiny_model, part):
    changed = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            if part in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    version = engine.version + 1
    engine.load_weights(((n, p.detach()) for n, p in changed.named_parameters()), version)
    assert worst_difference(engine, changed) < 1e-3
    assert worst_difference(engine, plain) > 1e-2  # so that the check above can fail
    engine.load_weights(((n, p.detach()) for n, p in plain.named_parameters()), version + 1)
    assert worst_difference(engine, plain) < 1e-4


def test_samples_in_flight_go_on_with_new_weights(engine, plain, tiny_model):
    torch.manual_seed(2)
    changed = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    before, version = engine.counters(), engine.version
    prefix = tuple(2 + (3 * i) % 45 for i in range(40))
    engine.submit(Request(0, prefix, 34, 8, (), 1))  # two more than run at once
    for _ in range(3):
        engine.poll()
    engine.load_weights(((n, p.detach()) for n, p in changed.named_parameters()), version + 1)
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
        old = plain_logprobs(plain, prefix, c.token_ids, 1.0)
        new = plain_logprobs(changed, prefix, c.token_ids, 1.0)
        sampled = torch.tensor(c.logprobs)
        switch = 3 if c.first_version == version else 0
        torch.testing.assert_close(sampled[:switch], old[:switch], atol=1e-4, rtol=0)
        torch.testing.assert_close(sampled[switch:], new[switch:], atol=1e-3, rtol=0)
    engine.load_weights(((n, p.detach()) for n, p in plain.named_parameters()), version + 2)
    assert worst_difference(engine, plain) < 1e-4


def test_full_blocks_of_a_prefix_are_computed_once(engine):
    engine.reset_prefix_cache()
    prefix = tuple(2 + (5 * i + 1) % 45 for i in range(65))  # two full blocks of 32 and one token
    before = engine.counters()
    engine.submit(Request(0, prefix, 1, 4, (), 1))
    drain(engine, 1)
    engine.submit(Request(1, prefix, 3, 4, (), 2))
    drain(engine, 3)
    after = engine.counters()
    assert after["prefill"] - before["prefill"] == 65 + 3
    assert after["cached"] - before["cached"] == 3 * 64
    engine.reuse_prefixes = False
    engine.submit(Request(2, prefix, 1, 4, (), 3))
    drain(engine, 1)
    engine.reuse_prefixes = True
    assert engine.counters()["prefill"] - after["prefill"] == 65


def test_seeds_repeat_and_stops_stop(engine):
    runs = []
    for _ in range(2):
        engine.submit(Request(0, (5, 9, 3), 4, 20, (7, 8, 9, 10, 11, 12), 3))
        runs.append([c.token_ids for c in drain(engine, 4)])
    assert runs[0] == runs[1] and len(set(runs[0])) > 1
    for ids in runs[0]:
        assert len(ids) == 20 or ids[-1] in (7, 8, 9, 10, 11, 12)
        assert not set(ids[:-1]) & {7, 8, 9, 10, 11, 12}


def test_only_the_request_s_tokens_stop(engine):
    engine.submit(Request(0, (5, 9, 3), 24, 60, (), 3, 2.0))  # the model's own EOS is 1
    done = drain(engine, 24)
    assert any(1 in c.token_ids for c in done)
    assert all(c.finish == LENGTH and len(c.token_ids) == 60 for c in done)


def test_aborted_samples_leave_the_engine(engine, plain):
    engine.submit(Request(0, (5, 9, 3), 40, 60, (), 1))  # some of them wait for a place
    engine.poll()
    engine.abort()
    assert engine.room == 32 and engine.poll() == []
    assert worst_difference(engine, plain) < 1e-4


def test_a_forest_s_ids_are_what_vllm_sampled(engine):
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
    with Grader() as grader:
        options = RolloutOptions(stop_token_ids=(1,), seed=4)
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
        engine.submit(Request(0, tuple([5] * 120), 1, 20, (), 0))


def test_token_frequencies_of_a_forest_are_those_of_independent_samples(engine, plain):
    """First tokens of many branches of one cached prefix, and their logprobs."""
    prompt = Prompt(tuple(2 + (7 * i) % 45 for i in range(33)), 7, "arithmetic")
    shape = TreeShape((2, 1500), (32,), 34)  # two full blocks of each branch's prefix are cached
    with Grader() as grader:
        forest, stats = grow([prompt], engine, shape, grader, str, RolloutOptions((), seed=6))
    assert stats.engine["prefill"] == stats.prefill_bound < 3000 * 2 + 100
    for parent in (forest.parent == 0).nonzero()[:, 0].tolist():
        children = (forest.parent == parent).nonzero()[:, 0].tolist()
        with torch.no_grad():
            logits = plain(torch.tensor([forest.path_ids(parent)])).logits[0, -1].float()
        logprobs, counts = logits.log_softmax(-1), torch.zeros(logits.numel())
        for child in children:
            (token, *_), start = forest.tokens(child), int(forest.cu_tokens[child])
            counts[token] += 1
            assert abs(float(forest.rollout_logprobs[start] - logprobs[token])) < 1e-4
        expected = 1500 * logprobs.double().exp()
        likely = expected > 1.5  # chi-square needs expected counts of a few
        chi2 = float(((counts - expected) ** 2 / expected)[likely].sum())
        freedom = int(likely.sum())
        assert len(children) == 1500 and chi2 < freedom + 5 * (2 * freedom) ** 0.5


def test_a_forest_larger_than_the_cache_pays_for_eviction(engine):
    """The same trees with every block of the cache and with a fraction of them."""
    prompts = [
        Prompt(tuple(2 + (i + 5 * j) % 45 for j in range(33)), 7, "arithmetic") for i in range(6)
    ]
    shape = TreeShape((4, 3), (32,), 80, align=32)
    pool = engine.engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    paid = {}
    with Grader() as grader:
        options = RolloutOptions(stop_token_ids=(1,), seed=4)
        for free in (None, 40):
            engine.reset_prefix_cache()
            held = [] if free is None else pool.get_new_blocks(pool.get_num_free_blocks() - free)
            forest, stats = grow(prompts, engine, shape, grader, str, options)
            pool.free_blocks(held)
            assert stats.trees == 6
            paid[free] = stats
    assert paid[None].recomputed == 0 and paid[None].engine["preempted"] == 0
    assert paid[40].recomputed > 0
    assert paid[40].engine["prefill"] == paid[40].prefill_bound + paid[40].recomputed


class Recorder:
    """Stands in for vLLM's engine, whose sleep needs a GPU."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            kwargs.pop("kwargs", None)
            self.calls.append((name, *args, *kwargs.values()))
            return True

        return call


def test_a_sleeping_engine_wakes_for_new_weights(engine):
    from spo.engines.vllm import VLLMEngine

    asleep = object.__new__(VLLMEngine)
    asleep.engine, asleep._requests, asleep.version = Recorder(), {}, 0
    asleep.sleep_mode, asleep._asleep, asleep._on_cpu = True, False, False
    asleep.sleep()
    asleep.sleep()  # once is enough
    asleep.load_weights([], 1)
    assert asleep.engine.calls == [
        ("reset_prefix_cache", True),  # samples in flight would be lost with their blocks
        ("sleep", 2, "keep"),
        ("wake_up", ["weights"]),  # before anything is written to them
        ("collective_rpc", "reload_weights"),
        ("wake_up", ["kv_cache"]),  # after the update, which needs the room
        ("reset_prefix_cache", True),
    ]
    asleep.engine.calls.clear()
    asleep.load_weights([], 2)
    assert [name for name, *_ in asleep.engine.calls] == ["collective_rpc", "reset_prefix_cache"]


def test_sleep_mode_needs_a_gpu(tiny_model):
    with pytest.raises(ValueError, match="sleep_mode"):
        make_engine("vllm", tiny_model, sleep_mode=True)
