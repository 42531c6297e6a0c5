"""What a model does besides mixing tokens: it trains on that, exactly, or is refused."""

import pytest
import torch
import transformers
from forests import packed, random_forest
from safetensors.torch import load_file, save_file
from sampling import SIZES, shaken, tiny_policy

from spo.config.loss import LikelihoodLossConfig, PolicyLossConfig
from spo.config.policy import PolicyConfig
from spo.learn.loss import likelihood_loss, policy_loss
from spo.learn.model import row_logprobs, sequence_logprobs
from spo.learn.policy import load_policy

KINDS = {
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 3.0},
    "cohere": {"logit_scale": 0.0625},
    "gemma2": {"sliding_window": 16, "final_logit_softcapping": 3.0},
    "minicpm3": {
        "dim_model_base": 8,  # divides the hidden states by 8
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 16,
        "head_dim": 16,
        "num_key_value_heads": 2,
    },
    "nanochat": {},
    "modernbert-decoder": {"classifier_bias": True, "decoder_bias": True},  # a dense layer, a norm
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},  # with dropout
    "gpt_neox": {},
    "seed_oss": {"attention_dropout": 0.3, "residual_dropout": 0.3},
    "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


def trained(folder, packing="tree", **options):
    """The policy as it trains, batches of two random trees, and their forest."""
    forest, _ = random_forest(3, trees=2)
    ones = torch.where(forest.parent >= 0, 1.0, 0.0)
    batches, _ = packed(forest, ones, 10**6, threshold=None, packing=packing)
    return load_policy(PolicyConfig(path=folder, packing=packing, **options)), batches, forest


