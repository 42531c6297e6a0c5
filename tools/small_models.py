"""A small model of any causal architecture of transformers, with weights under which errors show.

Nothing here knows an architecture. The meaning of a number is found from its name in the default
configuration, and all numbers of one meaning become the same, so that what must divide divides.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.configuration_utils import ALLOWED_ATTN_LAYER_TYPES

WORDS = range(3, 100)  # ids of plain words; a higher one may be an image's or stand for a tool
VOCABULARY = 128
WINDOW = 16
POSITIONS = 512
PROBE = 56  # tokens of the sequence that must give finite logits
DEPTHS = (2, 4, 6, 8, 12)
ENTROPY = (2.0, 4.3)  # of the next token, nats; all ids alike would be 4.9
PATIENCE = 45.0  # seconds of attempts that fail
AUTO = (AutoModelForMultimodalLM, AutoModelForImageTextToText, AutoModelForCausalLM)
NAMED_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DEPTH, HEADS, KV_HEADS, HEAD_DIM, WIDTH, KEEP = -1, -2, -3, -4, -5, -6

# What a number becomes, by the first pattern that its name holds.
MEANINGS: tuple[tuple[str, int], ...] = (
    (
        r"type_vocab|chunk_size_feed|seq_length|feature|byte_group_size|functions|steps$|time_step|kernel",
        KEEP,
    ),
    (r"vocab(_size)?$|vocab_size_per", VOCABULARY),
    (r"(sliding_window|sliding_window_size|attention_chunk_size|attention_window_size)$", WINDOW),
    (r"^(chunk_size|mamba_chunk_size|local_attention|window_size)$", WINDOW),
    (r"position_embeddings$|n_positions|n_ctx|max_seq_len|(context|max)_length", POSITIONS),
    (r"max_(target|source)_positions", POSITIONS),
    (r"pattern$|period$|interval$|layer_step$|every_n_layers|attention_frequency", 2),
    (r"(_dense_replace|_dense_layers|layer_offset|kv_shared_layers)$", 1),
    (r"topk_group|topk_blocks|shared_experts|num_expert_group", 1),
    (r"index_topk$", 8),
    (r"kpool", 2),
    (r"budget$", 16),
    (r"compress_ratio$", 4),
    (r"^moe_k$|top_?k$|experts_per_tok(en)?$", 2),
    (r"n_groups?$|ngroups$|o_groups|num_groups", 2),
    (r"experts$|zero_expert_num", 8),
    (r"indexer_kv_heads", 1),
    (r"(kv|key_value)_(n_)?heads$|kv_n_heads|query_groups|linear_num_key_heads", KV_HEADS),
    (r"index_n_heads", 32),  # fewer make ties, which break in another way at another length
    (r"heads?$", HEADS),
    (r"index_block_size|num_filters", 4),
    (r"layers$|n_layer$|^depth$|num_blocks", DEPTH),
    (r"head_?dim|d_head|dim_head|d_kv|kv_channels|head_size|qk_.*dim", HEAD_DIM),
    (r"rotary_dim", 8),
    (r"_rank$|lowrank|state_size|d_state|per_layer_input", 16),
    (r"d_ssm|lru_width|d_inner", 128),
    (r"intermediate|ffn|(^|_)d?ff$|dim_ff|mlp_dim|feed_forward_size|expert_dim", 96),
    (r"image_size|img_size|base_channels|codebook_size", 32),
    (r"hidden|d_model|n_embd|embed(ding)?_(dim|size)|(^|_)dim$|emb_dim|proj(ection)?_dim", WIDTH),
    (r"out(put)?_(size|dim)", WIDTH),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """One way to make a configuration small."""

    depth: int = DEPTHS[0]
    heads: int = 4
    head_dim: int = 16
    width: int = 64
    fill: bool = False  # give values to what the default leaves open
    shallow: bool = False  # make only the depth of vision and audio towers small
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)  # of the default


ATTEMPTS = (
    Sizes(),
    Sizes(fill=True),
    Sizes(heads=8),
    Sizes(depth=DEPTHS[2]),
    Sizes(head_dim=64, width=256, fill=True),
    Sizes(heads=2, head_dim=128, width=256),
    Sizes(shallow=True),
    Sizes(shallow=True, fill=True, head_dim=64, width=256),
    Sizes(shallow=True, fill=True, heads=2, head_dim=128, width=256),
)


def architectures() -> list[str]:
    """Every model type of transformers that has a causal head, or a wrapper with a text model."""
    return list(dict.fromkeys(name for auto in reversed(AUTO) for name in mapping(auto)))


def mapping(auto: Any) -> Any:
    """Model type -> class name, of an auto class."""
    return auto._model_mapping._model_mapping


def auto_class(name: str) -> Any:
    """The auto class with which a published folder of this model type was saved."""
    return next(auto for auto in AUTO if name in mapping(auto))


def small_model(name: str, folder: Path, changes: dict[str, Any]) -> PreTrainedModel:
    """Save a small model with its tokenizer. Raises ValueError with the reason if none builds.

    Args:
        changes: of the default configuration; of `layer_types` the kinds are given.
    """
    reasons: list[str] = []
    start = time.monotonic()
    for sizes in ATTEMPTS:
        if time.monotonic() - start > PATIENCE:
            break
        try:
            config = small_config(CONFIG_MAPPING[name], dataclasses.replace(sizes, changes=changes))
            torch.manual_seed(0)
            model = auto_class(name).from_config(config, dtype=torch.float32).eval()
            shake(model)
        except Exception as error:  # whatever a small size breaks in code that is not ours
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
            continue
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        return model
    raise ValueError(reasons[0])


def other_forms(model: PreTrainedModel, causal: bool) -> list[dict[str, Any]]:
    """Changes of the default configuration under which the same code is another model.

    A decoder, where the default is none; all kinds of layers that the model's source names, where
    the default leaves some out.
    """
    config, forms = model.config, []
    fields = {field.name for field in dataclasses.fields(config)}
    if not causal and "is_decoder" in fields and not getattr(config, "is_decoder", True):
        forms.append({"is_decoder": True})
    found = getattr(config, "layer_types", None) if "layer_types" in fields else None
    source = Path(inspect.getfile(type(model))).read_text()
    kinds = [kind for kind in ALLOWED_ATTN_LAYER_TYPES if f'"{kind}"' in source]
    if found and set(kinds) > set(found):
        window = {"use_sliding_window": True, "sliding_window": WINDOW}
        forms.append({"layer_types": kinds} | {k: v for k, v in window.items() if k in fields})
    return forms


def small_config(kind: type[PreTrainedConfig], sizes: Sizes) -> PreTrainedConfig:
    """The least deep configuration that keeps one layer of each kind of the default."""
    default, found = kind(), None
    kinds = len(sizes.changes.get("layer_types", ()))
    for depth in (depth for depth in DEPTHS if depth >= max(sizes.depth, kinds)):
        try:
            config = shrink(default, dataclasses.replace(sizes, depth=depth))
        except Exception:  # too few layers for its pattern
            if depth == DEPTHS[-1] and found is None:
                raise
            continue
        found = found or config
        if kinds or layer_kinds(config) >= layer_kinds(default):
            return config
    assert found is not None
    return found


def layer_kinds(config: PreTrainedConfig) -> set[tuple[str, str]]:
    """Each kind of layer in the lists that have one name per layer."""
    found: set[tuple[str, str]] = set()
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            found |= layer_kinds(value)
    for name in {name for name in dir(config) if re.search("layer.*type|types$", name)}:
        value = getattr(config, name, None)
        if isinstance(value, list):
            found |= {(name, kind) for kind in value if isinstance(kind, str)}
    return found


def shrink(default: PreTrainedConfig, sizes: Sizes, name: str = "") -> PreTrainedConfig:
    """A configuration of the same class with small numbers, its parts' too."""
    tower = sizes.shallow and re.search("vision|audio|speech|encoder|vq", name)
    values: dict[str, Any] = {}
    fields = {field.name: field.default for field in dataclasses.fields(default)}
    for key, value in fields.items():
        part = vars(default).get(key)
        if isinstance(part, PreTrainedConfig):
            values[key] = shrink(part, sizes, key)
        elif isinstance(part, (list, tuple)) and part and (value is not None or sizes.fill):
            values[key] = type(part)(cut(key, list(part), fields, sizes))
        elif isinstance(value, float) and value == 1 and re.search("multiplier|scal(e|ing)", key):
            values[key] = 0.5  # a factor that does nothing would hide that it is forgotten
        elif isinstance(value, int) and not isinstance(value, bool):
            if not tower or meaning(key) == DEPTH:
                values[key] = small_number(key, value, fields, sizes)
        elif value in (None, False) and part in (None, False, {}) and sizes.fill:
            filled = fill(key, default, fields, sizes)
            values |= {} if filled is None else {key: filled}
        if key in sizes.changes:
            values[key] = sizes.changes[key]
    if "layer_types" in sizes.changes:
        values["layer_types"] = (values["layer_types"] * sizes.depth)[: sizes.depth]
    return type(default)(**values)


