"""Small stand-ins for the model folders of chat families, with random weights.

Each has its family's layout: where the chat template is, which token is whose end, whether the
tokenizer adds a start token, and how far the vocabulary is padded. Every byte is a token, or every
character where the family reads SentencePiece. The templates follow the families' structure.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from sampling import SIZES
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"


@dataclass(frozen=True)
class Family:
    kind: str  # of the configuration
    specials: tuple[str, ...]  # in the order of their ids
    template: str
    eos: str  # the tokenizer's
    ends: tuple[str, ...]  # eos_token_id of generation_config.json: an int if there is one
    tokenizer_class: str
    start: str | None = None  # that the tokenizer adds
    pad: str | None = None
    plain: tuple[str, ...] = ()  # added tokens that are not special
    first: bool = False  # special tokens have the lowest ids
    pieces: bool = False  # SentencePiece's characters instead of bytes
    padding: int = 0  # logits without a token; negative: tokens without a logit
    own_file: bool = False  # the template is in chat_template.jinja
    cleans_up: bool = False  # clean_up_tokenization_spaces of tokenizer_config.json
    settings: dict = field(default_factory=dict)  # of the configuration


CHATML = """{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- elif default_system is not defined %}
    {{- DEFAULT }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    THINKING
{%- endif %}"""
NO_THOUGHT = """{%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}"""
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\nToday: " + date_string + "\\n\\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {{- message['content']|trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("roles must alternate") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}
    {{- message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}"""
DEEPSEEK = """{{ bos_token }}{%- for message in messages %}
    {%- if message.role == 'system' %}{{ message.content }}{%- endif %}
    {%- if message.role == 'user' %}{{ '<｜User｜>' + message.content }}{%- endif %}
    {%- if message.role == 'assistant' %}
        {{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{%- endif %}"""
HARMONY = """{{- "<|start|>system<|message|>Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
{{- "Reasoning: " + (reasoning_effort if reasoning_effort is defined else "medium") + "<|end|>" }}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {{- "<|start|>developer<|message|># Instructions\\n\\n" + message.content + "<|end|>" }}
    {%- elif message.role == 'assistant' %}
        {{- "<|start|>assistant<|channel|>final<|message|>" + message.content }}
        {{- "<|return|>" if loop.last and not add_generation_prompt else "<|end|>" }}
    {%- else %}
        {{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|start|>assistant" }}{%- endif %}"""

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|box_start|>")
FAMILIES = {
    "qwen2.5": Family(
        "qwen2",
        QWEN,
        CHATML.replace("THINKING", "").replace(
            "DEFAULT", r"'<|im_start|>system\nYou are helpful.<|im_end|>\n'"
        ),
        eos="<|im_end|>",
        ends=("<|im_end|>", "<|endoftext|>"),
        tokenizer_class="Qwen2Tokenizer",
        pad="<|endoftext|>",
        padding=20,
    ),
    "qwen3": Family(
        "qwen3",
        QWEN,
        CHATML.replace("THINKING", NO_THOUGHT).replace("DEFAULT", "''"),
        eos="<|im_end|>",
        ends=("<|im_end|>", "<|endoftext|>"),
        tokenizer_class="Qwen2Tokenizer",
        pad="<|endoftext|>",
        plain=("<think>", "</think>"),
        padding=20,
    ),
    "llama3": Family(
        "llama",
        (
            *("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
            *("<|eom_id|>", "<|eot_id|>"),
        ),
        LLAMA,
        eos="<|end_of_text|>",
        ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        tokenizer_class="PreTrainedTokenizerFast",
        start="<|begin_of_text|>",
        cleans_up=True,
    ),
    "gemma3": Family(
        "gemma3_text",
        ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"),
        GEMMA,
        eos="<eos>",
        ends=("<eos>", "<end_of_turn>"),
        tokenizer_class="GemmaTokenizer",
        start="<bos>",
        pad="<pad>",
        plain=("<image_soft_token>",),
        first=True,
        pieces=True,
        padding=-1,
        settings={"sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "deepseek": Family(
        "deepseek_v3",
        (
            *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"),
            *("<｜User｜>", "<｜Assistant｜>"),
        ),
        DEEPSEEK,
        eos="<｜end▁of▁sentence｜>",
        ends=("<｜end▁of▁sentence｜>",),
        tokenizer_class="LlamaTokenizerFast",
        start="<｜begin▁of▁sentence｜>",
        pad="<｜▁pad▁｜>",
        plain=("<think>", "</think>"),
        first=True,
        padding=24,
        settings={
            "num_key_value_heads": 2,
            "q_lora_rank": 32,
            "kv_lora_rank": 512,  # with 64 the only size that vLLM knows
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "first_k_dense_replace": 2,
            "head_dim": 64,  # of the rotated part
        },
    ),
    "gpt-oss": Family(
        "gpt_oss",
        (
            *("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|channel|>", "<|start|>"),
            *("<|end|>", "<|message|>", "<|call|>"),
        ),
        HARMONY,
        eos="<|return|>",
        ends=("<|return|>", "<|endoftext|>", "<|call|>"),
        tokenizer_class="PreTrainedTokenizerFast",
        pad="<|endoftext|>",
        padding=24,
        own_file=True,
        settings={
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 64,
            "rope_parameters": {  # vLLM reads nothing else
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 32.0,
                "original_max_position_embeddings": 16,  # 512 / 32
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
    ),
}


def chat_folder(folder: Path, name: str) -> Path:
    """Write the folder of a family: weights, tokenizer, template, and what ends a response."""
    family, folder = FAMILIES[name], folder / name
    tokenizer = inner_tokenizer(family)
    size = tokenizer.get_vocab_size() + family.padding
    ids = {text: tokenizer.token_to_id(text) for text in (*family.specials, *family.plain)}
    ends = [ids[text] for text in family.ends]
    special = {
        "bos_token_id": ids.get(family.start or ""),
        "eos_token_id": ends[0],
        "pad_token_id": ids.get(family.pad or ""),
    }
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": size, "max_position_embeddings": 512, "use_cache": True}
    more = {"tie_word_embeddings": False, "architectures": None} | special | family.settings
    config = AutoConfig.for_model(family.kind, **(sizes | more))
    model = AutoModelForCausalLM.from_config(config)
    if family.padding > 0:  # logits without a token are large, so that nobody can forget them
        head = model.get_output_embeddings().weight
        with torch.no_grad():
            head[-family.padding :] = 1.5 * head[40 : 40 + family.padding]
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    generation = special | {"eos_token_id": ends if len(ends) > 1 else ends[0]}
    write(folder / "generation_config.json", {"do_sample": True, **generation})
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    added = {
        str(i): {"content": text, **flags, "special": text in family.specials}
        for text, i in ids.items()
    }
    settings = {
        "added_tokens_decoder": added,
        "bos_token": family.start,
        "clean_up_tokenization_spaces": family.cleans_up,
        "eos_token": family.eos,
        "pad_token": family.pad,
        "model_max_length": 512,
        "tokenizer_class": family.tokenizer_class,
        "unk_token": "<unk>" if family.pieces else None,
    }
    if family.own_file:
        (folder / "chat_template.jinja").write_text(family.template, encoding="utf-8")
    else:
        settings["chat_template"] = family.template
    write(folder / "tokenizer_config.json", settings)
    return folder


def write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def inner_tokenizer(family: Family) -> Tokenizer:
    if family.pieces:
        texts = [f"<0x{byte:02X}>" for byte in range(256)]
        texts += ["▁", *(chr(code) for code in range(33, 127)), "\n"]
    else:
        texts = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [*family.specials, *texts] if family.first else [*texts, *family.specials]
    vocabulary = {text: i for i, text in enumerate(texts)}
    unknown = {"unk_token": "<unk>", "byte_fallback": True} if family.pieces else {}
    inner = Tokenizer(models.BPE(vocabulary, [], **unknown))
    if family.pieces:
        inner.normalizer = normalizers.Replace(" ", "▁")
        inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        inner.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(WORDS), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(family.specials))
    inner.add_tokens(list(family.plain))
    if family.start:
        inner.post_processor = processors.TemplateProcessing(
            single=f"{family.start} $A",
            pair=f"{family.start} $A {family.start}:1 $B:1",
            special_tokens=[(family.start, inner.token_to_id(family.start))],
        )
    return inner
