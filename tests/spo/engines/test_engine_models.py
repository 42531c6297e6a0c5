"""The embedded engine on many kinds of models, against their own forward."""

import dataclasses

import pytest
import torch
from sampling import SIZES, drain, plain_logprobs, tiny_policy, worst_error
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from spo.engines.attention_calls import attention_calls
from spo.engines.hf import HFEngine
from spo.models.load import load_causal
from spo.records import Request, Sampling

WINDOW = 12
MOE = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {  # keys of 24, values of 16
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [4.0] * 16,
    "partial_rotary_factor": 1.0,
}
MODELS = {  # kind -> settings of its configuration
    "llama": {},
    "qwen3": {},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_bigcode": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 64},
    "phi": {"num_key_value_heads": 2},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3},
    "mistral": {"sliding_window": WINDOW},
    "gemma2": {"sliding_window": WINDOW, "attn_logit_softcapping": 2.0},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma4_text": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "global_head_dim": 64,  # keys of 32 and of 64
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 48,
    },
    "gpt_oss": MOE | {"sliding_window": WINDOW},
    "llama4_text": MOE | {"attention_chunk_size": WINDOW, "intermediate_size_mlp": 64,
                          "attn_temperature_tuning": False, "no_rope_layers": [1, 0]},
    "phi3": {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 64},
    "deepseek_v3": LATENT | {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "minicpm3": LATENT | {"dim_model_base": 64},
    "diffllama": {"num_key_value_heads": 2},  # attends twice in a layer
}  # fmt: skip
REFUSED = {  # kind -> settings, what the sentence says
    "mamba": ({}, "takes no position_ids"),
    "mpt": ({}, "takes no position_ids"),
    "recurrent_gemma": ({"lru_width": 64}, "in 0 of its 2 layers"),
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1}, "in 1 of its 2 layers"),
    "gptj": ({"rotary_dim": 8}, "in 0 of its 2 layers"),
    "doge": ({}, "makes an attention mask of its own"),
    "bert": ({}, "attends in both directions"),
    "llama4_text": (MOE | {"attention_chunk_size": WINDOW, "intermediate_size_mlp": 64,
                           "no_rope_layers": [1, 0]},
                    "count the tokens of their input"),
    "falcon_h1": ({"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
                  r"logprobs that are \S+ nats from the model's own; it has"),
}  # fmt: skip


def prompt(size, key=0):
    return tuple(3 + (7 * i * i + 5 * key) % 45 for i in range(size))


def grow(engine):
    """(prefix, completion) pairs: short and long siblings side by side, then branches of both."""
    pairs, asked = [], [prompt(5), prompt(2 * WINDOW, 1), prompt(3, 2)]
    for seed in range(2):
        for key, prefix in enumerate(asked):
            engine.submit(Request(key, prefix, 3, 8, Sampling(10 * seed + key)))
        done = drain(engine, 3 * len(asked))
        pairs += [(asked[c.key], c) for c in done]
        asked = [(*asked[c.key], *c.token_ids) for c in done if c.index == 1]
        asked += [asked[1][:-3]]  # from inside a segment
    return pairs


def own(folder, limit=None):
    model = load_causal(folder, dtype=torch.float32, limit=limit)
    model.set_attn_implementation("eager")
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_samples_have_the_logprobs_of_the_model_s_own_forward(kind, tmp_path):
    folder = tiny_policy(tmp_path, kind, **MODELS[kind])
    engine = HFEngine(folder, max_num_seqs=8, min_shared=3)
    windows = WINDOW in MODELS[kind].values()
    assert any(pattern is not None for pattern in engine.slots.patterns) == windows
    pairs = grow(engine)
    assert worst_error(pairs, own(folder)) < 1e-5


