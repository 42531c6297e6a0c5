"""What tests of engines check of ids that must never be sampled."""

import torch
from sampling import drain

from spo.records import Request, Sampling

PREFIX = (5, 9, 3, 21, 7, 2, 11)


def check_limited(engine, model, size):
    """Samples hold ids below `size` only, greedy ones too, with the logprobs of these ids alone."""
    for key, (temperature, limit) in enumerate(
        [(0.7, size), (0.0, size), (1.3, None), (1.3, size)]
    ):
        engine.submit(Request(key, PREFIX, 6, 12, Sampling(5, temperature, vocab_size=limit)))
        for sample in drain(engine, 6):
            expected = own_logprobs(model, PREFIX, sample.token_ids, temperature or 1.0, limit)
            torch.testing.assert_close(torch.tensor(sample.logprobs), expected, atol=1e-4, rtol=0)
            assert limit is None or max(sample.token_ids) < limit
            if temperature == 0:
                assert expected.exp().min() > 1e-3  # not the argmax of an id that is cut


def own_logprobs(model, prefix, token_ids, temperature, size):
    """Of the tokens behind a prefix, by the model's own forward, over the ids below `size`."""
    ids = torch.tensor([[*prefix, *token_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prefix) - 1 : -1, :size].float() / temperature
    return torch.log_softmax(logits, -1).gather(-1, ids[0, len(prefix) :, None])[:, 0]


def favouring(model, first):
    """The model with a head that prefers the ids from `first` on, by far, to all others."""
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[first:] = 4 * head[: head.shape[0] - first]
    return model
