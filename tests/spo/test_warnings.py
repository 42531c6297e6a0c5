"""What a run says of itself when nothing can come of it."""

import warnings

import pytest

from spo.cli import main
from spo.config.recipe import load_recipe
from spo.loop import train
from spo.reward import FailedReward

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


LONG = """
from dataclasses import dataclass

from spo.tasks import Problem


@dataclass(frozen=True)
class Long:
    def problems(self, split, seed):
        while True:
            yield from (Problem("7 7 7", 7), Problem("7 " * 90, 7))

    def grade(self, text, answer):
        return len(text) % 2 == 0
"""


def test_prompts_that_do_not_fit_are_named_once_in_a_run(tmp_path):
    (tmp_path / "long.py").write_text(LONG)
    settings = [f"task={tmp_path}/long.py:Long", "train.iterations=2", f"out={tmp_path / 'run'}"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lines = train(load_recipe(None, [*BASE, "sampling.max_new_tokens=8", *settings]))
    assert [line["too_long"] for line in lines] == [2] * 4
    texts = [str(one.message) for one in said]
    assert len([text for text in texts if "prompts are left out: they are longer" in text]) == 1


ODD = """
def odd(response):
    if len(response) % 3 == 0:
        raise KeyError("lost")
    return 0.5
"""


def test_a_failed_reward_shows_where_and_for_what_it_failed(tmp_path, monkeypatch):
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)
    (tmp_path / "odd.py").write_text(ODD)
    (tmp_path / "recipe.yaml").write_text("reward: ./odd.py:odd\n")
    output = ["-o", str(tmp_path / "forest.safetensors")]
    with pytest.warns(FailedReward) as said:
        assert main(["rollout", str(tmp_path / "recipe.yaml"), *BASE, *output]) == 0
    (one,) = (w for w in said if w.category is FailedReward)
    printed = warnings.formatwarning(one.message, one.category, one.filename, one.lineno)
    first, *shown = printed.splitlines()
    assert first == (
        "spo: warning: a response has no reward, as its function failed: KeyError: 'lost'"
    )
    assert printed.endswith("\n") and all(line.startswith(" " * 4) for line in shown)
    assert '        raise KeyError("lost")' in shown and "    the response:" in shown
    response = "\n".join(line[8:] for line in shown[shown.index("    the response:") + 1 :])
    assert len(response) % 3 == 0 and "<answer>" in response