@pytest.mark.parametrize("kind", ["gemma3", "llava"])
def test_the_text_model_of_a_multimodal_one_samples(kind, tmp_path):
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision = small | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = SIZES | MODELS["gemma3_text" if kind == "gemma3" else "llama"]
    config = CONFIG_MAPPING[kind](text_config=text, vision_config=vision, image_token_index=40)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    engine = HFEngine(str(tmp_path), max_num_seqs=8, min_shared=3)
    assert worst_error(grow(engine), own(str(tmp_path))) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "gpt_oss", "deepseek_v3"])
def test_rounding_to_bfloat16_is_no_difference(kind, tmp_path):
    """The engine is as far from the model in fp32 as the model's own forward in bfloat16 is."""
    folder = tiny_policy(tmp_path, kind, **MODELS[kind])
    engine = HFEngine(folder, max_num_seqs=8, min_shared=3, dtype=torch.bfloat16)
    rounded = load_causal(folder, dtype=torch.bfloat16)
    rounded.set_attn_implementation("eager")
    exact = own(folder)
    for there, here in zip(exact.parameters(), rounded.parameters(), strict=True):
        there.data = here.detach().float()
    errors = [[], []]
    for prefix, done in grow(engine):
        expected = plain_logprobs(exact, prefix, done.token_ids)
        errors[0] += (torch.tensor(done.logprobs) - expected).abs().tolist()
        errors[1] += (plain_logprobs(rounded, prefix, done.token_ids) - expected).abs().tolist()
    assert sum(errors[0]) < 1.5 * sum(errors[1])


@pytest.mark.parametrize("kind", REFUSED)
def test_a_model_that_slots_cannot_run_is_refused_in_a_sentence(kind, tmp_path):
    settings, reason = REFUSED[kind]
    folder = tiny_policy(tmp_path, kind, **settings)
    with pytest.raises(
        ValueError, match=f"engine.name=hf cannot run {folder}: .*{reason}.*"
    ) as error:
        HFEngine(folder)
    assert str(error.value).endswith("; engine.name=vllm may") and "\n" not in str(error.value)


def test_the_check_at_load_notices_a_window_that_is_not_masked(monkeypatch, tmp_path):
    def blind(*args):
        return [dataclasses.replace(call, pattern=None) for call in attention_calls(*args)]

    folder = tiny_policy(tmp_path, "mistral", **MODELS["mistral"])
    HFEngine(folder)
    monkeypatch.setattr("spo.engines.hf.attention_calls", blind)
    HFEngine(folder, max_model_len=WINDOW)  # nothing lies outside of the window
    with pytest.raises(ValueError, match=rf"behind a prefix of \d+ tokens has logprobs that are "
                       rf"\S+ nats from the model's own; it has a window of {WINDOW}"):  # fmt: skip
        HFEngine(folder)


def test_the_check_at_load_leaves_no_trace(tmp_path):
    engine = HFEngine(tiny_policy(tmp_path, "llama"), max_num_seqs=8)
    assert not any(engine.counters().values()) and engine.room == 8
    slots = engine.slots
    assert not slots.lens.any() and not slots.used.any() and (slots.tokens == -1).all()
    assert not any(kv.any() for kv in slots.kv)


@pytest.mark.parametrize("limit", [64, 128])  # frequencies are others in runs beyond 64 tokens
def test_a_long_neighbour_changes_nothing_under_long_rope(limit, tmp_path):
    folder = tiny_policy(tmp_path, "phi3", **MODELS["phi3"])
    drawn = []
    for sizes in ((6,), (6, limit - 12), (6, 58)):
        engine = HFEngine(folder, max_num_seqs=8, max_model_len=limit)
        for key, size in enumerate(sizes):
            engine.submit(Request(key, prompt(size, key), 2, min(12, limit - size), Sampling(key)))
        done = drain(engine, 2 * len(sizes))
        pairs = [(prompt(sizes[c.key], c.key), c) for c in done]
        assert worst_error(pairs, own(folder, limit)) < 1e-5
        drawn.append([c.token_ids for c in done if c.key == 0])
    assert drawn[0] == drawn[1] == drawn[2]
    other = worst_error(pairs, own(folder, 64 if limit > 64 else 128))
    assert other > 1e-2
