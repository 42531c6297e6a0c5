"""The weight of a head with adapters, and the module of model and loss, in one process."""

import copy
import itertools
import sys
import warnings

import pytest
import torch
from kernel_cases import needs_fast, on_cpu_tensors
from torch import nn
from torch.utils import _pytree
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from spo_kernels import (
    FusedPolicyLoss,
    head_weight,
    linear_masked_ppo_loss,
    linear_token_logprobs,
    masked_ppo_loss,
)

pytestmark = [on_cpu_tensors, needs_fast("policy_loss")]
V, D = 23, 8
SMALL = {
    **{"vocab_size": V, "hidden_size": D, "intermediate_size": 12, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4},
}
ROBERTA = {k: x for k, x in SMALL.items() if k not in ("num_key_value_heads", "head_dim")}


def causal(tied=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": D, "intermediate_size": 12, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": tied}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=V, **sizes, **heads, initializer_range=0.5))


def batch():
    g = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(V, (3, 7), generator=g),
        "attention_mask": torch.ones(3, 7, dtype=torch.int64),
        "old_logprobs": -0.2 - 2 * torch.rand(3, 6, generator=g),
        "advantages": torch.randn(3, 6, generator=g),
        "loss_mask": torch.rand(3, 6, generator=g) < 0.8,
    }


def loss_from_logits(model, given):
    """PyTorch's loss from what the model's own forward gives."""
    logits = model(given["input_ids"], attention_mask=given["attention_mask"]).logits[:, :-1]
    tokens = given["input_ids"][:, 1:], given["old_logprobs"], given["advantages"]
    return masked_ppo_loss(logits, *tokens, loss_mask=given["loss_mask"], backend="reference")


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_as_its_forward(model, given=None):
    """Loss, logprobs and all gradients are those of the model's own forward."""
    given = batch() if given is None else given
    want = loss_from_logits(model, given)
    leaves = list(trained(model).values()) if want.loss.requires_grad else []
    grads = torch.autograd.grad(want.loss, leaves, allow_unused=True) if leaves else ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = FusedPolicyLoss(model)(**given)
    torch.testing.assert_close(found.loss, want.loss, rtol=1e-5, atol=1e-6)
    close = {"rtol": 1e-5, "atol": 1e-5, "equal_nan": True}  # NaN: the masks drop it
    torch.testing.assert_close(found.logprobs, want.logprobs, **close)
    assert found.loss.requires_grad == want.loss.requires_grad
    model.zero_grad()
    if not leaves:
        return set()
    found.loss.backward()
    for (name, p), grad in zip(trained(model).items(), grads, strict=True):
        assert (p.grad is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6, msg=name)
    return {name for name, p in trained(model).items() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_model(tied):
    model = causal(tied)
    reached = assert_as_its_forward(model)
    assert ("model.embed_tokens.weight" if tied else "lm_head.weight") in reached
    assert head_weight(model) is model.lm_head.weight
    assert head_weight(model.lm_head) is model.lm_head.weight
    assert head_weight(torch.compile(model)) is model.lm_head.weight


def test_options_of_the_module_and_of_the_call():
    model, given = causal(), batch()
    hidden = model.model(given["input_ids"]).last_hidden_state
    ids = given["input_ids"].roll(-1, 1)
    padded = {k: nn.functional.pad(x, (0, 1)) for k, x in given.items() if x.shape[1] == 6}
    options = {"temperature": 0.7, "clip_eps_high": 0.3, "policy_norm": 5.0}
    want = linear_masked_ppo_loss(hidden, model.lm_head.weight, ids, **padded, **options)
    module = FusedPolicyLoss(model, temperature=9.0, clip_eps_high=0.3)
    given = {"input_ids": given["input_ids"], "attention_mask": given["attention_mask"], **padded}
    found = module(**given, token_ids=ids, temperature=0.7, policy_norm=5.0)
    torch.testing.assert_close(found.loss, want.loss)
    states = FusedPolicyLoss(
        model, hidden_states=lambda m, x, scale: scale * m.model(x).last_hidden_state, **options
    )
    del given["attention_mask"]
    torch.testing.assert_close(states(**given, token_ids=ids, scale=1.0).loss, want.loss)
    assert (states(**given, token_ids=ids, scale=2.0).loss - want.loss).abs() > 1e-3


def test_a_record_is_a_pytree():
    out = FusedPolicyLoss(causal())(**batch())
    leaves, spec = _pytree.tree_flatten(out)
    assert any(x is out.loss for x in leaves)
    again = _pytree.tree_unflatten(leaves, spec)
    assert type(again) is type(out) and all(
        a is b for a, b in zip(vars(again).values(), vars(out).values(), strict=True)
    )


def test_what_the_module_refuses():
    with pytest.raises(TypeError, match="expected options of linear_masked_ppo_loss, found clip"):
        FusedPolicyLoss(causal(), clip=0.2)
    with pytest.raises(ValueError, match="expected a model with get_output_embeddings"):
        FusedPolicyLoss(nn.ReLU())


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (
            Gemma2ForCausalLM(Gemma2Config(**SMALL)),
            {},
            "logit_softcap: expected .*=30.0, which Gem",
        ),
        (Gemma2ForCausalLM(Gemma2Config(**SMALL)), {"logit_softcap": 20.0}, "=30.0, .* found 20.0"),
        (GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=8.0)), {}, "logit_scale=0.125"),
        (LlamaForCausalLM(LlamaConfig(**SMALL)), {"logit_scale": 2.0}, "expected logit_scale=1.0"),
        (
            RobertaForCausalLM(RobertaConfig(**ROBERTA, is_decoder=True)),
            {},
            "the last hidden state",
        ),
    ],
)
def test_the_module_takes_the_logits_that_the_model_makes(model, options, message):
    with pytest.raises(ValueError, match=message):
        FusedPolicyLoss(model, **options)
    FusedPolicyLoss(model, hidden_states=lambda m, x: m.base_model(x).last_hidden_state)
    if isinstance(model, Gemma2ForCausalLM):
        FusedPolicyLoss(model, logit_softcap=30.0)


