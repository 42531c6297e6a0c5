"""Trainer and embedded engine on a GPU against the CPU; SPO_TEST_BACKEND=cuda runs them.

So do test_memory_options.py and test_methods.py, with all their runs on the GPU.
"""

import dataclasses

import pytest
import torch
from forests import packed, random_forest

from spo.config.loss import PolicyLossConfig
from spo.config.policy import EMBEDDED, PolicyConfig
from spo.config.recipe import load_recipe
from spo.engines.hf import HFEngine
from spo.learn.loss import policy_loss
from spo.learn.model import to_device
from spo.learn.policy import load_policy
from spo.loop import train
from spo.records import Request, Sampling
from spo_kernels.testing import DEVICE

pytestmark = pytest.mark.skipif(DEVICE.type != "cuda", reason="SPO_TEST_BACKEND=cuda asks for it")
WAYS = {
    "tree": {},
    "dense": {"attention": "dense"},
    "rows": {"packing": "rows"},
    "checkpointed": {"gradient_checkpointing": True},
    "bf16": {"dtype": "bfloat16"},
    "autocast": {"autocast": True},
}


def gradient(config, seed=3, longest=90):
    """(loss, gradients) of one batch, on the CPU."""
    forest, advantages = random_forest(seed, trees=2, nodes=12, longest=longest)
    forest = dataclasses.replace(forest, rollout_logprobs=forest.rollout_logprobs - 3)
    (batch,), _ = packed(forest, advantages, 8192, packing=config.packing)
    model = load_policy(config)
    kind = torch.device(config.device).type
    with torch.autocast(kind, torch.bfloat16, enabled=config.autocast):
        loss = policy_loss(model, to_device(batch, config.device), PolicyLossConfig(), 1.0).loss
    loss.backward()
    return float(loss.detach()), torch.cat(
        [p.grad.float().cpu().flatten() for p in model.parameters()]
    )


@pytest.mark.parametrize("longest", [9, 90])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_is_the_step_of_the_cpu(way, longest):
    config = PolicyConfig(device="cuda", **WAYS[way])
    expected, exact = gradient(PolicyConfig(packing=config.packing), longest=longest)
    loss, found = gradient(config, longest=longest)
    rough = config.dtype == "bfloat16" or config.autocast
    assert loss == pytest.approx(expected, rel=0.05 if rough else 1e-4)
    assert float((found - exact).norm() / exact.norm()) < (0.2 if rough else 1e-3)


def samples(device, dtype):
    engine = HFEngine(str(EMBEDDED), device=device, dtype=dtype, max_num_seqs=16, max_model_len=128)
    for key in range(4):
        prefix = (2, 3 + key, 5, 7)
        sampling = Sampling(temperature=1.0, seed=key)
        engine.submit(Request(key, prefix, 6, 40, sampling))
    done = []
    while len(done) < 24:
        done += engine.poll()
    return {(c.key, c.index): c for c in done}


def test_the_embedded_engine_samples_what_it_samples_on_the_cpu():
    expected, found = (samples(device, torch.float32) for device in ("cpu", "cuda"))
    same = [found[key].token_ids == c.token_ids for key, c in expected.items()]
    assert sum(same) >= len(same) - 1  # a draw between two tokens may round to the other
    for key, c in expected.items():
        if found[key].token_ids == c.token_ids:
            assert found[key].logprobs == pytest.approx(c.logprobs, abs=1e-4)


RUN = [
    *("engine.name=hf", "policy.device=cuda", "train.prompts=8", "train.minibatches=2"),
    *("train.epochs=1", "eval.problems=8", "eval.every=0"),
]
RUNS = {
    "bf16": ["policy.dtype=bfloat16", "engine.dtype=bfloat16", "train.probe_tolerance=0.5"],
    "lora": ["policy.lora={rank: 4}", "loss.kl_coef=0.05"],
    "offloaded": ["train.offload=[optimizer, reference]", "loss.kl_coef=0.05"],
    "critic": [],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_is_the_run_bit_for_bit(name, tmp_path):
    def run(out, iterations, **options):
        settings = [*RUN, *RUNS[name], f"out={tmp_path / out}", f"train.iterations={iterations}"]
        lines = train(load_recipe("ppo" if name == "critic" else "demo-grpo", settings), **options)
        return [line for line in lines if line["stage"] == "train"]

    whole = run("whole", 3)
    run("parts", 1)
    parts = run("parts", 3, resume=True)
    for a, b in zip(whole[1:], parts[-2:], strict=True):
        for key in ("loss", "grad_norm", "reward_mean", "mismatch_kl"):
            assert a.get(key) == b.get(key), key
