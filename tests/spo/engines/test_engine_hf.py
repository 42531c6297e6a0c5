"""The embedded engine against plain transformers forwards."""

import dataclasses

import numpy as np
import pytest
import torch
from sampling import (
    SHARES,
    TRUNCATIONS,
    assert_frequencies,
    check_truncated,
    check_truncated_seeds,
    drain,
    kept_of,
    plain_logprobs,
    shaken,
    weights,
)

from spo.config.policy import EMBEDDED, PolicyConfig
from spo.engines.draw import truncated, uniform
from spo.engines.hf import HFEngine
from spo.engines.make import make_engine
from spo.models.tokenizer import load_tokenizer
from spo.records import LENGTH, STOP, Request, Sampling


def requests():
    return [
        Request(
            k,
            tuple(2 + (k * 7 + j * j) % 45 for j in range(3 + 2 * k)),
            3,
            9,
            Sampling(100 * k, stop_token_ids=(1,)),
        )
        for k in range(7)
    ]


@pytest.mark.parametrize("max_num_seqs", [1, 4, 64])
def test_logprobs_are_those_of_a_plain_forward(tiny_model, plain, max_num_seqs):
    engine = HFEngine(tiny_model, max_num_seqs=max_num_seqs)
    asked = [
        dataclasses.replace(r, sampling=dataclasses.replace(r.sampling, temperature=0.7))
        for r in requests()
    ]
    for request in asked:
        engine.submit(request)
    for done in drain(engine, 21):
        expected = plain_logprobs(plain, asked[done.key].prefix_ids, done.token_ids, 0.7)
        torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=2e-5, rtol=0)
        assert done.finish == (STOP if done.token_ids[-1] == 1 else LENGTH)
        assert 1 not in done.token_ids[:-1]
        assert done.finish == STOP or len(done.token_ids) == 9


