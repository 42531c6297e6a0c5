"""What a run says of itself when nothing can come of it."""

import warnings

import pytest

from spo.config.recipe import load_recipe
from spo.loop import train

BASE = [
    "engine={name: hf, max_num_seqs: 64, max_model_len: 96}",
    "shape={kind: star, group_size: 4}",
    "train={iterations: 1, prompts: 4}",
    "eval.problems=4",
]


def test_a_first_iteration_that_trains_nothing_is_named(tmp_path):
    """Responses of one token that does not end them: all are cut, all rewards are 0."""
    with pytest.warns(UserWarning, match="trains nothing: all 16 responses have the reward 0"):
        train(load_recipe(None, [*BASE, "sampling.max_new_tokens=1", f"out={tmp_path / 'none'}"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(load_recipe(None, [*BASE, f"out={tmp_path / 'some'}"]))
