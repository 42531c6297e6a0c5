"""The sweep over architectures: small models keep what they are, and faults are found."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING

from spo.config.policy import PolicyConfig
from spo.engines.hf import HFEngine
from spo.learn.model import sequence_logprobs
from spo.learn.policy import load_policy
from spo.records import Request, Sampling

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

from architecture_checks import Truth, check_engine, check_trainer, compare, judged  # noqa: E402
from architecture_table import counts, outcome, render  # noqa: E402
from architectures import Child  # noqa: E402
from small_models import (  # noqa: E402
    ATTEMPTS,
    POSITIONS,
    WINDOW,
    architectures,
    layer_kinds,
    other_forms,
    small_config,
    small_model,
)

EXPECTED = {  # trainer's settings and engine's verdict
    "llama": ("policy.packing=tree", "right"),
    "granite": ("policy.packing=tree", "right"),  # a scale before the softmax
    "gemma2": ("policy.packing=tree", "right"),  # windows, soft caps of scores and of logits
    "deepseek_v2": ("policy.packing=tree", "right"),  # keys and values of different widths
    "mamba": ("policy.packing=rows", "refused"),
    "roberta": ("", "refused"),  # reads later tokens
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """What the command writes about six architectures, by name and form."""
    file = tmp_path_factory.mktemp("sweep") / "rows.json"
    command = [sys.executable, "tools/architectures.py", *EXPECTED, "--json", file, "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return {(row["name"], row["form"]): row for row in json.loads(file.read_text())["rows"]}


@pytest.mark.parametrize("name", EXPECTED)
def test_an_architecture_is_right_or_refused(rows, name):
    settings, engine = EXPECTED[name]
    row = rows[name, ""]
    assert row["trainer"]["kind"] == ("right" if settings else "refused")
    assert row["trainer"]["settings"] == settings and row["engine"]["kind"] == engine
    assert outcome(row) == ("trains" if settings else "refused")
    assert row["causal"] == (name != "roberta")


def test_a_decoder_is_a_form_of_its_own(rows):
    assert rows["roberta", "is_decoder"]["trainer"]["kind"] == "right"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    small_model("llama", folder, {})
    return folder, Truth(folder)


class Scaled(torch.nn.Module):
    def __init__(self, head, factor):
        super().__init__()
        self.weight, self.bias, self.factor = head.weight, None, factor

    def forward(self, states):
        return self.factor * (states @ self.weight.T)


@pytest.mark.parametrize("factor", [1.0, 1.0005])
def test_a_forgotten_factor_is_wrong(llama, factor):
    """The model multiplies its logits by 1.0005, and the trainer does not know."""
    folder, _ = llama
    truth = Truth(folder)
    truth.model.lm_head = Scaled(truth.model.lm_head, factor)
    truth.measure()
    config = PolicyConfig(path=str(folder))
    verdict = compare(load_policy(config), config, truth)
    assert verdict.kind == ("right" if factor == 1 else "WRONG"), verdict.reason


def test_the_error_of_a_gradient_is_relative_and_over_all_weights(llama):
    folder, truth = llama
    policy = load_policy(PolicyConfig(path=str(folder)))
    given = dict(truth.model.named_parameters())
    for name, parameter in policy.named_parameters():
        parameter.grad = 1.01 * given[name].grad
    assert abs(truth.gradient_error(policy) - 0.01) < 1e-5
    policy.get_input_embeddings().weight.grad = None
    total = sum(float(p.grad.square().sum()) for p in given.values())
    lost = float(given["model.embed_tokens.weight"].grad.square().sum())
    expected = ((1e-4 * (total - lost) + lost) / total) ** 0.5
    assert abs(truth.gradient_error(policy) - expected) < 1e-4 * expected


def test_an_engine_with_other_weights_is_wrong(llama, tmp_path):
    folder, truth = llama
    assert check_engine(folder, truth).kind == "right"
    other = Truth(folder).model
    with torch.no_grad():
        other.lm_head.weight.mul_(1.001)
    other.save_pretrained(tmp_path)
    assert check_engine(tmp_path, truth).kind == "WRONG"


def test_an_exception_is_wrong_and_a_refusal_is_not(llama, tmp_path):
    found = judged(check_trainer, tmp_path, llama[1])  # an empty folder
    assert found["kind"] == "refused" and "holds no config.json" in found["reason"]
    found = judged(check_trainer, llama[0], None)
    assert found["kind"] == "WRONG" and found["reason"].startswith("AttributeError at ")


def test_small_models_keep_every_kind_of_layer():
    for name in ("gemma3_text", "qwen3_next", "jamba"):
        kind = CONFIG_MAPPING[name]
        config = small_config(kind, ATTEMPTS[0])
        assert layer_kinds(config) == layer_kinds(kind()), name
        assert config.num_hidden_layers <= 8 and config.max_position_embeddings == POSITIONS
    assert small_config(CONFIG_MAPPING["gemma3_text"], ATTEMPTS[0]).sliding_window == WINDOW


def test_layers_that_a_default_leaves_out_are_a_form(tmp_path):
    (form,) = other_forms(small_model("qwen2", tmp_path, {}), True)
    assert form["layer_types"] == ["full_attention", "sliding_attention"]
    model = small_model("qwen2", tmp_path, form)
    assert model.config.layer_types == form["layer_types"] and model.config.sliding_window == 16


def test_transformers_is_asked_what_there_is():
    assert len(architectures()) > 200 and {"llama", "llava"} < set(architectures())


@pytest.mark.parametrize("stage", ["unbuilt", "engine"])
def test_a_process_that_dies_ends_its_own_row_only(stage):
    """Here a process that says how far it came, and ends."""
    child = Child.__new__(Child)
    answer = json.dumps({"name": "llama", "form": "", "stage": stage})
    code = f"input(); print({answer!r}, flush=True); raise SystemExit(3)"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    child.process = subprocess.Popen([sys.executable, "-c", code], **pipes)
    (row,) = child.check("llama")
    died = "the process died (3)"
    assert row[stage] == (died if stage == "unbuilt" else {"kind": "WRONG", "reason": died})


def test_the_table_tells_every_outcome():
    right = {"kind": "right", "reason": "", "logprobs": 2e-6, "gradient": 1e-6}
    right |= {"settings": "policy.packing=tree", "advice": ""}
    rows_only = right | {"advice": "policy.path: the model is 2.5e-1 nats off; policy.packing=rows"}
    rows_only["settings"] = "policy.packing=rows"
    no = {"kind": "refused", "reason": "policy.path: the model recurs; use vllm", "settings": ""}
    off = {"kind": "WRONG", "reason": "off by 2 nats", "settings": ""}
    rows = [
        {"name": "a", "form": "", "trainer": right, "engine": no},
        {"name": "b", "form": "", "trainer": no, "engine": no},
        {"name": "c", "form": "", "trainer": right, "engine": off},
        {"name": "d", "form": "", "unbuilt": "no `x`"},
        {"name": "a", "form": "conv", "trainer": rows_only, "engine": right},
    ]
    results = {"rows": rows, "date": "2026-11-26", "transformers": "5", "torch": "2"}
    results["commit"] = "abc"
    assert counts(results) == {"trains": 1, "refused": 1, "WRONG": 1, "unbuilt": 1}
    page = render(results)
    assert "| a | packing=tree | 2e-06 | 1e-06 | refused |\n" in page
    assert "| a (conv) | packing=rows | 2e-06 | 1e-06 | 2e-06 |\n" in page
    assert "### Refused\n\n- b: `recurs; use vllm`\n" in page
    assert "### Wrong\n\n- c: `engine: off by 2 nats`\n" in page
    assert "### Refused by the embedded engine\n\n- a: `recurs; use vllm`\n" in page
    assert "- a (conv): `is … nats off; policy.packing=rows`\n" in page
    assert "### Not built at small size\n\n- d: `no x`\n" in page


def test_an_images_token_is_a_texts_token_in_trainer_and_engine(tmp_path):
    """The whole model would put the embedding of a pad token in its place."""
    model = small_model("gemma4_unified", tmp_path, {})
    trainer, engine = load_policy(PolicyConfig(path=str(tmp_path))), HFEngine(str(tmp_path))
    prefix = (5, 9, 30, model.config.audio_token_id)
    engine.submit(Request(0, prefix, 4, 4, Sampling(0)))
    done = []
    while len(done) < 4:
        done += engine.poll()
    for sample in done:
        own = sequence_logprobs(trainer, list(prefix), list(sample.token_ids), 1.0)
        assert own == pytest.approx(sample.logprobs, abs=1e-4)


@pytest.mark.parametrize("kind", ["ernie4_5_moe", "exaone_moe"])
def test_experts_that_rounding_changes_are_no_fault(kind, tmp_path):
    small_model(kind, tmp_path, {})
    load_policy(PolicyConfig(path=str(tmp_path), dtype="bfloat16"))
