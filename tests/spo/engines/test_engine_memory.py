"""The embedded engine's memory: it grows with what is asked for, and says so where it cannot."""

from pathlib import Path

import pytest
import torch
from sampling import drain

from spo.engines.attention_calls import AttentionCall
from spo.engines.hf import HFEngine
from spo.engines.slots import Slots
from spo.records import Request, Sampling


def grow(engine, after=lambda: None):
    """Longer and longer branches, each of what was sampled before; every sample."""
    out, prefix = [], (5, 9, 3, 8)
    for level in range(5):
        for key in range(6):
            engine.submit(Request(key, (*prefix, 7 + key), 2, 20, Sampling(100 * level + key)))
        done = drain(engine, 12)
        out += [(c.token_ids, c.logprobs) for c in done]
        prefix = (*prefix, 7, *done[0].token_ids)
        after()
    return out


@pytest.mark.parametrize("min_shared", [3, None])
def test_slots_that_grow_hold_what_large_ones_do_bit_for_bit(tiny_model, min_shared):
    options = {"max_num_seqs": 5, "num_cached": 90, "min_shared": min_shared}
    small, large = HFEngine(tiny_model, **options), HFEngine(tiny_model, **options)
    large.slots.reserve(128)
    while large.slots._add_cached():
        pass
    sizes = []
    grown = grow(small, lambda: sizes.append((len(small.slots.chains), small.slots.length)))
    assert grown == grow(large)
    assert sizes[0] == (21, 64) and sizes[-1] == (84, 125)
    assert large.slots.kv[0].shape[1] == 95 and large.slots.length == 128
    same = set(small.counters()) - {"step_seconds"}
    assert {k: small.counters()[k] for k in same} == {k: large.counters()[k] for k in same}


def test_a_tree_s_first_request_makes_slots_that_hold_its_longest_response(tiny_model):
    engine = HFEngine(tiny_model, response_len=90)
    engine.submit(Request(0, (5, 9, 3), 1, 8, Sampling(0), prompt_size=3))
    assert engine.slots.length == 93
    length = HFEngine(tiny_model, response_len=40).slots.length
    assert length == 64  # at first


def test_memory_that_lacks_is_named_with_what_lowers_the_need():
    layer = AttentionCall((8, 128, torch.float32), (8, 128, torch.float32))
    slots = Slots([layer] * 32, 4, 0, 10**9, min_shared=None, device="cpu")
    with pytest.raises(ValueError, match="engine.max_num_seqs: 4 slots for 100000000 tokens need "
                       r"1.05e\+05 GB of memory, and .* GB are free; lower engine.max_num_seqs "
                       r"\(now 4\), engine.max_model_len or sampling.max_new_tokens"):  # fmt: skip
        slots.reserve(10**8)
    slots.reserve(100)  # it goes on
    assert slots.length == 100


def test_slots_take_memory_when_they_are_written(tiny_model):
    def resident():
        return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

    before = resident()
    layer = AttentionCall((8, 128, torch.bfloat16), (8, 128, torch.bfloat16))
    slots = Slots([layer] * 32, 128, 256, 1 << 20, min_shared=256, device="cpu")
    slots.reserve(500)
    assert sum(kv.nbytes for kv in slots.kv) > 5e9
    slots.kv[0][:, 3] = 1
    assert 0 <= resident() - before < 1e9
    assert all(kv.data_ptr() % 64 == 0 and not kv[:, :2].any() for kv in slots.kv)


def test_a_sleeping_engine_holds_no_cache_and_goes_on_where_it_was(tiny_model):
    """Two samples are in flight when it sleeps; the same weights come back, and then others."""
    awake, sleeper = (HFEngine(tiny_model, sleep_mode=mode) for mode in (False, True))
    weights = {name: x.clone() for name, x in awake.model.named_parameters()}
    for version, change in ((1, 1.0), (2, 1.5)):
        samples = []
        for engine in (awake, sleeper):
            engine.submit(Request(0, (5, 9, 3, 8), 2, 70, Sampling(version)))
            for _ in range(3):
                assert engine.poll() == []
            engine.sleep()
            engine.sleep()  # it sleeps already
            assert (sum(x.nbytes for x in engine.slots.kv) == 0) == (engine is sleeper)
            engine.load_weights([(name, change * x) for name, x in weights.items()], version)
            engine.submit(Request(1, (5, 9, 3, 8, 7), 2, 20, Sampling(3)))
            samples.append([(c.token_ids, c.logprobs) for c in drain(engine, 4)])
        assert samples[0] == samples[1]