def test_a_call_refuses_what_the_model_would_swallow():
    """Models of transformers take any keyword, so a misspelled mask was no mask."""
    module, given = FusedPolicyLoss(causal()), batch()
    want = module(**given).loss
    for wrong in ("loss_msk", "clip_eps", "labels"):
        with pytest.raises(TypeError, match=f"FusedPolicyLoss: .*{wrong}"):
            module(**given, **{wrong: torch.ones(1)})
    for name in ("old_logprobs", "advantages"):
        with pytest.raises(ValueError, match=f"{name}: expected float32 .* cast_forward_inputs=Fa"):
            module(**given | {name: given[name].bfloat16()})
    assert torch.equal(module(**given, output_hidden_states=False).loss, want)


def test_packed_sequences_do_not_see_each_other():
    """With a cache transformers does not look for them in the positions."""
    model, given = causal(), batch()
    ids = given["input_ids"]
    rows, length = ids.shape
    want = FusedPolicyLoss(model)(
        ids, **{k: given[k] for k in ("old_logprobs", "advantages") if k in given}
    )
    following = torch.full_like(ids, 0)
    following[:, :-1] = ids[:, 1:]
    pad = {k: torch.nn.functional.pad(given[k], (0, 1)) for k in ("old_logprobs",)}
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, -1] = False
    advantages = given["advantages"].reshape(rows, -1).expand(rows, length - 1)
    packed = FusedPolicyLoss(model)(
        ids.reshape(1, -1),
        position_ids=torch.arange(length).repeat(rows)[None],
        token_ids=following.reshape(1, -1),
        old_logprobs=pad["old_logprobs"].reshape(1, -1),
        advantages=torch.nn.functional.pad(advantages, (0, 1)).reshape(1, -1),
        loss_mask=mask.reshape(1, -1),
    )
    torch.testing.assert_close(packed.loss, want.loss)


