"""DPO, DPO-Positive and RestEM: numbers worked by hand, and gradients against plain autograd."""

import dataclasses
import math

import pytest
import torch
from forests import stars
from transformers import AutoModelForCausalLM

from spo.config.loss import LikelihoodLossConfig
from spo.config.policy import PolicyConfig
from spo.credit.correct import Correct
from spo.credit.nodes import of_nodes, of_tokens
from spo.credit.pairs import Pairs, node_sums, pair_credit, pair_loss, pair_nodes
from spo.learn.loss import likelihood_loss
from spo.learn.model import row_logprobs
from spo.learn.pack import pack, unpack
from spo.learn.policy import load_policy

NAN = float("nan")


def marks(forest, rule):
    return of_nodes(forest, rule.assign(forest).tokens).tolist()


MIXED = stars(
    [((4,), 1.0), ((5,), 0.0), ((6,), 1.0), ((7,), 1.0), ((8,), NAN)],
    [((4,), 0.0), ((5,), 0.0)],
    [((4,), -1.0), ((5,), 1.0)],  # a truncated response that is penalised is a wrong one
)


def test_restem_keeps_the_first_right_responses():
    assert marks(MIXED, Correct(max_correct=2)) == [
        *[0, 1, 0, 1, 0, 0], *[0, 0, 0], *[0, 0, 1]
    ]  # fmt: skip
    assert marks(MIXED, Correct(max_correct=8))[4] == 1


def test_pairs_use_every_response_once():
    # one wrong response, so one pair, of the first right one
    assert marks(MIXED, Pairs()) == [
        *[0, 1, -1, 0, 0, 0], *[0, 0, 0], *[0, -1, 1]
    ]  # fmt: skip
    credit = torch.tensor(marks(MIXED, Pairs()))
    assert pair_nodes(MIXED, credit).tolist() == [[1, 2], [11, 10]]
    with pytest.raises(ValueError, match="unequal numbers"):
        pair_nodes(MIXED, torch.tensor([0.0, 1, 1, -1, *[0] * 8]))


def test_a_step_without_pairs_trains_nothing():
    step = Pairs().before_step(MIXED, Pairs().assign(MIXED), [1], None)
    assert not step.tokens.any() and step.figures == {}


def test_sums_per_node():
    forest = stars([((4, 5), 1.0), ((6,), 0.0)])
    sums = node_sums(forest, torch.tensor([0.0, 0.0, -1.0, -2.0, -4.0]))
    assert sums.tolist() == [0, -3, -4]


def test_dpo_loss():
    # beta (0.5 + 0.3) = 0.4; -log sigmoid(0.4) = log(1 + e^-0.4)
    ratios = torch.tensor([[0.5, -0.3]], dtype=torch.float64, requires_grad=True)
    loss = pair_loss(ratios, beta=0.5)
    assert float(loss.detach()) == pytest.approx(0.5130152523999526)
    (gradient,) = torch.autograd.grad(loss.sum(), ratios)
    pull = 0.5 * (1 - 1 / (1 + math.exp(-0.4)))
    torch.testing.assert_close(gradient, torch.tensor([[-pull, pull]], dtype=torch.float64))


def test_dpo_positive_loss():
    # right -0.2, wrong -0.5, positive 5: 0.5 (0.3 - 5 * 0.2) = -0.35
    ratios = torch.tensor([[-0.2, -0.5]], dtype=torch.float64, requires_grad=True)
    loss = pair_loss(ratios, beta=0.5, positive=5.0)
    assert float(loss.detach()) == pytest.approx(math.log(1 + math.exp(0.35)))
    (gradient,) = torch.autograd.grad(loss.sum(), ratios)
    pull = 0.5 / (1 + math.exp(-0.35))
    torch.testing.assert_close(gradient, torch.tensor([[-6 * pull, pull]], dtype=torch.float64))
    # a right response that has become likelier pays nothing: it is DPO
    better = torch.tensor([[0.2, -0.5]])
    assert torch.equal(pair_loss(better, beta=0.5, positive=5.0), pair_loss(better, beta=0.5))