def own(folder, forest):
    """transformers' model, and its logprobs (T,) of the trees' tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()
    logprobs = []
    for node in range(forest.num_nodes):
        ids = torch.tensor(forest.path_ids(node))
        size = len(forest.tokens(node))
        if forest.parent[node] < 0:
            logprobs.append(torch.zeros(size))
            continue
        logits = model(ids[None], use_cache=False).logits[0, :-1]
        logprobs.append(logits.log_softmax(-1).gather(1, ids[1:, None])[-size:, 0])
    return model, torch.cat(logprobs)


@pytest.mark.parametrize("packing", ["tree", "rows"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_on_the_models_own_logprobs(tmp_path, kind, packing):
    folder = tiny_policy(tmp_path, kind, **KINDS[kind])
    model, batches, forest = trained(folder, packing)
    exact, expected = own(folder, forest)
    rows = torch.cat([batch.token_index for batch in batches])
    (-expected[rows].sum() / batches[0].policy_norm).backward()
    for batch in batches:
        found = row_logprobs(model, batch, 1.0)
        assert (found - expected[batch.token_index]).abs().max() <= 1e-4
        likelihood_loss(model, batch, LikelihoodLossConfig(), 1.0).loss.backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        if q.grad is not None:
            error, size = float((p.grad - q.grad).norm()), float(q.grad.norm())
            assert error <= 1e-3 * size + 1e-6, name


def test_the_head_goes_through_the_models_own_layers(tmp_path):
    model, _, _ = trained(tiny_policy(tmp_path, "modernbert-decoder"))
    assert vars(model)["spo_head"].own_layers


def test_dropout_is_off_unless_it_is_asked_for(tmp_path):
    folder = tiny_policy(tmp_path, "opt", **KINDS["opt"])
    for dropout in (False, True):
        model, batches, _ = trained(folder, "rows", dropout=dropout)
        losses = [policy_loss(model, batches[0], PolicyLossConfig(), 1.0).loss for _ in range(2)]
        assert torch.equal(*losses) is not dropout
        first, second = (row_logprobs(model, batches[0], 1.0) for _ in range(2))
        assert torch.equal(first, second) and model.training is dropout
    with pytest.raises(ValueError, match="attention dropout 0, found 0.2; policy.packing=rows"):
        more = KINDS["opt"] | {"attention_dropout": 0.2}
        trained(tiny_policy(tmp_path, "opt", **more), dropout=True)


@pytest.mark.parametrize("packing", ["tree", "rows"])
def test_the_routers_loss_is_trained_where_the_configuration_asks_for_it(tmp_path, packing):
    more = KINDS["qwen3_moe"] | {"router_aux_loss_coef": 0.5}
    folder = tiny_policy(tmp_path, "qwen3_moe", output_router_logits=True, **more)
    model, (batch,), forest = trained(folder, packing)
    out = policy_loss(model, batch, PolicyLossConfig(prob_threshold=None), 1.0)
    share = out.metrics["kept"] / batch.policy_norm
    if packing == "rows":  # every row is a sequence of its own: the loss of transformers' batch
        sizes = (batch.position_ids == 0).nonzero()[1:, 0].tolist()
        rows = torch.tensor_split(batch.token_ids, sizes)
        padded = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(r) for r in rows], True)
        with torch.no_grad():
            theirs = model(input_ids=padded, attention_mask=real).aux_loss
        assert out.metrics["router_loss"] == pytest.approx(0.5 * share * float(theirs), rel=1e-4)
    assert out.metrics["router_loss"] > 0
    out.loss.backward()
    with_router = model.model.layers[0].mlp.gate.weight.grad.clone()
    model.config.output_router_logits = False
    model.zero_grad()
    quiet = policy_loss(model, batch, PolicyLossConfig(prob_threshold=None), 1.0)
    quiet.loss.backward()
    assert "router_loss" not in quiet.metrics
    assert float(out.loss - quiet.loss) == pytest.approx(out.metrics["router_loss"], rel=1e-4)
    assert not torch.allclose(with_router, model.model.layers[0].mlp.gate.weight.grad)


ROPES = {
    "longrope": {
        "original_max_position_embeddings": 32,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 16,
            "long_factor": [2.0 + i for i in range(16)],
        },
    },
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}},
}


@pytest.mark.parametrize("packing", ["tree", "rows"])
@pytest.mark.parametrize("rope", ROPES)
def test_a_long_neighbour_changes_nothing(tmp_path, rope, packing):
    """Frequencies that follow the longest position of a batch are those of the run's limit."""
    folder = tiny_policy(tmp_path, "phi3" if rope == "longrope" else "llama", **ROPES[rope])
    model, _, _ = trained(folder, packing)
    ids = torch.randint(2, 48, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    before = sequence_logprobs(model, ids[:4], ids[4:12], 1.0)
    long = sequence_logprobs(model, ids[:4], ids[4:], 1.0)
    assert sequence_logprobs(model, ids[:4], ids[4:12], 1.0) == before
    torch.testing.assert_close(torch.tensor(long[:8]), torch.tensor(before), rtol=1e-4, atol=1e-4)
    short_run = load_policy(PolicyConfig(path=folder, packing=packing), limit=32)
    exact = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = exact(torch.tensor([ids[:12]])).logits[0, 3:-1].log_softmax(-1)
    theirs = logits.gather(1, torch.tensor(ids[4:12])[:, None])[:, 0]
    found = torch.tensor(sequence_logprobs(short_run, ids[:4], ids[4:12], 1.0))
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=1e-4)
    if rope == "longrope":
        assert (found - torch.tensor(before)).abs().max() > 1e-3  # a longer run is another policy


def test_a_multimodal_model_trains_its_text_model(tmp_path):
    torch.manual_seed(0)
    text = SIZES | {"sliding_window": 16, "query_pre_attn_scalar": 32}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=47
    )
    transformers.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    model, batches, forest = trained(str(tmp_path))
    _, expected = own(str(tmp_path), forest)
    found = row_logprobs(model, batches[0], 1.0)
    assert (found - expected[batches[0].token_index]).abs().max() <= 1e-4
    found.sum().backward()
    assert model.lm_head.weight.grad is not None
    assert all(p.grad is None for p in model.model.vision_tower.parameters())