def test_greedy_is_the_argmax(tiny_model, plain):
    engine = HFEngine(tiny_model)
    engine.submit(Request(0, (5, 9, 3), 1, 12, Sampling(0, 0.0, (1,))))
    (done,) = drain(engine, 1)
    ids = [5, 9, 3]
    for token in done.token_ids:
        with torch.no_grad():
            assert int(plain(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)


def test_samples_do_not_depend_on_what_runs_beside_them(tiny_model):
    together = HFEngine(tiny_model, max_num_seqs=64)
    for request in requests():
        together.submit(request)
    expected = {(c.key, c.index): c.token_ids for c in drain(together, 21)}
    for request in requests():
        alone = HFEngine(tiny_model, max_num_seqs=2)
        alone.submit(request)
        for done in drain(alone, 3):
            assert done.token_ids == expected[done.key, done.index]


def test_siblings_differ_and_seeds_repeat(tiny_model):
    engine = HFEngine(tiny_model)
    engine.submit(Request(0, (5, 9, 3), 6, 8, Sampling(7)))
    first = [c.token_ids for c in drain(engine, 6)]
    assert len(set(first)) > 1
    engine.submit(Request(1, (5, 9, 3), 2, 8, Sampling(9)))  # samples 2 and 3 of the group above
    assert [c.token_ids for c in drain(engine, 2)] == first[2:4]


def test_a_branch_of_a_finished_sample_prefills_nothing(tiny_model, plain):
    engine = HFEngine(tiny_model)
    engine.submit(Request(0, (5, 9, 3, 8), 2, 6, Sampling(1)))
    parents = drain(engine, 2)
    assert engine.counters()["prefill"] == 4 + 1  # the prompt once, its last token in both
    for parent in parents:
        engine.submit(
            Request(10 + parent.index, (5, 9, 3, 8, *parent.token_ids), 4, 5, Sampling(2))
        )
    for done in drain(engine, 8):
        prefix = (5, 9, 3, 8, *parents[done.key - 10].token_ids)
        expected = plain_logprobs(plain, prefix, done.token_ids)
        torch.testing.assert_close(torch.tensor(done.logprobs), expected, atol=2e-5, rtol=0)
    assert engine.counters()["prefill"] == 5 + 8  # the last token of each branch, nothing else
    assert engine.counters()["forwarded"] == 3 + engine.counters()["generated"]


def test_new_weights_forget_cached_prefixes(tiny_model, plain):
    engine = HFEngine(tiny_model)
    engine.submit(Request(0, (5, 9, 3, 8), 1, 6, Sampling(1)))
    (before,) = drain(engine, 1)
    changed = shaken(tiny_model, 0.1, seed=3)
    engine.load_weights(weights(changed), 4)
    prefix = (5, 9, 3, 8, *before.token_ids)
    engine.submit(Request(1, prefix, 1, 6, Sampling(1)))
    (after,) = drain(engine, 1)
    assert (before.last_version, after.first_version, after.last_version) == (0, 4, 4)
    expected = plain_logprobs(changed, prefix, after.token_ids)
    torch.testing.assert_close(torch.tensor(after.logprobs), expected, atol=2e-5, rtol=0)
    stale = plain_logprobs(plain, prefix, after.token_ids)
    assert (stale - expected).abs().max() > 1e-2


def test_token_frequencies_are_the_policy_s(tiny_model, plain):
    engine = HFEngine(tiny_model, max_num_seqs=500)
    engine.submit(Request(0, (5, 9, 3), 4000, 1, Sampling(11)))
    counts = torch.zeros(48)
    for done in drain(engine, 4000):
        counts[done.token_ids[0]] += 1
    with torch.no_grad():
        logits = plain(torch.tensor([[5, 9, 3]])).logits[0, -1]
    assert_frequencies(counts, logits.double().softmax(-1))


def test_noise_is_uniform_and_depends_on_both_counters():
    seeds, depths = np.meshgrid(np.arange(200, dtype=np.uint64), np.arange(100, dtype=np.uint64))
    noise = uniform(seeds.ravel(), depths.ravel())
    assert len(np.unique(noise)) == noise.size and 0 <= noise.min() and noise.max() < 1
    histogram = np.histogram(noise, 20, (0, 1))[0]
    assert abs(histogram - 1000).max() < 5 * 1000**0.5
    lag = np.corrcoef(noise.reshape(100, 200)[:-1].ravel(), noise.reshape(100, 200)[1:].ravel())
    assert abs(lag[0, 1]) < 0.03


def test_ids_that_the_tokenizer_lacks_are_never_sampled(tiny_model, plain):
    """Rows of one batch may have other limits; logprobs are of the ids below them."""
    engine = HFEngine(tiny_model, max_num_seqs=64)
    for limits in ((30, None, 41), (30, 30)):
        for key, size in enumerate(limits):
            for greedy in (0, 1):
                sampling = Sampling(key, 1.0 - greedy, vocab_size=size)
                engine.submit(Request(2 * key + greedy, (5, 9, 3), 4, 16, sampling))
        drawn = 0
        for done in drain(engine, 8 * len(limits)):
            size, prefix = limits[done.key // 2], [5, 9, 3]
            for token, logprob in zip(done.token_ids, done.logprobs, strict=True):
                with torch.no_grad():
                    logits = plain(torch.tensor([prefix])).logits[0, -1]
                assert token < (size or 48)
                assert done.key % 2 == 0 or token == int(logits[:size].argmax())
                expected = float(logits[:size].log_softmax(-1)[token])
                assert logprob == pytest.approx(expected, abs=2e-5)
                prefix.append(token)
                drawn += size is None and token >= 41
        assert drawn > 0 or None not in limits  # else it could not fail


def test_a_stop_text_ends_a_sample_with_the_token_that_completes_it():
    tokenizer = load_tokenizer(PolicyConfig())
    engine = HFEngine(str(EMBEDDED), max_num_seqs=16)
    prompt = tuple(tokenizer.encode("arithmetic 14 + 3 ="))

    def samples(prefix, stop, size=None):
        sampling = Sampling(4, 2.0, (1,), stop)
        engine.submit(Request(0, prefix, 16, 24, sampling, prompt_size=size))
        return drain(engine, 16)

    free = samples(prompt, ())
    text = tokenizer.decode(free[0].token_ids)
    stop = ("never found", text[5:8])
    for whole, cut in zip(free, samples(prompt, stop), strict=True):
        texts = [tokenizer.decode(whole.token_ids[: i + 1]) for i in range(len(whole.token_ids))]
        size = next((i + 1 for i, t in enumerate(texts) if stop[1] in t), len(texts))
        assert cut.token_ids == whole.token_ids[:size]
        assert cut.logprobs == pytest.approx(whole.logprobs[:size], abs=1e-5)
        assert cut.finish == (STOP if stop[1] in texts[size - 1] else whole.finish)
    assert stop[1] in text and len(text) > 8  # so that the first sample was cut


def test_a_stop_text_may_begin_in_the_segment_before():
    tokenizer = load_tokenizer(PolicyConfig())
    engine = HFEngine(str(EMBEDDED), max_num_seqs=16)
    prompt = tuple(tokenizer.encode("arithmetic 14 + 3 ="))
    engine.submit(Request(0, prompt, 1, 8, Sampling(4, 0.0)))
    (done,) = drain(engine, 1)
    before, token = done.token_ids[:6], done.token_ids[6]
    stop = (tokenizer.decode(done.token_ids[:7])[-3:],)
    ends = {}
    for size in (len(prompt), len(prompt) + 6, None):  # the response has six tokens, or none yet
        engine.submit(Request(0, (*prompt, *before), 1, 2, Sampling(4, 0.0, (), stop), 0, size))
        (done,) = drain(engine, 1)
        ends[size] = done.finish
        assert done.token_ids[0] == token
    assert ends == {len(prompt): STOP, len(prompt) + 6: LENGTH, None: LENGTH}
    within = (tokenizer.decode(before)[-2:],)  # has ended nothing before, and does not now
    engine.submit(
        Request(0, (*prompt, *before), 1, 1, Sampling(4, 0.0, (), within), 0, len(prompt))
    )
    assert drain(engine, 1)[0].finish == LENGTH


def test_a_stop_text_needs_a_tokenizer(tiny_model):
    engine = HFEngine(tiny_model)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        engine.submit(Request(0, (3,), 1, 8, Sampling(0, stop=("\n",))))


def test_bad_requests_and_names_get_a_sentence(tiny_model):
    engine = HFEngine(tiny_model, max_model_len=32)
    with pytest.raises(ValueError, match="exceeds the context of 32"):
        engine.submit(Request(0, tuple(range(2, 30)), 1, 8, Sampling(0)))
    with pytest.raises(ValueError, match="expected a prefix"):
        engine.submit(Request(0, (), 1, 8, Sampling(0)))
    with pytest.raises(ValueError, match="n and max_new_tokens"):
        engine.submit(Request(0, (3,), 0, 8, Sampling(0)))
    with pytest.raises(ValueError, match="expected one of vllm, hf"):
        make_engine("sglang", tiny_model)


@pytest.mark.parametrize(("options", "left"), TRUNCATIONS, ids=str)
def test_what_a_truncation_leaves_is_worked_by_hand(options, left):
    assert list(left) == kept_of(SHARES, **options)
    whole = Sampling(0)
    probs = truncated(torch.tensor([SHARES, SHARES]), [Sampling(0, **options), whole])
    expected = [share if i in left else 0.0 for i, share in enumerate(SHARES)]
    assert probs.tolist() == torch.tensor([expected, SHARES]).tolist()


def test_equal_probabilities_are_cut_at_the_limit():
    probs = truncated(torch.full((2, 8), 0.125), [Sampling(0, top_k=3), Sampling(0, top_p=0.5)])
    assert (probs > 0).int().tolist() == [[1] * 3 + [0] * 5, [1] * 4 + [0] * 4]


def test_truncated_samples_have_the_distribution_that_is_left(tiny_model, plain):
    check_truncated(HFEngine(tiny_model, max_num_seqs=500), plain)


def test_truncated_samples_repeat(tiny_model):
    check_truncated_seeds(HFEngine(tiny_model))
