"""A tiny Qwen2 policy with random weights: two layers, grouped-query attention, 48 tokens.

Heads of 32: vLLM on CPU knows no smaller ones.
"""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from sampling import policy
from transformers import Qwen2Config, Qwen2ForCausalLM

from spo.tasks.grading import Grader

EOS = 1


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of the tiny policy; its weights are large enough for uneven distributions."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=48,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=0,
        initializer_range=0.2,
    )
    folder = tmp_path_factory.mktemp("tiny")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def plain(tiny_model):
    """The tiny policy itself."""
    return policy(tiny_model)


@pytest.fixture(scope="module")
def grader():
    with Grader() as running:
        yield running
