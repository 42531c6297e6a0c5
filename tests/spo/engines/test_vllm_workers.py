"""vLLM with two workers in processes of their own: `tensor_parallel_size` of `engine.options`."""

import importlib.util

import pytest
from limits import check_limited
from sampling import check_truncated, check_update_reaches, shaken, worst_difference

from spo.engines.make import make_engine

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"
    ),
]


def test_two_workers_sample_truncate_and_update(tiny_model, plain, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    options = {"tensor_parallel_size": 2, "kv_cache_memory_bytes": 1 << 27}
    engine = make_engine("vllm", tiny_model, max_num_seqs=32, max_model_len=128, options=options)
    assert worst_difference(engine, plain) < 1e-4
    check_limited(engine, plain, 40)
    check_truncated(engine, plain)
    check_update_reaches(engine, plain, shaken(tiny_model, 0.2))
    engine.close()
