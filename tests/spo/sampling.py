"""What tests of engines and of forests do with either: drain, recompute, compare."""

import time

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from spo.records import STOP, Request, Sampling

SIZES = {
    "vocab_size": 48,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "head_dim": 32,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}


def tiny_policy(folder, kind, **more):
    """Save a policy of a kind with random weights, large enough for uneven distributions.

    Two layers, grouped-query attention, 48 tokens; heads of 32, since vLLM on CPU knows no smaller.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(SIZES | more))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def policy(folder, dtype=torch.float32, **options):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


def shaken(folder, scale, seed=1, part=""):
    """The policy with noise on those of its weights whose names hold `part`."""
    model = policy(folder)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def weights(model):
    return ((name, p.detach()) for name, p in model.named_parameters())


def drain(engine, count, seconds=60):
    done, deadline = [], time.monotonic() + seconds
    while len(done) < count:
        done += engine.poll()
        assert time.monotonic() < deadline, f"{len(done)} of {count} samples"
    return sorted(done, key=lambda c: (c.key, c.index))


def plain_logprobs(model, prefix, token_ids, temperature=1.0):
    """Of the tokens behind a prefix, by one forward of transformers."""
    ids = torch.tensor([[*prefix, *token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prefix) - 1 : -1].float() / temperature
    return torch.log_softmax(logits, -1).gather(-1, ids[0, len(prefix) :, None])[:, 0]


def worst_error(pairs, model, temperature=1.0):
    """Over (prefix, completion) pairs."""
    return max(
        float((torch.tensor(c.logprobs) - plain_logprobs(model, p, c.token_ids, temperature))
        .abs().max())
        for p, c in pairs
    )  # fmt: skip


def worst_difference(engine, model, temperature=0.7):
    """Between the logprobs that an engine samples with and the model's."""
    prefix = tuple(2 + (7 * i) % 45 for i in range(16))
    engine.submit(Request(0, prefix, 8, 12, Sampling(5, temperature, (1,))))
    return worst_error([(prefix, c) for c in drain(engine, 8)], model, temperature)


def check_update_reaches(engine, plain, changed):
    """The engine samples from the changed weights, then from the plain ones again."""
    engine.load_weights(weights(changed), engine.version + 1)
    assert worst_difference(engine, changed) < 1e-3
    assert worst_difference(engine, plain) > 1e-2  # so that the check above can fail
    engine.load_weights(weights(plain), engine.version + 1)
    assert worst_difference(engine, plain) < 1e-4


def check_seeds_and_stops(engine):
    """The same seeds give the same samples, and a stop token is a sample's last."""
    stops = tuple(range(20, 40))
    runs = []
    for _ in range(2):
        engine.submit(Request(0, (5, 9, 3), 4, 20, Sampling(3, 2.0, stops)))
        runs.append(drain(engine, 4))
    assert [c.token_ids for c in runs[0]] == [c.token_ids for c in runs[1]]
    engine.submit(
        Request(0, (5, 9, 3), 2, 20, Sampling(5, 2.0, stops))
    )  # sample i is seeded with seed + i
    assert [c.token_ids for c in drain(engine, 2)] == [c.token_ids for c in runs[0][2:]]
    assert len({c.token_ids for c in runs[0]}) == 4
    assert {c.finish for c in runs[0]} >= {STOP}
    for c in runs[0]:
        assert (c.finish == STOP) == (c.token_ids[-1] in stops)
        assert c.finish == STOP or len(c.token_ids) == 20
        assert not set(c.token_ids[:-1]) & set(stops)


def spent_on_a_shared_prefix(engine):
    """Counters of one sample and then three behind two full blocks of 32 tokens and one token."""
    prefix, before = tuple(2 + (5 * i + 1) % 45 for i in range(65)), engine.counters()
    for key, n in enumerate((1, 3)):
        engine.submit(Request(key, prefix, n, 4, Sampling(1 + key)))
        drain(engine, n)
    return {name: value - before[name] for name, value in engine.counters().items()}


def canonical(forest):
    """Its graded paths with prompt and reward: free of node order, and nothing stands twice."""
    graded = (~forest.rewards.isnan()).nonzero()[:, 0].tolist()
    rows = [(int(forest.prompt[n]), tuple(forest.path_ids(n))) for n in graded]
    return sorted((*row, float(forest.rewards[n])) for row, n in zip(rows, graded, strict=True))


