"""PPO's critic: credit and value loss worked by hand, and values read where they belong."""

import dataclasses
import math

import pytest
import torch
from forests import stars

from spo.config.policy import PolicyConfig
from spo.credit.gae import token_credit
from spo.credit.nodes import of_tokens
from spo.learn.critic import (
    clipped_errors,
    explained_variance,
    load_critic,
    row_values,
    value_loss,
)
from spo.learn.pack import pack, unpack

NAN = float("nan")


# prompt of 2 tokens, a right response of 3, one left out of 1, a wrong one of 2
STAR = stars([((4, 5, 6), 1.0), ((7,), NAN), ((8, 9), 0.0)])
VALUES = torch.tensor([9.0, 9.0, 0.5, 0.25, 0.75, 9.0, 0.5, 0.25])


def test_monte_carlo_credit():
    # gamma = lambda = 1: every token's return is the reward of its response.
    advantages, returns = token_credit(STAR, VALUES, gamma=1.0, lam=1.0)
    assert advantages.tolist() == [0, 0, 0.5, 0.75, 0.25, 0, -0.5, -0.25]
    assert returns.tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


def test_gae_credit():
    # gamma .9, lambda .8. First response: deltas -.275, .425, .25; second: -.275, -.25.
    advantages, returns = token_credit(STAR, VALUES, gamma=0.9, lam=0.8)
    expected = torch.tensor([0, 0, 0.1606, 0.605, 0.25, 0, -0.455, -0.25])
    torch.testing.assert_close(advantages, expected, atol=1e-6, rtol=0)
    trained = STAR.trained.repeat_interleave(STAR.cu_tokens.diff())
    torch.testing.assert_close(returns, torch.where(trained, expected + VALUES, 0.0))


def test_only_graded_responses_have_credit():
    unrewarded = dataclasses.replace(STAR, trained=STAR.parent >= 0)
    with pytest.raises(ValueError, match="graded response"):
        token_credit(unrewarded, VALUES, gamma=1.0, lam=1.0)
    deep = dataclasses.replace(STAR, parent=torch.tensor([-1, 0, 0, 1], dtype=torch.int32))
    with pytest.raises(ValueError, match="graded response"):
        token_credit(deep, VALUES, gamma=1.0, lam=1.0)


def test_clipped_value_loss():
    # old value .5, clip .2, target 1: within the clip, past it, and past it the wrong way.
    values = torch.tensor([0.6, 0.9, 0.1], requires_grad=True)
    errors = clipped_errors(values, torch.full((3,), 0.5), torch.ones(3), 0.2)
    torch.testing.assert_close(errors.detach(), torch.tensor([0.08, 0.045, 0.405]))
    (gradient,) = torch.autograd.grad(errors.sum(), values)
    torch.testing.assert_close(gradient, torch.tensor([-0.4, 0.0, -0.9]))


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 0.0, 1.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(torch.full((4,), 0.3), returns) == 0
    assert explained_variance(torch.tensor([0.5, 0.5, 0.0, 1.0]), returns) == pytest.approx(0.5)
    assert math.isnan(explained_variance(returns, torch.ones(4)))


@pytest.fixture(scope="module")
def critic(tiny_model):
    return load_critic(PolicyConfig(path=tiny_model))


def values_of(critic, forest, budget):
    packs, _ = pack(
        forest,
        of_tokens(forest, forest.trained).float(),
        prob_threshold=None,
        tokens_per_batch=budget,
    )
    with torch.no_grad():
        return unpack(forest, packs, [row_values(critic, packed) for packed in packs])


def test_a_new_critic_values_everything_zero(critic):
    assert values_of(critic, STAR, 100).tolist() == [0] * 8


def test_a_value_is_that_of_the_state_before_the_token(critic):
    head = critic.score.weight.data
    torch.nn.init.normal_(head, generator=torch.Generator().manual_seed(0))
    try:
        values = values_of(critic, STAR, 100)
        torch.testing.assert_close(values_of(critic, STAR, 4), values, atol=1e-5, rtol=1e-5)
        assert values[2] == values[6] and not values[[0, 1, 5]].any()  # both follow the prompt
        other_end = stars([((4, 5, 7), 1.0), ((7,), NAN), ((8, 10), 0.0)])
        torch.testing.assert_close(values_of(critic, other_end, 100), values)
        changed = values_of(critic, stars([((5, 5, 6), 1.0), ((7,), NAN), ((8, 9), 0.0)]), 100)
        assert (changed != values).tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    finally:
        torch.nn.init.zeros_(head)


def test_value_loss_of_a_batch(critic):
    packs, _ = pack(
        STAR, of_tokens(STAR, STAR.trained).float(), prob_threshold=None, tokens_per_batch=4
    )
    assert len(packs) > 1
    returns = torch.arange(8.0)
    out = [value_loss(critic, p, torch.zeros(p.targets.numel()), returns[p.token_index], 0.2)
           for p in packs]  # fmt: skip
    # values 0: half the mean square of the returns of tokens 2, 3, 4, 6, 7
    expected = 0.5 * (4 + 9 + 16 + 36 + 49) / 5
    assert float(sum(o.loss.detach() for o in out)) == pytest.approx(expected)
    assert sum(o.metrics["loss"] for o in out) == pytest.approx(expected)


def test_a_saved_critic_reads_back(critic, tmp_path):
    torch.nn.init.constant_(critic.score.bias, 0.25)
    try:
        critic.save_pretrained(tmp_path)
    finally:
        torch.nn.init.zeros_(critic.score.bias)
    back = load_critic(PolicyConfig(path="embedded"), str(tmp_path))
    assert values_of(back, STAR, 100).tolist() == [0, 0, 0.25, 0.25, 0.25, 0, 0.25, 0.25]