REFUSED = {
    "bert": ({"is_decoder": False}, "reads tokens that come later: it is no causal model"),
    "t5": ({"d_kv": 8}, "expected a causal language model, .* is a t5"),
    "bart": ({"d_model": 64}, "positions of its own; policy.packing=rows trains it"),
    "llama4_text": (
        {
            "num_local_experts": 4,
            "intermediate_size_mlp": 64,
            "attention_chunk_size": 4096,
            "no_rope_layers": [1, 0],
        },
        "counts the tokens of its input .*rows trains it, with engine.name=vllm",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_train_is_refused_in_a_sentence(tmp_path, kind):
    more, sentence = REFUSED[kind]
    if kind == "t5":
        transformers.AutoConfig.for_model(kind, **(SIZES | more)).save_pretrained(tmp_path)
    else:
        tiny_policy(tmp_path, kind, **more)
    with pytest.raises(ValueError, match=sentence) as refused:
        load_policy(PolicyConfig(path=str(tmp_path)))
    assert len(str(refused.value).splitlines()) == 1


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    folder = tiny_policy(tmp_path, "llama", tie_word_embeddings=False)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 are missing, such as model.layers.1.mlp.up_proj"):
        load_policy(PolicyConfig(path=folder))


HIDDEN_FROM_BF16 = {  # what they leave out is lost in the rounding of bf16
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "doge": {},
}


@pytest.mark.parametrize("kind", HIDDEN_FROM_BF16)
def test_a_fault_below_the_rounding_of_bf16_is_refused_too(tmp_path, kind):
    folder = tiny_policy(tmp_path, kind, **HIDDEN_FROM_BF16[kind])
    if kind == "doge":  # what it adds to its mask starts at the same number for all tokens
        shaken(folder, 0.5, part=".A").save_pretrained(folder)
    for dtype in ("float32", "bfloat16"):
        with pytest.raises(ValueError, match="policy.packing=rows trains it"):
            load_policy(PolicyConfig(path=folder, dtype=dtype))
    model = load_policy(PolicyConfig(path=folder, dtype="bfloat16", packing="rows"))
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("kind", ["granite", "gemma2", "qwen3_moe", "gpt_neox"])
def test_the_check_in_fp32_leaves_the_weights_as_they_were(tmp_path, kind):
    folder = tiny_policy(tmp_path, kind, **KINDS[kind])
    model = load_policy(PolicyConfig(path=folder, dtype="bfloat16"))
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for (name, p), (_, q) in zip(
        [*model.named_parameters(), *model.named_buffers()],
        [*plain.named_parameters(), *plain.named_buffers()],
        strict=True,
    ):
        assert p.dtype == q.dtype and torch.equal(p, q), name
    assert vars(model)["spo_head"].options == pytest.approx(
        vars(load_policy(PolicyConfig(path=folder)))["spo_head"].options, rel=1e-5
    )


WIDE = 10_000  # tokens of a window that the check at load does not pass
UNSEEN = {  # windows that only a mask holds
    "phimoe": {"num_local_experts": 4, "sliding_window": WIDE},
    "llama4_text": {
        "num_local_experts": 4,
        "intermediate_size_mlp": 64,
        "attention_chunk_size": WIDE,
        "attn_temperature_tuning": False,
    },
}


@pytest.mark.parametrize("kind", UNSEEN)
def test_a_long_window_that_packs_leave_out_is_refused_at_load(tmp_path, kind):
    folder = tiny_policy(tmp_path, kind, max_position_embeddings=2 * WIDE, **UNSEEN[kind])
    sentence = f"attends within {WIDE} tokens .* engine.max_model_len={WIDE} keeps .*packing=rows"
    for limit in (None, WIDE + 1):
        with pytest.raises(ValueError, match=sentence):
            load_policy(PolicyConfig(path=folder), limit=limit)
    load_policy(PolicyConfig(path=folder), limit=WIDE)
    model = load_policy(PolicyConfig(path=folder, packing="rows"))
    settings = model.config.to_dict()
    assert WIDE in (settings.get("sliding_window"), settings.get("attention_chunk_size"))


def test_a_long_window_that_the_layers_name_trains(tmp_path):
    folder = tiny_policy(tmp_path, "mistral", max_position_embeddings=2 * WIDE, sliding_window=WIDE)
    model = load_policy(PolicyConfig(path=folder))
    assert model.config.sliding_window == WIDE
