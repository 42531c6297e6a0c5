"""The policy and its reference; their forward over a packed forest."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from spo.config import PolicyConfig
from spo.records import Batch
from spo_kernels import linear_token_logprobs

EMBEDDED = Path(__file__).parent / "assets" / "policy"


def packed_attention(module, query, key, value, attention_mask, scaling, blocks=None, **_):
    """Attention over a pack through transformers' interface; query (1, H, T, hd).

    `blocks` lists (start, end, mask (L, L) bool): trees do not see each other.
    """
    if blocks is None:
        raise ValueError("this model was loaded for packed batches: call spo.model.hidden_states")
    pieces = [
        F.scaled_dot_product_attention(
            query[:, :, start:end],
            key[:, :, start:end],
            value[:, :, start:end],
            attn_mask=mask,
            scale=scaling,
            enable_gqa=True,
        )
        for start, end, mask in blocks
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2), None


AttentionInterface.register("spo_packed", packed_attention)


def model_folder(path: str) -> str:
    """The folder or hub id that `policy.path` names."""
    return str(EMBEDDED) if path == "embedded" else path


def load_tokenizer(config: PolicyConfig):
    """The policy's tokenizer. Raises ValueError with one sentence if it cannot be loaded.

    A tokenizer.json is taken as it stands: AutoTokenizer silently puts a pre-tokenizer of its own
    in its place for some model types (transformers 5.19: qwen2).
    """
    try:
        tokenizer = _load(PreTrainedTokenizerFast, config)
    except ValueError:
        tokenizer = _load(AutoTokenizer, config)  # no tokenizer.json
    if len(tokenizer) <= len(tokenizer.all_special_ids) or tokenizer.eos_token_id is None:
        raise ValueError(f"policy.path: {config.path} holds no tokenizer with an end token")
    return tokenizer


def load_policy(config: PolicyConfig, path: str | None = None) -> torch.nn.Module:
    """A causal model that trains on packed batches.

    Args:
        path: a checkpoint's model folder; by default the recipe's start policy.

    Raises ValueError with one sentence if it cannot be loaded or packed.
    """
    model = _load(
        AutoModelForCausalLM,
        config,
        path,
        dtype=getattr(torch, config.dtype),
        use_safetensors=True,
        attn_implementation="spo_packed",
    )
    layers = set(getattr(model.config, "layer_types", None) or ["full_attention"])
    if layers != {"full_attention"}:
        raise ValueError(
            f"policy.path: {config.path} has {', '.join(sorted(layers))} layers; "
            "packed training needs full attention in every layer"
        )
    return model.to(config.device).train()


def _load(auto, config: PolicyConfig, path: str | None = None, **options):
    name = path or model_folder(config.path)
    try:
        return auto.from_pretrained(name, trust_remote_code=config.trust_remote_code, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"policy.path: {name} cannot be loaded ({reason})") from error


def attention_blocks(batch: Batch) -> list[tuple[int, int, Tensor]]:
    """(start, end, mask (L, L) bool) of each tree in the pack: key k is visible to query q iff
    k <= q < visible_until[k].
    """
    until = batch.visible_until.long()
    place = torch.arange(until.numel(), device=until.device)
    ends = torch.nonzero(until.cummax(0).values == place + 1)[:, 0] + 1
    blocks = []
    start = 0
    for end in ends.tolist():
        query = torch.arange(start, end, device=until.device)[:, None]
        mask = (query.T <= query) & (query < until[start:end])
        blocks.append((start, end, mask))
        start = end
    return blocks


def hidden_states(model: torch.nn.Module, batch: Batch) -> Tensor:
    """Last hidden states (T, D) of a packed batch."""
    out = model.base_model(
        input_ids=batch.token_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        blocks=attention_blocks(batch),
    )
    return out.last_hidden_state[0]


@torch.no_grad()
def score(model: torch.nn.Module, batch: Batch, temperature: float) -> Batch:
    """The batch with `ref_logprobs` of its rows under `model` (the reference)."""
    head = model.get_output_embeddings()
    logprobs = linear_token_logprobs(
        hidden_states(model, batch),
        head.weight,
        batch.targets,
        bias=head.bias,
        hidden_index=batch.hidden_index,
        temperature=temperature,
    )
    return dataclasses.replace(batch, ref_logprobs=logprobs)


@torch.no_grad()
def sequence_logprobs(
    model: torch.nn.Module, prefix_ids: list[int], token_ids: list[int], temperature: float
) -> list[float]:
    """Log-probabilities of `token_ids` after `prefix_ids`, as the trainer computes them."""
    ids = torch.tensor(prefix_ids + token_ids)
    size = ids.numel()
    batch = Batch(
        token_ids=ids,
        position_ids=torch.arange(size),
        visible_until=torch.full((size,), size, dtype=torch.int32),
        hidden_index=torch.arange(len(prefix_ids) - 1, size - 1),
        targets=ids[len(prefix_ids) :],
        old_logprobs=torch.zeros(len(token_ids)),
        advantages=torch.zeros(len(token_ids)),
        loss_mask=torch.ones(len(token_ids), dtype=torch.bool),
        policy_norm=1.0,
    )
    batch = to_device(batch, next(model.parameters()).device)
    return score(model, batch, temperature).ref_logprobs.tolist()


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on `device`."""
    moved = {
        f.name: value.to(device)
        for f in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, f.name), Tensor)
    }
    return dataclasses.replace(batch, **moved)