def fill(name: str, default: PreTrainedConfig, fields: dict[str, Any], sizes: Sizes) -> Any:
    """A value for what the default leaves open but its model needs; None to leave it."""
    kinds = sizes.changes.get("layer_types") or vars(default).get("layer_types")
    if name == "is_decoder":
        return True
    if name == "default_language":
        return vars(default)["languages"][0]
    if name == "layer_types":
        return ["full_attention"] * sizes.depth
    if name == "mlp_layer_types":
        return (["dense", "sparse"] * sizes.depth)[: sizes.depth]
    if name == "rope_parameters":
        rope = {"rope_type": "default", "rope_theta": 10000.0}
        return {kind: rope for kind in dict.fromkeys(kinds)} if kinds else None
    if re.search(
        r"head_dim$|heads$|experts|budget$|compress_ratio|^sliding_window$|moe_inter", name
    ):
        return small_number(name, 1 << 20, fields, sizes)
    return {} if name.endswith("_map") else None


def meaning(name: str) -> int:
    """What a number of this name becomes."""
    return next((size for pattern, size in MEANINGS if re.search(pattern, name)), KEEP)


def small_number(name: str, value: int, fields: dict[str, Any], sizes: Sizes) -> int:
    if re.search(r"(token|_start|_end)_(id|index)$|_id$|_token_index$", name):
        if name in NAMED_IDS:
            return NAMED_IDS[name]
        return value if value < WORDS.stop else WORDS.stop + sum(name.encode()) % 28
    size = meaning(name)
    if size == KEEP or value <= 0:
        return value
    if size == DEPTH:
        return min(value, sizes.depth)
    if size == HEADS:
        return min(value, sizes.heads)
    if size == HEAD_DIM:
        return min(value, sizes.head_dim)
    if size == WIDTH:
        return sizes.width
    if size == KV_HEADS:
        heads = {v for k, v in fields.items() if isinstance(v, int) and meaning(k) == HEADS}
        return sizes.heads if value in heads else min(value, 2)
    return min(value, size)