def test_pair_credit():
    forest = stars([((4, 5), 1.0), ((6,), 0.0)], [((4,), 0.0), ((5,), 1.0)])
    policy = torch.tensor([0, 0, -1.0, -1.0, -1.0, 0, 0, -2.0, -1.0])
    reference = torch.tensor([0, 0, -1.5, -1.0, -0.7, 0, 0, -2.0, -1.0])
    pairs = torch.tensor([[1, 2], [5, 4]])
    credit, figures = pair_credit(forest, pairs, policy, reference, beta=0.5, positive=0.0)
    first, second = 0.5 / (1 + math.exp(0.4)), 0.5 / 2
    expected = torch.tensor([0, first, -first, 0, -second, second])
    torch.testing.assert_close(credit, expected)
    assert figures["pair_loss"] == pytest.approx((0.51301525 + math.log(2)) / 2)
    assert figures["pair_accuracy"] == 0.5  # 0 is not above 0
    assert figures["pair_margin"] == pytest.approx(0.2)


PAIRED = stars(
    [((4, 5, 9), 1.0), ((6, 7), 0.0), ((10, 11, 12, 13), 0.0)],
    [((4, 9), 0.0), ((5,), 1.0), ((15, 16, 17), 0.0), ((18, 19), 1.0)],
)


def sequence_logprob(model, forest, node):
    ids = torch.tensor([forest.path_ids(node)])
    size = len(forest.tokens(node))
    logprobs = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
    return logprobs.gather(-1, ids[0, 1:, None])[-size:, 0]


@pytest.fixture(scope="module")
def models(tiny_model):
    """The packed policy, the same as one sequence per response, and another as its reference."""
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    reference = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.02 * torch.randn(p.shape, generator=generator)
    return load_policy(PolicyConfig(path=tiny_model)), plain, reference.requires_grad_(False)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("budget", [1000, 5])
@pytest.mark.parametrize("positive", [0.0, 5.0])
def test_the_credit_gives_the_gradient_of_the_pair_loss(models, budget, positive):
    packed_model, plain, reference = models
    marked = Pairs().assign(PAIRED).tokens
    pairs = pair_nodes(PAIRED, of_nodes(PAIRED, marked))
    assert len(pairs) == 3
    ratios = torch.stack([
        sequence_logprob(plain, PAIRED, n).sum() - sequence_logprob(reference, PAIRED, n).sum()
        for n in pairs.flatten().tolist()
    ]).reshape(-1, 2)  # fmt: skip
    wanted = gradients(plain, pair_loss(ratios, beta=0.3, positive=positive).mean())

    packs, _ = pack(PAIRED, marked, prob_threshold=None, tokens_per_batch=budget)
    assert (len(packs) > 2) == (budget == 5)
    with torch.no_grad():
        policy = unpack(PAIRED, packs, [row_logprobs(packed_model, p, 1.0) for p in packs])
    ref = torch.zeros_like(policy)
    for node in pairs.flatten().tolist():
        tokens = slice(int(PAIRED.cu_tokens[node]), int(PAIRED.cu_tokens[node + 1]))
        ref[tokens] = sequence_logprob(reference, PAIRED, node)
    weighed, _ = pair_credit(PAIRED, pairs, policy, ref, beta=0.3, positive=positive)
    tokens = of_tokens(PAIRED, weighed)
    packs, _ = pack(PAIRED, tokens, prob_threshold=None, tokens_per_batch=budget)
    packs = [dataclasses.replace(p, policy_norm=float(len(pairs))) for p in packs]
    found = gradients(
        packed_model,
        sum(likelihood_loss(packed_model, p, LikelihoodLossConfig(), 1.0).loss for p in packs),
    )
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


@pytest.mark.parametrize("budget", [1000, 5])
def test_restem_is_the_mean_negative_logprob_of_the_kept_tokens(models, budget):
    packed_model, plain, _ = models
    credit = Correct(max_correct=1).assign(PAIRED).tokens
    kept = of_nodes(PAIRED, credit).nonzero()[:, 0].tolist()
    assert kept == [1, 6]
    expected = -torch.cat([sequence_logprob(plain, PAIRED, node) for node in kept]).mean()
    wanted = gradients(plain, expected)
    packs, _ = pack(PAIRED, credit, prob_threshold=None, tokens_per_batch=budget)
    out = [likelihood_loss(packed_model, p, LikelihoodLossConfig(), 1.0) for p in packs]
    assert sum(o.metrics["loss"] for o in out) == pytest.approx(float(expected), rel=1e-5)
    found = gradients(packed_model, sum(o.loss for o in out))
    assert (found - wanted).norm() < 1e-4 * wanted.norm()
