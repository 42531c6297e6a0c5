"""The KL term: which tokens it covers, and what divides it."""

import dataclasses

import pytest
import torch
from forests import forest_of, load_fp64, packed, random_forest

from spo.config.loss import PolicyLossConfig
from spo.learn.figures import summarize
from spo.learn.loss import policy_loss
from spo.learn.model import row_logprobs
from spo.learn.pack import unpack

LOW, HIGH = -1.0, -0.01
PARENT, SIZES = [-1, 0, 0, 0, 0], [2, 2, 3, 1, 2]
# Under a prompt of two tokens: A, with an advantage of 1; B, of 0; C, of -1; D, which was dropped.
FOREST = forest_of(
    PARENT,
    SIZES,
    rollout_logprobs=torch.tensor([0.0, 0.0, LOW, HIGH, LOW, LOW, HIGH, LOW, LOW, LOW]),
    trained=torch.tensor([False, True, True, True, False]),
)
ADVANTAGES = torch.tensor([0.0, 1.0, 0.0, -1.0, 0.0])
GAPS = torch.tensor([0, 0, 1, 2, 3, 4, 5, 9, 100, 100.0])  # logprob - ref_logprob of every token


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_fp64(tiny_model, "spo_grouped")


def run(model, config, budget=100, ranks=1, forest=FOREST, advantages=ADVANTAGES, packing="tree"):
    """Loss, gradient and figures of a step, with k1 = GAPS on every token."""
    scope = config.kl_scope == "all" and config.kl_coef > 0
    options = {"every_token": scope, "packing": packing}
    shares = [
        packed(forest, advantages, budget, config.prob_threshold, share=(rank, ranks), **options)
        for rank in range(ranks)
    ]
    stats = shares[0][1]
    assert sum(len(batches) for batches, _ in shares) > 1 or budget > 4 or not scope
    model.zero_grad()
    total = dict.fromkeys(("loss", "kl", "covered", "kept", "clipfrac", "entropy"), 0.0)
    for batch in [b for batches, _ in shares for b in batches]:
        with torch.no_grad():
            own = row_logprobs(model, batch, 1.0)
        batch = dataclasses.replace(batch, ref_logprobs=own - GAPS[batch.token_index])
        out = policy_loss(model, batch, config, 1.0)
        out.loss.backward()
        for key in total:
            total[key] += out.metrics.get(key, 0.0)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()]).clone()
    step = total | dict.fromkeys(("mismatch_kl", "router_loss", "grad_norm", "lr"), 0.0)
    return total, gradient, summarize([step | dataclasses.asdict(stats) | {"ratio_max": 1.0}])


@pytest.mark.parametrize("budget, ranks", [(100, 1), (4, 1), (100, 2), (4, 2)])
@pytest.mark.parametrize("scope, mean", [("masked", (1 + 9) / 2), ("all", 24 / 6)])
def test_it_is_a_mean_over_the_tokens_that_it_covers(model, scope, mean, budget, ranks):
    """masked: the first token of A and the only one of C. all: those of A, B and C."""
    config = PolicyLossConfig(kl_scope=scope, kl_estimator="k1")
    off, _, without = run(model, config, budget, ranks)
    assert "kl" not in without  # nothing to compare with
    gradients = {}
    for coefficient in (0.1, 0.5):
        on = dataclasses.replace(config, kl_coef=coefficient)
        total, gradients[coefficient], figures = run(model, on, budget, ranks)
        assert figures["kl"] == pytest.approx(mean, rel=1e-6)
        assert total["loss"] - off["loss"] == pytest.approx(coefficient * mean, rel=1e-5)
        for key in ("kept", "clipfrac", "entropy"):
            assert total[key] == pytest.approx(off[key]), key
        assert total["kept"] == 2
    _, whole, _ = run(model, dataclasses.replace(config, kl_coef=0.5))
    assert (gradients[0.5] - whole).norm() <= 1e-6 * whole.norm()
    assert (gradients[0.5] - gradients[0.1]).norm() > 1e-3 * whole.norm()


def test_without_any_advantage_the_kl_term_trains_alone(model):
    """k1 has the gradient of the mean logprob."""
    config = PolicyLossConfig(kl_coef=0.5, kl_scope="all", kl_estimator="k1")
    total, gradient, figures = run(model, config, advantages=torch.zeros(5))
    assert total["kept"] == 0 and total["entropy"] == 0
    assert figures["kl"] == pytest.approx(24 / 6, rel=1e-6)
    model.zero_grad()
    expected = 0.0
    for node in (1, 2, 3):
        ids = torch.tensor([FOREST.path_ids(node)])
        logprobs = model_rows(model, ids)[-SIZES[node] :]
        expected = expected + 0.5 * logprobs.sum() / 6
    expected.backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (gradient - wanted).norm() <= 1e-6 * wanted.norm()


def model_rows(model, ids):
    """Logprobs of a plain sequence."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    logits = model(ids).logits[0, :-1]
    model.set_attn_implementation(before)
    return torch.log_softmax(logits, -1).gather(-1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("packing", ["tree", "rows"])
def test_every_token_of_every_trained_node_has_a_row(packing, weights):
    forest, advantages = random_forest(3, trees=3, weights=weights)
    plain, before = packed(forest, advantages, 25, packing=packing)
    batches, stats = packed(forest, advantages, 25, every_token=True, packing=packing)
    index = torch.cat([b.token_index for b in batches])
    trained = forest.trained.repeat_interleave(forest.cu_tokens.diff())
    weight = forest.weight.repeat_interleave(forest.cu_tokens.diff())
    assert torch.equal(torch.bincount(index, minlength=trained.numel()), trained * weight)
    assert stats.kl_tokens == int((trained * weight).sum()) > before.kl_tokens
    assert before.kl_tokens == before.kept_tokens == stats.kept_tokens
    assert stats.trained_tokens == before.trained_tokens
    mask = torch.cat([b.loss_mask for b in batches])
    credited = (advantages.abs() > 1e-6).repeat_interleave(forest.cu_tokens.diff())
    assert torch.equal(mask, credited[index]) and not mask.all()
    assert {b.kl_norm for b in batches} == {float(stats.kl_tokens)}
    for some in (plain, batches):
        assert sum(b.share for b in some) == pytest.approx(1)
    rows = unpack(forest, batches, [b.targets.float() for b in batches])
    assert torch.equal(rows.int()[trained], forest.token_ids[trained])
    assert all((b.advantages[~b.loss_mask] == 0).all() for b in batches)
