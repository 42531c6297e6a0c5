"""Branches of the embedded engine that read a common prefix in place, once for all of them."""

import numpy as np
import pytest
import torch
from sampling import drain, plain_logprobs, shaken, weights, worst_error

from spo.engines.attention_calls import AttentionCall
from spo.engines.hf import HFEngine
from spo.engines.slot_attention import merge, partial_attention, reading, slot_attention
from spo.engines.slots import Slots
from spo.records import Request, Sampling

PROMPT = (5, 9, 3, 8, 20, 31, 7, 2, 11, 40)


def grow_three_levels(engine, cut=None):
    """2 prompts x 3 x 3 x 2 samples; returns (prefix, completion) pairs. `cut` also branches from
    the middle of the segments of level two."""
    pairs, level = [], [PROMPT, PROMPT[::-1]]
    for width, size in ((3, 6), (3, 6), (2, 5)):
        asked = list(level)
        if cut and len(level) == 6:
            asked += [prefix[:-cut] for prefix in level]
        for key, prefix in enumerate(asked):
            engine.submit(
                Request(key, tuple(prefix), width, size, Sampling(100 * key + len(prefix)))
            )
        done = drain(engine, width * len(asked))
        pairs += [(asked[c.key], c) for c in done]
        level = [(*asked[c.key], *c.token_ids) for c in done if c.key < len(level)]
    return pairs


@pytest.mark.parametrize("rows", [5, 64])
@pytest.mark.parametrize("cut", [None, 2])
def test_branches_read_in_place_what_a_plain_forward_computes(tiny_model, plain, rows, cut):
    engine = HFEngine(tiny_model, max_num_seqs=rows, num_cached=64, min_shared=3)
    depths = set()
    spans = engine.slots.spans

    def recording(running):
        depths.update(span.depth for span in spans(running))
        return spans(running)

    engine.slots.spans = recording
    pairs = grow_three_levels(engine, cut)
    assert worst_error(pairs, plain) < 2e-5
    assert depths == {0, 1, 2}  # prompt, segment, segment of the segment
    copied = HFEngine(tiny_model, max_num_seqs=rows, num_cached=64, min_shared=None)
    expected = grow_three_levels(copied, cut)
    assert [c.token_ids for _, c in pairs] == [c.token_ids for _, c in expected]


def test_a_shared_prefix_is_stored_and_read_once(tiny_model):
    engine = HFEngine(tiny_model, max_num_seqs=8, min_shared=4)
    engine.submit(Request(0, PROMPT, 6, 4, Sampling(1)))
    engine.poll()
    (span,) = engine.slots.spans(6)
    assert (span.length, span.rows, span.visible) == (9, None, None)
    assert (engine.slots.base[:6] == 9).all() and (engine.slots.lens[:6] == 10).all()
    assert engine.slots.pins[span.slot] == 6
    (kv,) = engine.slots.kv
    kv[:, span.slot] = 0  # what the branches read is here and nowhere else
    broken = drain(engine, 6)
    other = HFEngine(tiny_model, max_num_seqs=8, min_shared=4)
    other.submit(Request(0, PROMPT, 6, 4, Sampling(1)))
    whole = drain(other, 6)
    assert [c.logprobs[1:] for c in broken] != [c.logprobs[1:] for c in whole]


def test_segments_that_are_read_are_not_evicted(tiny_model, plain):
    engine = HFEngine(tiny_model, max_num_seqs=4, num_cached=3, min_shared=3)
    pairs = grow_three_levels(engine)
    assert worst_error(pairs, plain) < 2e-5
    slots = engine.slots
    named = np.zeros_like(slots.pins)
    for chain in slots.chains:
        for span in chain:
            named[span.slot] += 1
    assert (named == slots.pins).all()
    for slot, chain in enumerate(slots.chains):
        ids = slots.tokens[slot]
        for span in chain:
            assert (slots.tokens[span.slot, : span.stop] == ids[: span.stop]).all()
            assert slots.lens[span.slot] >= span.stop