def rewarded(ids):
    """Text that the arithmetic grader accepts for answer 7 if the first token is even."""
    return "<answer> 7 </answer>" if ids[0] % 2 == 0 else "<answer> 8 </answer>"


def check_first_tokens(forest, model, count):
    """`count` branches behind each of the prompt's children: their first tokens are distributed as
    independent samples are, and have the model's logprobs."""
    for parent in (forest.parent == 0).nonzero()[:, 0].tolist():
        children = (forest.parent == parent).nonzero()[:, 0].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([forest.path_ids(parent)])).logits[0, -1].float()
        logprobs, counts = logits.log_softmax(-1), torch.zeros(logits.numel())
        for child in children:
            (token, *_), start = forest.tokens(child), int(forest.cu_tokens[child])
            counts[token] += 1
            assert abs(float(forest.rollout_logprobs[start] - logprobs[token])) < 1e-4
        assert len(children) == count
        assert_frequencies(counts, logprobs.double().exp())


def assert_frequencies(counts, probabilities):
    """Chi-square within five standard deviations."""
    expected = counts.sum() * probabilities
    likely = expected > 1.5  # it needs expected counts of a few
    chi2 = float(((counts - expected) ** 2 / expected)[likely].sum())
    freedom = int(likely.sum())
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5


SHARES = (0.3, 0.05, 0.15, 0.1, 0.4)
TRUNCATIONS = [  # with the ids that each leaves of `SHARES`, most likely first
    ({"top_k": 3}, (4, 0, 2)),
    ({"top_p": 0.6}, (4, 0)),  # .4 + .3 first reach it
    ({"top_p": 0.39}, (4,)),  # reached at once
    ({"min_p": 0.3}, (4, 0, 2)),  # at least .12
    ({"min_p": 0.3, "top_p": 0.75}, (4, 0)),  # .7 of the .85 that min-p leaves is .82
    ({"top_k": 2, "top_p": 0.5}, (4,)),  # .4 of the .7 that top-k leaves is .57
]


def check_truncated(engine, model, prefix=(5, 9, 3), count=1500):
    """Samples are drawn from exactly what is left; logprobs are those of the whole policy."""
    with torch.no_grad():
        logits = model(torch.tensor([prefix])).logits[0, -1].double()
    for heat, options in ((0.7, {"top_k": 5}), (1.3, {"top_p": 0.8}), (1.0, {"min_p": 0.2})):
        probs = (logits / heat).softmax(-1)
        left = kept_of(probs.tolist(), **options)
        assert 1 < len(left) < 40
        engine.submit(Request(0, prefix, count, 1, Sampling(11, heat, **options)))
        engine.submit(Request(1, prefix, 40, 1, Sampling(5, heat)))  # beside them, nothing is cut
        counts = torch.zeros(len(probs))
        for c in drain(engine, count + 40):
            assert abs(c.logprobs[0] - float(probs[c.token_ids[0]].log())) < 1e-4
            if c.key == 0:
                counts[c.token_ids[0]] += 1
        assert counts.nonzero()[:, 0].tolist() == sorted(left)
        assert_frequencies(counts[sorted(left)], probs[sorted(left)] / probs[left].sum())


def kept_of(probs, top_p=1.0, top_k=0, min_p=0.0):
    """The ids that are left, by their definition: most likely first, one by one."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    order = [i for i in order if probs[i] >= min_p * probs[order[0]]][: top_k or None]
    total, left = sum(probs[i] for i in order), []
    while order and sum(probs[i] for i in left) < top_p * total:
        left.append(order.pop(0))
    return left


def check_truncated_seeds(engine):
    """The same seeds give the same samples; a greedy one is not changed."""
    runs = []
    for options in ({"top_p": 0.7}, {"top_p": 0.7}, {}):
        engine.submit(Request(0, (5, 9, 3), 4, 12, Sampling(3, 1.5, **options)))
        engine.submit(Request(1, (5, 9, 3), 1, 12, Sampling(3, 0.0, **options)))
        runs.append([c.token_ids for c in drain(engine, 5)])
    first, again, whole = runs
    assert first == again and first[:4] != whole[:4] and first[4] == whole[4]
    assert len(set(first[:4])) == 4