class Lora(nn.Module):
    """A linear layer with the attributes of peft's, for machines without peft."""

    def __init__(self, base, names, flip=False):
        super().__init__()
        self.base_layer, self.fan_in_fan_out = base, flip
        self.lora_A = nn.ModuleDict({n: nn.Linear(D, 2, bias=False) for n in names})
        self.lora_B = nn.ModuleDict({n: nn.Linear(2, V, bias=False) for n in names})
        self.lora_dropout = nn.ModuleDict({n: nn.Dropout(0.0) for n in names})
        self.scaling = {n: 0.5 + i for i, n in enumerate(names)}
        self.active_adapters, self.disable_adapters, self.merged = list(names), False, False

    def get_base_layer(self):
        return self.base_layer

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        weight = self.base_layer.weight
        result = x @ (weight if self.fan_in_fan_out else weight.T)
        for n in [] if self.disable_adapters else self.active_adapters:
            result = result + self.lora_B[n](self.lora_A[n](x)) * self.scaling[n]
        return result


@pytest.mark.parametrize("flip", [False, True])
def test_a_layer_with_adapters(flip):
    torch.manual_seed(0)
    base = nn.Linear(V, D, bias=False) if flip else nn.Linear(D, V, bias=False)
    layer = Lora(base, ["a", "b", "unused"], flip)
    layer.active_adapters = ["a", "b", "elsewhere"]
    x = torch.randn(5, D)
    for names in (["a", "b", "elsewhere"], ["b"], []):
        layer.active_adapters = [n for n in names if n in layer.lora_A]
        want = layer(x).square().sum()
        layer.active_adapters = names
        weight = head_weight(layer)
        assert weight.shape == (V, D)
        leaves = list(layer.parameters())
        found = (x @ weight.T).square().sum()
        grads = (torch.autograd.grad(y, leaves, allow_unused=True) for y in (found, want))
        for got, expected in zip(*grads, strict=True):
            assert (got is None) == (expected is None)
            if got is not None:
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    layer.active_adapters, layer.disable_adapters = ["a"], True
    torch.testing.assert_close(x @ head_weight(layer).T, layer(x))


def test_half_precision_keeps_the_adapter_s_digits():
    torch.manual_seed(0)
    layer = Lora(nn.Linear(D, V, bias=False), ["a"])
    layer.base_layer.bfloat16()
    layer.lora_B["a"].weight.data.mul_(1e-3)  # less than a bit of most weights
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = head_weight(layer)
    change = weight - layer.base_layer.weight.float()
    want = layer.scaling["a"] * layer.lora_B["a"].weight @ layer.lora_A["a"].weight
    assert weight.dtype == torch.float32
    torch.testing.assert_close(change, want, rtol=1e-3, atol=1e-7)


def test_what_no_weight_can_express():
    layer = Lora(nn.Linear(D, V, bias=False), ["a"])
    layer.lora_dropout["a"].p = 0.1
    with pytest.raises(ValueError, match="expected lora_dropout=0 .* found 0.1"):
        head_weight(layer)
    assert head_weight(layer.eval()).shape == (V, D)
    biased = copy.deepcopy(layer)
    biased.lora_B["a"] = nn.Linear(2, V)
    with pytest.raises(ValueError, match="expected lora_bias=False"):
        head_weight(biased)
    layer.lora_variant = {"a": object()}
    with pytest.raises(ValueError, match="expected plain LoRA"):
        head_weight(layer)
    del layer.lora_A
    with pytest.raises(ValueError, match="expected a LoRA adapter, found Lora"):
        head_weight(layer)
    packed = nn.Linear(D, V)
    packed.weight = nn.Parameter(torch.zeros(V, D, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="a floating-point weight, found torch.int8; dequantise"):
        head_weight(packed)


def peft_model(tied=False, **config):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 5, "init_lora_weights": False} | config
    return peft.get_peft_model(causal(tied), peft.LoraConfig(**options))


