"""Gradient checkpointing: the same loss and gradient, with fewer activations kept."""

import dataclasses
from typing import Any

import pytest
import torch
from forests import packed, random_forest
from sentences import one_sentence

from spo.config.lora import LoraConfig
from spo.config.loss import PolicyLossConfig
from spo.config.policy import PolicyConfig
from spo.config.recipe import load_recipe
from spo.learn import lora
from spo.learn.critic import load_critic, value_loss
from spo.learn.distributed import Ranks
from spo.learn.learner import Learner
from spo.learn.loss import policy_loss
from spo.learn.policy import load_policy
from spo.learn.recompute import checkpoint_layers, compile_layers

LOSS = PolicyLossConfig()
CASES: dict[str, dict[str, Any]] = {
    "tree": {},
    "dense": {"attention": "dense"},
    "rows": {"packing": "rows"},
    "bf16": {"dtype": "bfloat16"},
    "autocast": {"autocast": True},
    "lora": {"lora": LoraConfig(rank=4)},
    "dropout in train mode": {"dropout": True},
    "critic": {},
}


def batch_of(packing="tree"):
    forest, advantages = random_forest(3, trees=2, nodes=8, longest=9)
    (batch,), _ = packed(forest, advantages, 4096, packing=packing)
    return batch


def model_of(case: str, config: PolicyConfig):
    if case == "critic":
        critic: Any = load_critic(config)
        torch.nn.init.ones_(critic.score.weight)
        return critic
    model = load_policy(config)
    if config.lora is not None:
        pytest.importorskip("peft")
        lora.attach(model, config, seed=0)
        for name, parameter in lora.adapter(model):
            if "lora_B" in name:
                torch.nn.init.ones_(parameter)
    return model


def of_step(case: str, config: PolicyConfig) -> tuple[float, dict[str, torch.Tensor], int]:
    """(loss, gradients, bytes that the forward keeps)."""
    model, batch = model_of(case, config), batch_of(config.packing)
    kept: dict[int, int] = {p.untyped_storage().data_ptr(): 0 for p in model.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    torch.manual_seed(7)
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda x: x),
        torch.autocast("cpu", torch.bfloat16, enabled=config.autocast),
    ):
        if case == "critic":
            rows = torch.linspace(-1, 1, batch.targets.numel())
            loss = value_loss(model, batch, 0 * rows, rows, 10.0).loss
        else:
            loss = policy_loss(model, batch, LOSS, 1.0).loss
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return float(loss.detach()), grads, sum(kept.values())


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_same_and_less_is_kept(case):
    config = PolicyConfig(**CASES[case])
    loss, grads, kept = of_step(case, config)
    config = dataclasses.replace(config, gradient_checkpointing=True)
    ours, found, fewer = of_step(case, config)
    assert ours == loss and found.keys() == grads.keys()
    assert any(x.any() for x in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-6, atol=1e-7, msg=name)
    assert fewer < kept / 3


def test_a_step_with_bf16_masters_is_the_same(tmp_path):
    """Through the learner: the reference's forward, clipping and the optimiser's step."""
    batch, after = batch_of(), []
    for asked in ("false", "true"):
        recipe = load_recipe(
            "grpo",
            [
                f"policy={{dtype: bfloat16, gradient_checkpointing: {asked}}}",
                "loss.kl_coef=0.1",
                f"out={tmp_path}",
            ],
        )
        learner = Learner(recipe, Ranks())
        packs = learner._with_reference([batch])
        assert packs[0].ref_logprobs is not None
        figures = learner._update(
            learner.model, learner.optimizer, packs, learner._policy_loss, 1e-3
        )
        assert figures["sound"]
        after.append([p.detach().clone() for p in learner.model.parameters()])
    start = list(load_policy(recipe.policy).parameters())
    assert any(not torch.equal(a, b) for a, b in zip(after[0], start, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*after, strict=True))


def test_a_model_without_such_layers_is_refused(plain, monkeypatch):
    from spo.learn import recompute

    monkeypatch.setattr(recompute, "GradientCheckpointingLayer", torch.nn.LSTM)
    with one_sentence(["policy.gradient_checkpointing", "expected a model whose layers"]):
        checkpoint_layers(load_policy(PolicyConfig()))


def test_compiling_without_a_compiler_is_refused(plain, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with one_sentence(["policy.compile", "C++ compiler", "no-such-compiler"]):
        compile_layers(plain)
