"""Logprobs of vLLM's truncated samples, with stand-ins for the samplers that need a GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sampling import SHARES

from spo.engines.vllm_sampler import keep_policy_logprobs, parameters
from spo.records import Request, Sampling


class Second:
    """The sampler of vllm/v1/worker/gpu (0.32): the parts that `keep_policy_logprobs` relies on."""

    def __init__(self, top_p, min_p):
        self.sampling_states = self
        self.min_p = SimpleNamespace(np=np.array(min_p))
        self.top_p = torch.tensor(top_p)

    def get_top_k_top_p(self, expanded, rows):
        return None, None if (self.top_p[rows] == 1).all() else self.top_p[expanded]

    def apply_temperature(self, logits, expanded, rows):
        logits /= 2.0

    def sample(self, logits, expanded, mapping, rows, *rest, return_logprobs=False):
        logits = logits.clone()
        self.apply_temperature(logits, expanded, rows)
        return logits.argmax(-1), logits.masked_fill(logits < logits.amax(-1, True), -torch.inf)


@pytest.mark.parametrize(
    ("top_p", "min_p", "whole"), [(0.5, 0.0, True), (1.0, 0.2, True), (1.0, 0.0, False)]
)
def test_the_second_runner_s_logits_are_whole_where_samples_truncate(top_p, min_p, whole):
    sampler = Second([1.0, top_p], [0.0, min_p])
    worker = SimpleNamespace(model_runner=SimpleNamespace(sampler=sampler))
    assert keep_policy_logprobs(worker) and keep_policy_logprobs(worker)  # once is enough
    logits = torch.tensor([SHARES, SHARES]).log().bfloat16()
    before = logits.clone()
    ids = torch.arange(2)
    token_ids, found = sampler.sample(logits, ids, ids, ids.numpy(), None, return_logprobs=True)
    assert token_ids.tolist() == [4, 4] and torch.equal(logits, before)
    assert bool(found.isfinite().all()) == whole
    if whole:
        torch.testing.assert_close(found, logits.float() / 2)


def test_a_sampler_that_is_not_known_is_left_alone():
    for runner in (SimpleNamespace(), SimpleNamespace(sampler=object())):
        assert not keep_policy_logprobs(SimpleNamespace(model_runner=runner))


def test_a_request_of_training_names_no_truncation():
    for sampling in (Sampling(7), Sampling(7, 0.0, top_p=0.5, top_k=3)):  # the second is greedy
        asked = parameters(Request(0, (5,), 2, 4, sampling), 1)
        assert asked["seed"] == 8 and not {"top_p", "top_k", "min_p"} & set(asked)
    asked = parameters(Request(0, (5,), 1, 4, Sampling(7, min_p=0.1)), 0)
    assert (asked["top_p"], asked["top_k"], asked["min_p"]) == (1.0, 0, 0.1)