def lora_names(adapter, module="base_model.model.lm_head"):
    return {f"{module}.lora_{x}.{adapter}.weight" for x in "AB"}


@pytest.mark.parametrize("tied", [False, True])
def test_peft_adapters_of_the_head(tied):
    model = peft_model(tied, target_modules=["lm_head", "q_proj"], use_rslora=tied)
    reached = assert_as_its_forward(model)
    assert lora_names("default") < reached and any("q_proj" in name for name in reached)
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])
    assert lora_names("default") | lora_names("other") < assert_as_its_forward(model)
    with model.disable_adapter():
        assert head_weight(model) is model.get_base_model().lm_head.base_layer.weight
        assert_as_its_forward(model)
    model.merge_adapter()
    assert not assert_as_its_forward(model) & lora_names("default")
    if not tied:  # peft unmerges when the head runs, after a tied embedding has been read
        with model.disable_adapter():
            assert_as_its_forward(model)


def test_peft_modules_to_save_and_trainable_tokens():
    model = peft_model(target_modules=["q_proj"], modules_to_save=["lm_head"])
    name = "base_model.model.lm_head.modules_to_save.default.weight"
    model.get_parameter(name).data.add_(0.1)
    assert name in assert_as_its_forward(model)
    with model.disable_adapter():
        assert head_weight(model) is model.base_model.model.lm_head.original_module.weight
        assert_as_its_forward(model)
    tied = peft_model(True, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    for name, p in tied.named_parameters():
        if "trainable_tokens_delta" in name:
            p.data.add_(0.1)
    reached = assert_as_its_forward(tied)
    assert any("trainable_tokens_delta" in name for name in reached)
    with tied.disable_adapter():
        assert_as_its_forward(tied)


def test_peft_adapters_that_are_refused():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for config, message in (
        ({"lora_dropout": 0.1}, "expected lora_dropout=0"),
        ({"use_dora": True}, "expected plain LoRA .* Dora"),
        ({"lora_bias": True}, "expected lora_bias=False"),
    ):
        model = peft_model(target_modules=["lm_head"], **config).train()
        with pytest.raises(ValueError, match=message):
            FusedPolicyLoss(model)(**batch())
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="expected adapters inside the layers, found.*PROMPT"):
        FusedPolicyLoss(peft.get_peft_model(causal(), prompt))
    loha = peft.get_peft_model(causal(), peft.LoHaConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="expected a LoRA adapter, found Linear"):
        head_weight(loha)


def test_peft_warns_once_of_a_bare_weight(monkeypatch):
    module = sys.modules["spo_kernels.head_weight"]  # not the function of that name
    monkeypatch.setattr(module, "_searches", itertools.count())
    model = peft_model(target_modules=["lm_head"]).get_base_model()
    hidden, ids = torch.randn(3, D), torch.arange(3)
    with pytest.warns(RuntimeWarning, match="whose adapter is ignored .*head_weight") as caught:
        linear_token_logprobs(hidden, model.lm_head.weight, ids)
        linear_token_logprobs(hidden, model.lm_head.weight, ids)
    assert len(caught) == 1 and caught[0].filename == __file__
    plain = peft_model(target_modules=["q_proj"]).get_base_model()
    merged = peft_model(target_modules=["lm_head"])
    merged.merge_adapter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_token_logprobs(hidden, plain.lm_head.weight, ids)
        linear_token_logprobs(hidden, merged.get_base_model().lm_head.weight, ids)
        linear_token_logprobs(hidden, head_weight(model), ids)
        monkeypatch.setattr(module, "_searches", itertools.count(module.MOST_SEARCHES))
        another = peft_model(target_modules=["lm_head"]).get_base_model()
        linear_token_logprobs(hidden, another.lm_head.weight, ids)  # it has searched enough