def cut(name: str, values: list, fields: dict[str, Any], sizes: Sizes) -> list:
    """A list with an entry per layer, or of layers, for fewer layers; another one as it is."""
    if name == "eos_token_id":
        return [NAMED_IDS[name]]
    depths = {v for k, v in fields.items() if isinstance(v, int) and meaning(k) == DEPTH}
    if len(values) in depths and values != list(range(len(values))):
        if all(isinstance(v, int) and v > 1 for v in values):
            return [small_number(name, v, fields, sizes) for v in values[: sizes.depth]]
        kinds = list(dict.fromkeys(map(str, values)))
        first = [next(v for v in values if str(v) == kind) for kind in kinds][: sizes.depth]
        return first + values[len(first) : sizes.depth]
    if isinstance(values[0], list) and isinstance(values[0][-1], int) and "types" in name:
        return [[kinds, sizes.depth // len(kinds)] for kinds, _ in values]
    layers = re.search("layer|idx|index", name) and all(isinstance(v, int) for v in values)
    if layers and min(values) >= 0 and not isinstance(values[0], bool):
        return [v for v in values if v < sizes.depth] or [sizes.depth - 1]
    return values


def tokenizer() -> PreTrainedTokenizerFast:
    """Words for all ids, with an end token."""
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(WORDS.start, VOCABULARY))]
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    special = {"pad_token": words[0], "bos_token": words[1], "eos_token": words[2]}
    return PreTrainedTokenizerFast(tokenizer_object=plain, **special)


def plain_logits(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    """(L, V) logits of one sequence, as the model itself computes them."""
    ids = torch.tensor([token_ids])
    logits = model(input_ids=ids, use_cache=False).logits
    if logits.shape[:2] != ids.shape or logits.shape[-1] < WORDS.stop:
        raise ValueError(f"no logits per token: {tuple(logits.shape)} for {ids.numel()} tokens")
    return logits[0]


def probe_ids(seed: int, length: int) -> list[int]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(WORDS.start, WORDS.stop, (length,), generator=g).tolist()


@torch.no_grad()
def shake(model: PreTrainedModel) -> None:
    """Weights under which a forgotten bias, norm, gate or scale changes the logits.

    Raises ValueError if the logits are not finite.
    """
    start = {name: tensor.clone() for name, tensor in state(model)}
    for gain in (1.0, 0.5, 0.2):
        g = torch.Generator().manual_seed(1)
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)}
        for name, tensor in state(model):
            noise = torch.randn(tensor.shape, generator=g)
            old = start[name]
            if id(tensor) in embeddings:
                tensor.copy_(noise)
            elif tensor.dim() > 1 and float(old.std()) > 0:
                tensor.copy_(noise * gain * tensor.shape[-1] ** -0.5)
            elif tensor.numel():
                tensor.copy_(old + 0.2 * gain * noise)
        head: Any = model.get_output_embeddings()
        for _ in range(12):  # tied weights: a token must not predict itself with certainty
            logprobs = plain_logits(model, probe_ids(0, PROBE)).float().log_softmax(-1)
            entropy = float(-(logprobs.exp() * logprobs).sum(-1).mean())
            if head is None or not entropy < ENTROPY[0] and not entropy > ENTROPY[1]:
                break
            head.weight.mul_(0.6 if entropy < ENTROPY[0] else 1.6)
        if logprobs.isfinite().all() and float(logprobs.std()) > 0:
            return
    raise ValueError("its logits are not finite with random weights")


def state(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Parameters, and what else is saved with them."""
    saved = set(model.state_dict())
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point() and float(buffer.abs().max()) == 0:
            yield name, buffer
