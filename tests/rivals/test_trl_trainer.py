"""GRPOTrainer with our head and no mask: the losses and, after six steps, the weights of TRL's."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import trl_run  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402
from trl.trainer import utils  # noqa: E402

from benchmarks.trl_step import build_model, build_tokenizer, build_trainer  # noqa: E402

LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A folder with an untrained model."""
    folder = tmp_path_factory.mktemp("policy")
    build_model(trl_run.VOCAB, 32, 2).save_pretrained(folder)
    return folder


def check(theirs, ours):
    losses, weights, start = theirs
    assert ours[0] == pytest.approx(losses, rel=1e-4, abs=2e-6)
    assert max(abs(x) for x in losses) > 1e-5
    assert float((weights - start).abs().max()) > 1e-2  # the steps went somewhere
    assert float((ours[1] - weights).abs().max()) < 1e-5


def compare(policy, **options):
    check(*(trl_run.run(policy, patched, **options) for patched in (False, True)))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_losses_and_weights_are_trls(policy, loss_type):
    """Two iterations over a batch: the ratio is not 1."""
    compare(policy, loss_type=loss_type, num_iterations=2)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_with_a_kl_term(policy, loss_type):
    compare(policy, loss_type=loss_type, beta=0.2)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_with_two_accumulation_steps(policy, loss_type):
    halves = dict(gradient_accumulation_steps=2, per_device_train_batch_size=8)
    compare(policy, loss_type=loss_type, beta=0.1, **halves)


def test_with_an_entropy_bonus(policy):
    compare(policy, loss_type="dapo", entropy_coef=0.1, num_iterations=2)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_two_ranks(policy, loss_type, tmp_path):
    options = json.dumps(dict(loss_type=loss_type, per_device_train_batch_size=8, beta=0.1))
    launch = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    file = tmp_path / "results.pt"
    done = subprocess.run(
        [sys.executable, *launch, trl_run.__file__, str(policy), str(file), options],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(file)
    assert results["ranks"] == 2
    check(*results["runs"])


@pytest.mark.parametrize("iterations", [1, 2])
def test_masks_that_drop_all_none_and_some_tokens(policy, iterations):
    """Words of 60 have probabilities near 1/60. With two iterations TRL has old logprobs."""
    theirs = trl_run.run(policy, False, num_iterations=iterations)[1]
    every, none, some = (
        trl_run.run(policy, True, prob_threshold=threshold, num_iterations=iterations)[1:]
        for threshold in (1.0, 1e-9, 0.0165)
    )
    assert float((every[0] - theirs).abs().max()) < 1e-5
    assert torch.equal(*none)
    for other in (theirs, none[0]):
        assert float((some[0] - other).abs().max()) > 1e-3


@pytest.mark.parametrize("options", [dict(top_entropy_quantile=0.4), dict(entropy_coef=0.1)])
def test_a_masked_step_is_the_same_with_old_logprobs(policy, options):
    """The first of two iterations has ratio 1, so it is the step of one iteration."""
    options = options | dict(loss_type="bnpo", max_steps=1, prob_threshold=0.0165)
    one, two = (trl_run.run(policy, True, num_iterations=n, **options)[1:] for n in (1, 2))
    assert float((one[0] - one[1]).abs().max()) > 1e-3
    assert float((one[0] - two[0]).abs().max()) < 1e-6


def test_the_snippet_of_the_page(policy, tmp_path):
    """docs/losses.md: the patch before `train` is the patch of this file's other tests."""
    page = (ROOT / "docs" / "losses.md").read_text()
    (code,) = re.findall(r"```python\n(from [^`]*patch_trl_head.*?)```", page, re.DOTALL)
    model = LlamaForCausalLM.from_pretrained(policy)
    options = dict(optim="sgd", learning_rate=1.0, max_completion_length=12)
    trainer = build_trainer(model, build_tokenizer(trl_run.VOCAB), tmp_path, **options)
    before, scores_padding = utils._ChunkedLogProbFunction, utils._use_triton
    exec(code, {"trainer": trainer})
    assert utils._ChunkedLogProbFunction is not before
    utils._ChunkedLogProbFunction, utils._use_triton = before, scores_padding
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert float((weights - trl_run.run(policy, True)[1]).abs().max()) < 1e-6