def test_samples_in_flight_go_on_with_new_weights(tiny_model, plain):
    changed = shaken(tiny_model, 0.1, seed=3)
    engine = HFEngine(tiny_model, max_num_seqs=4, min_shared=3)
    engine.submit(Request(0, PROMPT, 6, 8, Sampling(1)))  # four run, two wait
    for _ in range(3):
        engine.poll()
    engine.load_weights(weights(changed), 1)
    done = drain(engine, 6)
    assert [(c.first_version, c.last_version) for c in done] == [(0, 1)] * 4 + [(1, 1)] * 2
    for c in done:
        old = plain_logprobs(plain, PROMPT, c.token_ids)
        new = plain_logprobs(changed, PROMPT, c.token_ids)
        expected = torch.cat([old[:3], new[3:]]) if c.first_version == 0 else new
        torch.testing.assert_close(torch.tensor(c.logprobs), expected, atol=2e-5, rtol=0)
    assert engine.counters()["preempted"] == 4


def reference(query, keys, values, scaling):
    """One row against its keys in fp64: (H, hd) x (KVH, K, hd)."""
    query, keys, values = query.double(), keys.double(), values.double()
    repeat = query.shape[0] // keys.shape[0]
    keys, values = keys.repeat_interleave(repeat, 0), values.repeat_interleave(repeat, 0)
    weights = torch.softmax(scaling * (keys @ query[..., None])[..., 0], -1)
    return (weights[:, None] @ values)[:, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
def test_attention_over_nested_spans(dtype, heads):
    """Rows 0-3 read slot 5, of different lengths; rows 1-2 read slot 6 behind it; row 4 nothing."""
    torch.manual_seed(0)
    query_heads, kv_heads = heads
    rows, width, scaling = 5, 16, 0.7
    call = AttentionCall((kv_heads, width, dtype), (kv_heads, width, dtype))
    slots = Slots([call], 5, 3, 40, min_shared=1, device="cpu")
    (kv,) = slots.kv
    kv.fill_(float("nan"))  # whatever is not written must not be read
    slots.lens[5:7], slots.base[6] = (20, 33), 20
    kv[:, 5, :, :20] = torch.randn(2, kv_heads, 20, width)
    kv[:, 6, :, :13] = torch.randn(2, kv_heads, 13, width)
    slots.attach(0, 5, 12, share=True)
    slots.attach(3, 5, 20, share=True)
    slots.attach(6, 5, 20, share=True)
    slots.base[6], slots.lens[6] = 20, 33
    for row in (1, 2):
        slots.attach(row, 6, 33, share=True)
    own = [3, 1, 6, 2, 4]
    for row, size in enumerate(own):
        kv[:, row, :, :6] = torch.randn(2, kv_heads, 6, width)
        slots.lens[row] = slots.base[row] + size - 1
    view = slots.view(slice(0, rows), slots.lens[:rows, None], slots.spans(rows))
    assert (view.indices[:, 0] + 1).tolist() == own
    query = torch.randn(rows, query_heads, 1, width).to(dtype)
    key, value = torch.randn(2, rows, kv_heads, 1, width).to(dtype)
    with reading(view):
        out = slot_attention(None, query, key, value, None, scaling)[0]
    assert out.shape == (rows, 1, query_heads, width) and out.dtype == dtype
    for row in range(rows):
        pieces = [kv[:, s.slot, :, : s.stop - s.start] for s in slots.chains[row]] + [
            kv[:, row, :, : own[row]]
        ]
        keys, values = torch.cat(pieces, 2)
        expected = reference(query[row, :, 0], keys, values, scaling)
        bound = 2e-6 if dtype == torch.float32 else 2**-8 * float(expected.abs().max())
        assert float((out[row, 0].double() - expected).abs().max()) <= bound


def test_parts_merge_to_the_softmax_of_their_union():
    torch.manual_seed(1)
    query, keys, values = torch.randn(3, 8), 30 * torch.randn(20, 8), torch.randn(20, 8)
    whole, _, total = partial_attention(query, keys, values, None)
    parts = [partial_attention(query, keys[a:b], values[a:b], None) for a, b in ((0, 7), (7, 20))]
    unread = (torch.zeros(3, 8), torch.full((3, 1), -torch.inf), torch.zeros(3, 1))
    torch.testing.assert_close(merge([*parts, unread]), whole / total, atol=1e-6, rtol=0)
