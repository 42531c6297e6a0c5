"""`patch_transformers` on small models of several families: logprobs of the model's own logits."""

import copy
import inspect
import types

import pytest
import torch

from spo_kernels.integrations import patch_transformers
from spo_kernels.model_logits import measure
from spo_kernels.testing import DEVICE

transformers = pytest.importorskip("transformers")

V = 53
SIZES = dict(vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
DENSE = SIZES | dict(intermediate_size=24, num_key_value_heads=1, max_position_embeddings=32)
CONFIGS = {
    "llama": ("LlamaConfig", DENSE),
    "qwen2, tied": ("Qwen2Config", DENSE | dict(tie_word_embeddings=True)),
    "gpt2": ("GPT2Config", dict(vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=32)),
    "phi, a bias": ("PhiConfig", DENSE | dict(num_key_value_heads=2)),
}
BENT = {
    "gemma2, a soft cap": ("Gemma2Config", DENSE | dict(head_dim=8, final_logit_softcapping=2.0)),
    "cohere, times a scale": ("CohereConfig", DENSE | dict(logit_scale=0.25)),
    "granite, over a scale": ("GraniteConfig", DENSE | dict(logits_scaling=4.0)),
}


def make(name: str, dtype: torch.dtype = torch.float32):
    kind, options = (CONFIGS | BENT)[name]
    special = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**options, **special)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)  # biases and norms too
    return model.to(dtype)


def batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (2, 7), generator=generator, device="cpu").to(DEVICE)
    attention = torch.ones_like(ids)
    attention[1, 5:] = 0
    return ids, attention, ids.roll(-1, 1)


