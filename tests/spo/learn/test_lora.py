"""Adapters as the trained weights: the step of the merged model, exact resume, what peft loads."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sentences import one_sentence
from transformers import AutoModelForCausalLM

import spo
from spo.config.policy import EMBEDDED
from spo.config.recipe import load_recipe
from spo.learn import lora
from spo.learn.distributed import Ranks
from spo.learn.learner import Learner
from spo.learn.policy import load_policy
from spo.models.head import head_arguments

peft = pytest.importorskip("peft")
SMALL: dict[str, Any] = {
    "engine": {"name": "hf", "max_num_seqs": 32, "max_model_len": 96},
    "shape": {"kind": "star", "group_size": 4},
    "train": {"prompts": 4, "minibatches": 2, "learning_rate": 1e-3},
    "eval": {"problems": 4, "every": 0},
    "max_new_tokens": 40,
    "kl_coef": 0.1,
    "policy": {"lora": {"rank": 4, "alpha": 8}},
}
needs_4_bits = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def given(**changes: Any) -> dict[str, Any]:
    return SMALL | changes


def adapters(run: spo.Run) -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint / "policy" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = spo.train("grpo", out=tmp_path_factory.mktemp("whole"), iterations=3, **SMALL)
    assert any(line["grad_norm"] > 0 for line in run.metrics if line["stage"] == "train")
    return run


def test_a_run_resumes_to_the_same_bits(whole, tmp_path):
    class Stop:
        def on_iteration(self, line):
            return line["iteration"] != 0

    settings = given(out=tmp_path, iterations=3)
    spo.train("grpo", callbacks=[Stop()], **settings)
    run = spo.train("grpo", resume=True, **settings)
    ours, theirs = adapters(run), adapters(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
    assert any(x.any() for name, x in ours.items() if "lora_B" in name)  # it has trained
    assert run.scores == whole.scores and run.forest() == whole.forest()
    with one_sentence(["policy.lora", "rank=4", "rank=5"]):
        spo.train("grpo", resume=True, **given(out=tmp_path, policy={"lora": {"rank": 5}}))


def test_its_step_is_that_of_the_merged_model(whole):
    """The loss to 1e-5, and dA = s B^T dW, dB = s dW A^T of the merged model's dW."""
    recipe = load_recipe("grpo", **SMALL)
    ours = Learner(recipe, Ranks(), whole.checkpoint)
    ours.restore(whole.checkpoint)
    merged = Learner(load_recipe("grpo", **given(policy={}, kl_coef=0.0)), Ranks())
    merged.model.load_state_dict(dict(lora.merged(ours.model)), strict=False)
    forest = whole.forest()
    credit = recipe.credit.assign(forest, ours)
    packs, _ = ours._pack(forest, credit.tokens)
    losses: list[float] = []
    for learner in (ours, merged):
        ours.recipe = merged.recipe  # without the KL term, whose reference is another's
        loss = torch.stack([learner._policy_loss(packed).loss for packed in packs]).sum()
        loss.backward()
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    seen = 0
    layers: dict[str, Any] = dict(ours.model.named_modules())
    for name, parameter in merged.model.named_parameters():
        layer: Any = layers.get(name.removesuffix(".weight"))
        if not hasattr(layer, "lora_A"):
            continue
        a, b = layer.lora_A[lora.NAME].weight, layer.lora_B[lora.NAME].weight
        scale, wide = 8 / 4, parameter.grad
        assert wide is not None
        size = float(wide.norm())
        assert torch.allclose(a.grad, scale * b.T @ wide, atol=1e-5 * size), name
        assert torch.allclose(b.grad, scale * wide @ a.T, atol=1e-5 * size), name
        seen += size > 0
    assert seen > 10
    assert all(p.grad is None for n, p in ours.model.named_parameters() if ".lora_" not in n)


def test_the_reference_is_the_start_policy(whole):
    first, *_ = (line for line in whole.metrics if line["stage"] == "train")
    assert first["kl"] < 1e-3  # of the first iteration's steps
    learner = Learner(load_recipe("grpo", **SMALL), Ranks(), whole.checkpoint)
    start = load_policy(spo.Recipe().policy)
    forest = whole.forest()
    tokens = torch.ones(forest.token_ids.numel())
    (ours,) = learner.score(["reference"], forest, tokens)
    (policy,) = learner.score(["policy"], forest, tokens)
    learner.models["reference"] = start
    (theirs,) = learner.score(["reference"], forest, tokens)
    assert torch.equal(ours, theirs) and not torch.allclose(ours, policy, atol=1e-3)
    assert all(p.requires_grad for _, p in lora.adapter(learner.model))


