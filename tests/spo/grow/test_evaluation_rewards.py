"""What is right for a task without a test of its own: rewards of at least `reward.success`."""

import warnings

import pytest
from test_evaluate import Scripted

from spo.config.recipe import load_recipe
from spo.grow.evaluate import accuracies
from spo.grow.rollout import RolloutOptions
from spo.records import STOP, Prompt, Sampling
from spo.reward import is_right, reward_given
from spo.signatures import Response
from spo.tasks.grading import Grader


def first(response):
    return float(response.split()[0]) / 10


def second(response):
    return float(response.split()[0]) / 10


def third(response):
    return float(response.split()[0]) / 10


def measured(weights, said, told=None):
    """Pass@1 of responses, each of which all three functions give a tenth of its number."""
    terms = [
        {"function": function, "weight": weight}
        for function, weight in zip((first, second, third), weights, strict=True)
    ]
    config = load_recipe(None, reward=reward_given(terms)).reward

    def read(prompt, token_ids, cut):
        return Response("p", " ".join(map(str, token_ids)), None)

    options = RolloutOptions(
        Sampling(0), read=read, success=config.success, told=set() if told is None else told
    )
    engine = Scripted([((one, 1), STOP) for one in said])
    with Grader(reward=config) as grader:
        prompts = [Prompt((5,), None, "rows")] * len(said)
        (found,) = accuracies(prompts, engine, grader, str, options, (4,))
    return found.pass_at_1


def test_weights_that_sum_to_1_make_a_perfect_response_right():
    assert (0.7 + 0.2) + 0.1 < 1
    assert measured((0.7, 0.2, 0.1), [10, 9]) == 0.5


def test_only_rounding_is_forgiven():
    assert is_right(0.9999999, 1.0) and is_right(-1e-9, 0.0) and is_right(1e6 - 0.5, 1e6)
    assert not is_right(0.99999, 1.0) and not is_right(-1e-5, 0.0) and not is_right(999990, 1e6)


def test_rewards_that_never_reach_success_are_named_once():
    told = set()
    with pytest.warns(UserWarning, match="reward.success: .* of 2 rewards is 0.8, expected 1 or"):
        assert measured((0.5, 0.25, 0.25), [8, 3], told) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert measured((0.5, 0.25, 0.25), [8, 3], told) == 0  # the run knows
        assert measured((0.5, 0.25, 0.25), [8, 10]) == 0.5
        assert measured((0.5, 0.25, 0.25), [0, 0]) == 0  # nothing was right, which may change