@pytest.mark.parametrize("name", [*CONFIGS, *BENT])
def test_logprobs_entropy_and_gradients_are_those_of_the_models_logits(name):
    """Against log_softmax of the logits of the same model in fp64, forward and every parameter."""
    ids, attention, targets = batch()
    mask = attention.bool()
    mask[:, -1] = False
    exact = make(name, torch.float64)
    logits = exact(input_ids=ids, attention_mask=attention).logits / 0.7
    log_p = logits.log_softmax(-1)
    want = log_p.gather(-1, targets[..., None])[..., 0]
    want_entropy = -(log_p.exp() * log_p).sum(-1)
    coefficients = torch.randn(2, 2, 7, dtype=torch.float64) * mask
    (coefficients[0] * want + coefficients[1] * want_entropy).sum().backward()

    model = make(name)
    patch_transformers(model)
    logprobs, entropy = model(
        input_ids=ids, attention_mask=attention, token_ids=targets, loss_mask=mask,
        temperature=0.7, entropy=True,
    )  # fmt: skip
    (coefficients[0] * logprobs + coefficients[1] * entropy).sum().backward()
    torch.testing.assert_close(logprobs.double()[mask], want[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double()[mask], want_entropy[mask], rtol=1e-5, atol=1e-5)
    for (key, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        scale = float(q.grad.abs().max()) + 1e-9
        assert float((p.grad.double() - q.grad).abs().max()) < 2e-5 * scale + 1e-7, key


@pytest.mark.parametrize(
    "name, expected",
    [
        ("llama", {}),
        ("gemma2, a soft cap", {"logit_softcap": 2.0}),
        ("cohere, times a scale", {"logit_scale": 0.25}),
        ("granite, over a scale", {"logit_scale": 0.25}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_forward_does_to_the_logits_is_measured(name, expected, dtype):
    assert measure("patch_transformers", make(name, dtype)) == expected


def test_a_soft_cap_far_beyond_the_logits_is_found():
    """The logits of an untrained model do not reach a cap of 30: the probe does."""
    model = make("gemma2, a soft cap")
    model.config.final_logit_softcapping = 30.0
    assert measure("patch_transformers", model) == {"logit_softcap": 30.0}


def test_without_token_ids_the_forward_is_the_models_own():
    ids, attention, _ = batch()
    model = make("llama")
    before = model(input_ids=ids, attention_mask=attention, labels=ids)
    patch_transformers(model)
    after = model(input_ids=ids, attention_mask=attention, labels=ids)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert "input_ids" in inspect.signature(model.forward).parameters
    greedy = dict(max_new_tokens=2, do_sample=False)
    generated = model.generate(ids[:1, :3], **greedy)
    assert torch.equal(generated, make("llama").generate(ids[:1, :3], **greedy))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_copy_runs_on_its_own_weights(wrapped):
    """As a frozen reference does: the copy of a patched policy, one with a hook around too."""
    model = make("llama")
    if wrapped:
        inner = type(model).forward
        model.forward = types.MethodType(lambda self, *a, **k: inner(self, *a, **k), model)
    patch_transformers(model)
    ids, attention, targets = batch()
    given = {"input_ids": ids, "attention_mask": attention}
    want = model(**given).logits, model(**given, token_ids=targets)
    frozen = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(frozen(**given).logits, want[0])
    assert torch.equal(frozen(**given, token_ids=targets), want[1])
    assert not model(**given).logits.any()


def test_undo_gives_the_forward_back():
    ids, attention, targets = batch()
    model = make("llama")
    before = model.forward
    with patch_transformers(model):
        assert model(input_ids=ids, token_ids=targets).shape == ids.shape
    assert model.forward == before and "forward" not in vars(model)
    undo = patch_transformers(model)
    undo()
    undo()  # has nothing left to do
    assert torch.equal(model(input_ids=ids).logits, make("llama")(input_ids=ids).logits)


def test_training_mode_and_caches_stay_as_they_were():
    model = make("llama").train()
    patch_transformers(model)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_labels_beside_token_ids_are_refused():
    ids, _, targets = batch()
    model = make("llama")
    patch_transformers(model)
    with pytest.raises(TypeError, match="expected neither labels nor logits_to_keep"):
        model(input_ids=ids, token_ids=targets, labels=ids)


@pytest.mark.parametrize("name", ["temprature", "logit_softcap", "batch_invariant"])
def test_a_keyword_that_no_one_knows_is_refused(name):
    ids, attention, targets = batch()
    model = make("llama")
    patch_transformers(model)
    with pytest.raises(TypeError, match=f"^patch_transformers: expected inputs of .*found {name}$"):
        model(input_ids=ids, token_ids=targets, **{name: 0.5})
    positions = torch.arange(7)[None]
    more = dict(position_ids=positions, output_hidden_states=True, attention_mask=attention)
    assert model(input_ids=ids, token_ids=targets, **more).shape == ids.shape


def test_what_is_patched_already_is_refused():
    model = make("llama")
    with patch_transformers(model), pytest.raises(RuntimeError) as error:
        patch_transformers(model)
    assert str(error.value) == (
        "patch_transformers: already applied; call the Patch to undo it first"
    )
    patch_transformers(model)


def test_models_that_are_no_causal_model_of_transformers_are_refused():
    with pytest.raises(ValueError) as error:
        patch_transformers(torch.nn.Linear(2, 2))
    assert str(error.value) == "patch_transformers: expected a causal model, found Linear"


def test_a_model_of_peft_is_refused_and_the_model_inside_is_not():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(make("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError) as error:
        patch_transformers(wrapped)
    assert str(error.value) == (
        "patch_transformers: expected the model inside PeftModel: pass model.get_base_model(), "
        "which keeps the adapters"
    )
    ids, _, targets = batch()
    patch_transformers(wrapped.get_base_model())
    assert wrapped(input_ids=ids, token_ids=targets).shape == ids.shape


class Offset(torch.nn.Module):
    """A head that is not linear."""

    def __init__(self, head):
        super().__init__()
        self.weight = head.weight

    def forward(self, hidden):
        return torch.nn.functional.linear(hidden, self.weight) + hidden.mean()


def test_models_whose_logits_are_something_else_are_refused():
    model = make("llama")
    model.lm_head = Offset(model.lm_head)
    with pytest.raises(ValueError, match="expected a linear head, LlamaForCausalLM has Offset"):
        patch_transformers(model)
    with pytest.raises(ValueError, match="expected a causal model, found LlamaModel"):
        patch_transformers(make("llama").model)

    shifted = make("granite, over a scale")

    def forward(**inputs):
        out = type(shifted).forward(shifted, **inputs)
        out.logits[..., 1] += 1.0
        return out

    shifted.forward = forward
    with pytest.raises(ValueError, match="expected logits of GraniteForCausalLM that are"):
        patch_transformers(shifted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_that_no_configuration_names_are_measured(dtype):
    """MiniCPM3 divides the hidden states; a model of one's own may bend logits in any order."""
    model = make("llama", dtype)

    def forward(**inputs):
        logits = model.lm_head(model.model(**inputs).last_hidden_state / 6)
        return transformers.modeling_outputs.CausalLMOutput(
            logits=7.5 * torch.tanh(logits * 0.375 / 7.5)
        )

    model.forward = forward
    found = measure("patch_transformers", model)
    assert found == {"logit_softcap": 7.5, "logit_scale": pytest.approx(0.375 / 6, rel=1e-6)}


def test_an_adapter_of_the_head_that_comes_later_counts():
    """peft replaces the head by a LoRA layer, whose `weight` is that without the adapter."""
    peft = pytest.importorskip("peft")
    ids, _, targets = batch()
    model = make("llama")
    patch_transformers(model)
    config = peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    want = wrapped(input_ids=ids).logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    got = wrapped(input_ids=ids, token_ids=targets)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    got.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in wrapped.parameters() if p.requires_grad)
