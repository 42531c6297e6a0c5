"""The trainer's models beside an engine that runs the same class of transformers."""

import importlib.util

import pytest
import torch
from sampling import policy, tiny_policy, worst_difference

from spo.config.policy import PolicyConfig
from spo.engines.make import make_engine
from spo.learn.model import sequence_logprobs
from spo.learn.policy import load_policy

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"
)


def test_models_made_before_and_after_the_engine_stay_transformers_own(tmp_path):
    folder = tiny_policy(tmp_path, "olmo2", eos_token_id=1)  # vLLM has no class of its own for it
    config = PolicyConfig(path=folder)
    before = load_policy(config)
    cls = type(before.base_model)
    was = (cls.__bases__, cls.__init__, cls.__call__)
    ids = list(range(2, 40))
    expected = sequence_logprobs(before, ids[:8], ids[8:], 1.0)
    engine = make_engine("vllm", folder, max_num_seqs=8, max_model_len=128)
    try:
        assert type(engine.engine.apply_model(lambda m: m)[0].model) is not cls  # the right kind
        assert (cls.__bases__, cls.__init__, cls.__call__) == was
        for model in (before, load_policy(config)):
            assert sequence_logprobs(model, ids[:8], ids[8:], 1.0) == expected
        assert worst_difference(engine, policy(folder)) < 1e-4
        changed = policy(folder)
        with torch.no_grad():
            for tensor in changed.parameters():
                tensor.mul_(1.1)
        engine.load_weights(((n, p.detach()) for n, p in changed.named_parameters()), 1)
        assert worst_difference(engine, changed) < 1e-4
    finally:
        engine.close()
