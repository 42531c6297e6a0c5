"""The settings that save memory, every one with every other: the same losses, and exact resume.

SPO_TEST_BACKEND=cuda runs them on a GPU, where the optimiser and the reference can also wait on the
host.
"""

import dataclasses
import itertools
from functools import cache

import pytest
import torch
from forests import random_forest

from spo.config.recipe import load_recipe
from spo.credit.nodes import of_tokens
from spo.learn.checkpoint import State
from spo.learn.distributed import Ranks
from spo.learn.learner import Learner
from spo.records import Credit, Replay
from spo_kernels.testing import DEVICE

ON_GPU = DEVICE.type == "cuda"
TRAINED = {
    "all weights": [],
    "adapters": ["policy.lora={rank: 8}"],
    "adapters over 4 bits": ["policy.lora={rank: 8, quantize: nf4}"],
}
SHORT = "policy.dtype=bfloat16"
TYPES = {
    "fp32": [],
    "bf16, masters": [SHORT],
    "bf16, stochastic": [SHORT, "train.master_weights=stochastic"],
    "bf16, none": [SHORT, "train.master_weights=none"],
}
OPTIMIZERS = {"adamw": [], "adamw_8bit": ["train.optimizer=adamw_8bit"]}
LAYERS = {
    "kept": [],
    "checkpointed": ["policy.gradient_checkpointing=true"],
    "compiled": ["policy.compile=true"],
    "compiled, checkpointed": ["policy.compile=true", "policy.gradient_checkpointing=true"],
}
OFFLOADS = {"on the device": []}
if ON_GPU:
    OFFLOADS["optimizer"] = ["train.offload=[optimizer]"]
    OFFLOADS["reference"] = ["train.offload=[reference]"]
    OFFLOADS["both"] = ["train.offload=[optimizer, reference]"]
PLAIN = ("fp32", "adamw", "kept", "on the device")
CASES = [
    (what, *options)
    for what, *options in itertools.product(TRAINED, TYPES, OPTIMIZERS, LAYERS, OFFLOADS)
    if what == "all weights" or (options[0] in ("fp32", "bf16, masters"))
    if what == "all weights" or options[3] in ("on the device", "optimizer")
]
STEPS = 4


def marked(cases):
    """Those that compile are slow, but for one."""
    quick = ("adapters", "fp32", "adamw", "compiled, checkpointed", "on the device")
    for case in cases:
        slow = "compiled" in case[3] and case != quick
        yield pytest.param(case, id=", ".join(case), marks=[pytest.mark.slow] if slow else [])


def settings_of(case, folder):
    what, dtype, optimizer, layers, offload = case
    rate = 3e-5 if what == "all weights" else 3e-4
    return [
        *(f"policy.device={DEVICE.type}", f"out={folder}", "loss={kl_coef: 0.1}"),
        *("loss.prob_threshold=null", f"train.learning_rate={rate}", "train.weight_decay=0.1"),
        *TRAINED[what],
        *TYPES[dtype],
        *OPTIMIZERS[optimizer],
        *LAYERS[layers],
        *OFFLOADS[offload],
    ]


def step(learner, forest, advantages, state):
    """One optimiser step on the same two trees every time; the loss before it."""
    credit = Credit(of_tokens(forest, advantages))
    figures = learner.step(forest, credit, [0, 1], state, 1.0)
    state.iteration += 1
    assert state.skipped_steps == 0
    return figures["loss"]


def weights_of(learner):
    return {name: p.detach().cpu().clone() for name, p in learner.model.named_parameters()}


def losses_of(case, folder, sampled) -> list[float]:
    """The losses of STEPS steps; the last two are made again from a checkpoint."""
    recipe = load_recipe("grpo", settings_of(case, folder))
    learner, state = Learner(recipe, Ranks()), State()
    losses = [step(learner, *sampled, state) for _ in range(STEPS - 2)]
    saved = learner.save(state, Replay())
    assert saved is not None
    losses += [step(learner, *sampled, state) for _ in range(2)]
    again = Learner(recipe, Ranks(), saved)
    again.restore(saved)
    for expected in losses[-2:]:
        assert step(again, *sampled, State()) == expected
    after = weights_of(again)
    assert all(torch.equal(after[name], x) for name, x in weights_of(learner).items())
    return losses


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Two trees with the start policy's own logprobs, and advantages of their nodes."""
    forest, advantages = random_forest(3, trees=2, nodes=12, longest=9)
    case = ("all weights", *PLAIN)
    recipe = load_recipe("grpo", settings_of(case, tmp_path_factory.mktemp("sampled")))
    tokens = of_tokens(forest, forest.trained).float()
    (own,) = Learner(recipe, Ranks()).score(["reference"], forest, tokens)
    return dataclasses.replace(forest, rollout_logprobs=own), advantages


@pytest.fixture(scope="module")
def plain(tmp_path_factory, sampled):
    """The losses by what is trained and its type, without any other setting."""
    folder = tmp_path_factory.mktemp("plain")

    @cache
    def losses(what, dtype):
        return losses_of((what, dtype, *PLAIN[1:]), folder / f"{what}, {dtype}", sampled)

    return losses


@pytest.mark.parametrize("case", marked(CASES))
def test_the_losses_are_the_same_within_rounding_and_resume_is_exact(
    case, sampled, plain, tmp_path
):
    what, dtype, optimizer, layers, _ = case
    if "adapters" in what:
        pytest.importorskip("peft")
    if "4 bits" in what or optimizer == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    losses, expected = losses_of(case, tmp_path, sampled), plain(what, dtype)
    gone = max(expected) - min(expected)
    compiled, short = "compiled" in layers, dtype != "fp32"
    same = 1e-6 if not compiled else 0.1 if short else 3e-5  # fused operators round less often
    assert losses[0] == pytest.approx(expected[0], rel=same)
    assert losses[0] == pytest.approx(plain(what, "fp32")[0], rel=0.1)
    rounded = optimizer != "adamw" or (compiled and short)
    bound = (0.2 if short else 0.05) * gone if rounded else 1e-5 if compiled else 1e-6
    assert losses == pytest.approx(expected, abs=bound) and gone > 0.01
