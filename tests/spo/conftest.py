"""What tests of the trainer share: a tiny policy, and a grader."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from sampling import policy, tiny_policy

from spo.tasks.grading import Grader


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of the tiny policy; its stop token is 1."""
    tokens = {"tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 1}
    return tiny_policy(tmp_path_factory.mktemp("tiny"), "qwen2", **tokens)


@pytest.fixture(scope="session")
def plain(tiny_model):
    """The tiny policy itself."""
    return policy(tiny_model)


@pytest.fixture(scope="module")
def grader():
    with Grader() as running:
        yield running