def test_peft_and_transformers_load_what_it_leaves(whole):
    base = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, whole.checkpoint / "policy")
    ids = whole.tokenizer("arithmetic 3 + 4\n", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = loaded(ids).logits
        assert torch.allclose(logits, whole.model.float()(ids).logits, atol=0.05)  # stored in bf16
        with loaded.disable_adapter():
            assert not torch.allclose(logits, loaded(ids).logits, atol=1e-3)
    (found,) = spo.evaluate("grpo", checkpoint=whole, **given(train={}, policy={}))
    assert math.isfinite(found.pass_at_1)


def test_an_export_is_a_whole_model(whole, tmp_path):
    with one_sentence(["--merge", "an adapter", "peft"]):
        whole.export(tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
    stored = AutoModelForCausalLM.from_pretrained(whole.export(tmp_path / "a", merge=True))
    for name, weights in stored.named_parameters():
        assert torch.equal(weights, whole.model.get_parameter(name).to(weights.dtype)), name
    exact = whole.export(tmp_path / "b", merge=True, dtype="float32")
    exact = AutoModelForCausalLM.from_pretrained(exact, dtype="auto")
    learner = Learner(whole.recipe, Ranks(), whole.checkpoint)
    for name, weights in lora.merged(learner.model):
        assert torch.equal(weights, exact.get_parameter(name)), name


def test_adapters_of_a_bf16_policy_are_fp32_and_start_at_the_policy(tmp_path):
    recipe = load_recipe(
        "grpo", policy={"dtype": "bfloat16", "lora": {"rank": 2, "targets": ["q_proj", "up_proj"]}}
    )
    learner = Learner(recipe, Ranks())
    trained = dict(lora.adapter(learner.model))
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert {name.split(".")[-4] for name in trained} == {"q_proj", "up_proj"}
    optimized = [p for group in learner.optimizer.param_groups for p in group["params"]]
    assert [*map(id, optimized)] == [*map(id, trained.values())]
    start = load_policy(spo.Recipe(policy=recipe.policy).policy)
    for name, weights in lora.merged(learner.model):
        assert torch.equal(weights, start.get_parameter(name)), name


def test_restem_begins_again_with_fresh_adapters(tmp_path):
    settings = {key: value for key, value in SMALL.items() if key != "kl_coef"}
    run = spo.train("restem", out=tmp_path, iterations=1, **settings)
    learner, new = Learner(run.recipe, Ranks(), run.checkpoint), Learner(run.recipe, Ranks())
    fresh = dict(lora.adapter(new.model))
    assert not all(torch.equal(p, fresh[name]) for name, p in lora.adapter(learner.model))
    learner.restart()
    assert all(torch.equal(p, fresh[name]) for name, p in lora.adapter(learner.model))


@needs_4_bits
def test_weights_in_4_bits_train_resume_and_are_merged_as_they_are(tmp_path):
    four = {"lora": {"rank": 4, "quantize": "nf4"}}
    run = spo.train("grpo", out=tmp_path, iterations=1, **given(policy=four))
    (line,) = (line for line in run.metrics if line["stage"] == "train")
    assert line["grad_norm"] > 0 and line["probe_difference"] < 1e-3
    again = spo.train("grpo", out=tmp_path, iterations=2, resume=True, **given(policy=four))
    learner = Learner(again.recipe, Ranks(), again.checkpoint)
    weights = dict(lora.merged(learner.model))
    stored = dict(again.model.named_parameters())
    assert all(torch.equal(weights[n].to(x.dtype), x) for n, x in stored.items())
    start = load_policy(spo.Recipe().policy)
    changed = [
        n for n, x in start.named_parameters() if not torch.allclose(weights[n], x, atol=1e-3)
    ]
    assert changed and not any("embed" in name for name in changed)


def test_an_adapter_of_the_head_is_in_what_the_head_multiplies_with(tmp_path):
    config = load_recipe("grpo", policy={"lora": {"rank": 2, "targets": ["lm_head"]}}).policy
    model = load_policy(spo.Recipe().policy)
    if lora._tied(model):
        with one_sentence(["policy.lora.targets", "shares its weight"]):
            lora.attach(model, config, 0)
        return
    lora.attach(model, config, 0)
    layer: Any = model.get_output_embeddings()
    torch.nn.init.ones_(layer.lora_B[lora.NAME].weight)
    found = head_arguments(model, torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))["weight"]
    expected = dict(lora.merged(model))["lm_head.weight"]
    assert torch.allclose(found, expected) and not torch.equal(found, layer.base_layer.weight)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"policy": {"lora": {"rank": 0}}}, ["policy.lora.rank", "0"]),
        ({"policy": {"lora": {"rnk": 2}}}, ["unknown key policy.lora.rnk", "rank"]),
        ({"policy": {"lora": {}}, "parallel": "fsdp"}, ["train.parallel", "policy.lora", "fsdp"]),
        (
            {"policy": {"lora": {}}, "kl_coef": 0.1, "reference_every": 2},
            ["train.reference_every", "policy.lora"],
        ),
        ({"policy": {"lora": {"quantize": "int8"}}}, ["policy.lora.quantize", "nf4"]),
    ],
)
def test_settings_that_do_not_go_with_it_are_refused(settings, words):
    with one_sentence(words):
        load_recipe("grpo", **settings)


def test_targets_that_are_no_expression_are_refused():
    with one_sentence(["policy.lora.targets", "expected a regular expression", "'(['"]):
        load_recipe("grpo", policy={"lora": {"targets": "(["}})


@pytest.mark.parametrize("targets", [["no_proj"], ["embed_tokens"], "none.*"])
def test_targets_without_a_layer_are_refused(targets):
    recipe = load_recipe("grpo", policy={"lora": {"targets": targets}})
    with one_sentence(["policy.lora.targets"]):
        Learner(recipe, Ranks())


def test_a_damaged_adapter_is_one_sentence(whole, tmp_path):
    folder = tmp_path / "iter-000003" / "policy"
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"x" * 40)
    learner = Learner(load_recipe("grpo", **SMALL), Ranks())
    with one_sentence([str(Path("iter-000003")), "adapter_model.safetensors", "damaged"]):
        lora.load_adapter(folder, learner.model)


@pytest.mark.parametrize(
    ("module", "lora_settings"), [("peft", {}), ("bitsandbytes", {"quantize": "nf4"})]
)
def test_a_missing_package_is_named_with_its_command(monkeypatch, module, lora_settings):
    real = importlib.util.find_spec
    monkeypatch.setattr(lora, "find_spec", lambda name: None if name == module else real(name))
    extra = {"peft": "peft", "bitsandbytes": "optim"}[module]
    with one_sentence([module, f"pip install 'spo-kernels[{extra}]'"]):
        Learner(load_recipe("grpo", policy={"lora": lora_settings}), Ranks())
