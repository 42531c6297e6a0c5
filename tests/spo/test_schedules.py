"""What changes over a run: the learning rate, the reference, the age of nodes."""

import math
from types import SimpleNamespace

import pytest
import torch
from forests import stars
from test_train import config, weights

from spo.config.recipe import load_recipe
from spo.config.train import TrainConfig
from spo.learn.checkpoint import State
from spo.learn.learner import Learner
from spo.learn.schedule import rate, share_done
from spo.loop import train
from spo.records import Credit

EVALS = ["eval.every=0", "eval.problems=1"]


@pytest.mark.parametrize(
    "decay, expected",
    [
        ("linear", [0.5, 1, 1, 0.5, 0.125]),
        ("cosine", [0.5, 1, 1, 0.5, (1 + math.cos(math.pi * 7 / 8)) / 2]),
        ("cosine_with_min_lr", [0.5, 1, 1, 0.6, 0.2 + 0.4 * (1 + math.cos(math.pi * 7 / 8))]),
        ("constant", [0.5, 1, 1, 1, 1]),
        ("constant_with_warmup", [0.5, 1, 1, 1, 1]),
    ],
)
def test_the_rate_rises_and_falls_by_hand(decay, expected):
    """Ten steps, of which two warm up."""
    floor = 0.2 if decay == "cosine_with_min_lr" else 0.0
    settings = TrainConfig(warmup_share=0.2, decay=decay, min_lr_rate=floor)
    rates = [rate(settings, step / 10, (step + 1) / 10) for step in (0, 1, 2, 6, 9)]
    assert rates == pytest.approx(expected, abs=1e-5)


def test_a_run_may_warm_up_until_its_end_or_not_at_all():
    settings = [TrainConfig(warmup_share=share) for share in (1.0, 0.0)]
    ends = [rate(each, 0.0, 0.1) for each in settings], [rate(each, 0.9, 1.0) for each in settings]
    assert ends == (pytest.approx([0.1, 1.0]), pytest.approx([1.0, 0.1], abs=1e-5))


def test_the_nearer_limit_says_how_much_of_the_run_is_done():
    settings = TrainConfig(iterations=10, max_generated_tokens=1000)
    found = [share_done(settings, *done) for done in ((0, 0), (1, 300), (4, 300), (9, 1200))]
    assert found == [0, 0.3, 0.4, 1]
    assert share_done(TrainConfig(iterations=10), 4, 10**9) == 0.4


def rates_of(state, iterations, tokens, *settings):
    """The shares of the peak rate of every step, with `tokens` in each iteration."""
    recipe = load_recipe(None, ["train={prompts: 4, minibatches: 2, epochs: 2}", *settings])
    forest = stars([((4,), 1.0)], [((4,), 0.0)], [((4,), 1.0)])
    rates = []

    def step(forest, credit, trees, state, rate):
        rates.append(rate)
        return {"kept": 0.0, "covered": 0.0, "lr": rate} | dict.fromkeys(FIGURES, 0.0)

    learner = SimpleNamespace(recipe=recipe, step=step)
    credit = Credit(torch.zeros(forest.token_ids.numel()))
    for _ in range(iterations):
        Learner.train(learner, forest, credit, state, tokens)
        state.iteration += 1
        state.generated_tokens += tokens
    return rates


FIGURES = ["loss", "kl", "clipfrac", "entropy", "mismatch_kl", "router_loss", "ratio_max"]
FIGURES += ["grad_norm", "kept_tokens", "trained_tokens", "packed_tokens"]


@pytest.mark.parametrize(
    "decay, end", [("linear", 1 / 36), ("cosine", (1 - math.cos(math.pi / 36)) / 2)]
)
def test_a_run_that_tokens_end_decays_to_its_end(decay, end):
    """Ten iterations of 100 tokens, in four steps each."""
    limits = ["train.iterations=9999", "train.max_generated_tokens=1000", f"train.decay={decay}"]
    rates = rates_of(State(), 10, 100, *limits, "train.warmup_share=0.1")
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4] == pytest.approx(1.0, abs=1e-5) and rates == rates[:4] + sorted(rates[4:])[::-1]
    assert rates[-1] == pytest.approx(end, abs=1e-5)  # 36 steps after the warm-up, one is left
    # The same run in whole iterations, and one that goes on from its middle.
    whole = rates_of(State(), 10, 77, "train.iterations=10", *limits[2:], "train.warmup_share=0.1")
    assert rates == pytest.approx(whole)
    middle = State(iteration=6, generated_tokens=600)
    assert rates_of(middle, 4, 100, *limits, "train.warmup_share=0.1") == rates[24:]


REFERENCE = [
    *EVALS, "train.minibatches=1", "train.reference_every=2", "train.iterations=50",
    "train.decay=cosine", "loss={kl_coef: 0.1, kl_scope: all}",
]  # fmt: skip


def test_the_reference_is_refreshed_and_a_resumed_run_is_the_same(tmp_path):
    """Stopped after three iterations: its reference is the policy after two."""
    whole, part = tmp_path / "whole", tmp_path / "part"
    lengths = [*REFERENCE, "train.max_generated_tokens=4000"]
    lines = [line for line in train(config(whole, *lengths)) if line["stage"] == "train"]
    assert len(lines) > 4
    far = [line["kl"] > 1e-9 for line in lines]
    assert far == [i % 2 == 1 for i in range(len(lines))]  # one step an iteration
    assert lines[-1]["lr"] < 0.25 * lines[1]["lr"]

    def stop(line):
        if line["stage"] == "train" and line["iteration"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(part, *lengths), report=stop)
    rest = [line for line in train(config(part, *lengths), resume=True) if line["stage"] == "train"]
    for key in ("lr", "kl", "loss"):
        assert [line[key] for line in rest] == [line[key] for line in lines[3:]], key
    assert weights(part) == weights(whole)


def test_what_a_stream_received_late_trains(tmp_path):
    stream = ["train.stream_depth=1", "train.replay_age=1", "train.replay_nodes=100"]
    more = ["engine.max_num_seqs=16", "train.prompts=2", *EVALS]
    lines = [line for line in train(config(tmp_path, *stream, *more)) if line["stage"] == "train"]
    assert max(line["max_age"] for line in lines) == 1
    assert all(line["replay_dropped"] == line["replay_trees"] == 0 for line in lines)
    few = [*stream[:2], "train.replay_nodes=1", *more, "train.iterations=2"]
    lines = [line for line in train(config(tmp_path / "few", *few)) if line["stage"] == "train"]
    assert all(line["replay_dropped"] > 0 and line["replay_trees"] == 0 for line in lines)


def test_tokens_of_dropped_prompts_count_towards_the_end_of_a_run(tmp_path):
    """Every response is cut, so that no prompt is left of any iteration."""
    settings = ["sampling={max_new_tokens: 10, truncated: drop}", "train.max_generated_tokens=300"]
    settings += ["train.iterations=9", "train.max_skipped=9", *EVALS]
    with pytest.warns(UserWarning, match="all 24 responses"):
        lines = train(config(tmp_path, *settings))
    tokens = [line["generated_tokens"] for line in lines if line["stage"] == "skipped"]
    each = 4 * (3 * 8 + 6 * 2)  # trees of 3 segments of 8 tokens, and 6 of the last 2
    assert tokens == [each * i for i in range(1, 4)]
