"""Other trainers of TRL with our head, and the benchmark of a step."""

import json
import sys
import warnings

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from rows_trl import trainer_of  # noqa: E402
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer  # noqa: E402

from benchmarks import trl_step  # noqa: E402
from spo_kernels.integrations import patch_trl_head  # noqa: E402

VOCAB = 60
COMMON = dict(
    use_cpu=True, bf16=False, report_to="none", save_strategy="no", logging_steps=1, max_steps=3,
    optim="sgd", learning_rate=1.0, lr_scheduler_type="constant", disable_tqdm=True,
    gradient_checkpointing=False, per_device_train_batch_size=2,
)  # fmt: skip


def sft(folder):
    texts = ["w3 w4 w5 w6", "w7 w8", "w9 w10 w11 w12 w13", "w3 w3 w4"]
    return SFTTrainer, SFTConfig(output_dir=folder, **COMMON), {"text": texts}


def dpo(folder):
    pairs = {"prompt": ["w3 w4", "w5"], "chosen": [" w6 w7 w8", " w9"], "rejected": [" w10", " w3"]}
    return DPOTrainer, DPOConfig(output_dir=folder, **COMMON), pairs


def run(kind, policy, folder):
    """The logged numbers of three steps, and the weights after them."""
    from transformers import LlamaForCausalLM

    trainer_of, config, data = kind(str(folder))
    model = LlamaForCausalLM.from_pretrained(policy)
    trainer = trainer_of(
        model=model, args=config, train_dataset=Dataset.from_dict(data),
        processing_class=trl_step.build_tokenizer(VOCAB),
    )  # fmt: skip
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    return logs, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", [sft, dpo])
def test_losses_metrics_and_weights_are_trls(kind, tmp_path):
    """SFT logs the accuracy of the first choice, DPO the mean logit."""
    policy = tmp_path / "policy"
    trl_step.build_model(VOCAB, 32, 2).save_pretrained(policy)
    logs, weights = run(kind, policy, tmp_path)
    with patch_trl_head():
        our_logs, our_weights = run(kind, policy, tmp_path)
    assert len(logs) == 3 and any("accuracy" in key or "logits" in key for key in logs[0])
    for ours, theirs in zip(our_logs, logs, strict=True):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    assert float((weights - our_weights).abs().max()) < 1e-5


@pytest.mark.parametrize("kind, warned", [("RLOO", 1), ("GRPO", 0)])
def test_a_trainer_without_the_mask_warns(kind, warned):
    trainer = trainer_of(kind, beta=0.0, max_steps=2, gradient_checkpointing=False)
    with patch_trl_head(prob_threshold=0.5), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert sum("trains without the mask" in str(w.message) for w in caught) == warned


def test_a_step_is_timed_by_head(tmp_path, monkeypatch, capsys):
    file = tmp_path / "step.json"
    small = ["--vocab", "400", "--hidden", "32", "--length", "8", "--rounds", "1", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", ["trl_step", *small, "--old", "--json", str(file)])
    trl_step.main()
    rows = json.loads(file.read_text())
    assert [row["implementation"] for row in rows] == ["TRL", "patched", "patched, 10% kept"]
    assert all(row["ms"] > 0 and row["vocab"] == 400 and row["commit"] for row in rows)
    assert capsys.readouterr().out.count("of TRL's") == 3


def test_the_threshold_keeps_the_share_asked_for():
    model, tokenizer = trl_step.build_model(400, 32, 1), trl_step.build_tokenizer(400)
    completions = trl_step.completions_of(400, 20)
    threshold = trl_step.threshold_for(model, tokenizer, completions, 0.1)
    below = total = 0
    for prompt, group in completions.items():
        head = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([head + c for c in group])
        p = model(input_ids=ids).logits.softmax(-1)[:, len(head) - 1 : -1]
        p = p.gather(-1, ids[:, len(head) :, None])
        below, total = below + int((p < threshold).sum()), total + p.numel()
    assert total == 4 * 4 * 20 and below / total == pytest.approx(0.1, abs=0.005)
