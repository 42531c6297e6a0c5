"""Attention of the embedded engine: every row against its own slot and the prefixes it shares.

A decode step reads each shared prefix once for all its branches: one matrix product per prefix
computes a partial softmax (numerator, maximum, denominator) of every branch, and the parts are
merged. Reading the prefix once per branch would read rows * prefix keys, which takes most of the
time of a step when many branches share a long prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

Part = tuple[Tensor, Tensor, Tensor]
"""Numerator (..., hd), maximum (..., 1) and denominator (..., 1) of a softmax over some keys."""


@dataclass(frozen=True)
class SharedSpan:
    """A stretch of one slot's keys that several rows of the batch read."""

    slot: int
    length: int  # keys 0:length of the slot are read by the row with the longest read
    rows: Tensor | None  # (n,) int64, indices in the batch; None: all rows
    depth: int  # number of shared spans before it in its rows' sequences
    visible: Tensor | None  # (n, 1, length) bool if the rows read different lengths


@dataclass
class SlotView:
    """Where this forward writes its keys and values, and what each query may read."""

    kv: Tensor  # (layers, 2, slots, kv_heads, max_len + 1, head_dim)
    rows: slice  # the slots of this batch
    indices: Tensor  # (R, C) int64, index of every token of the batch in its row's own slot
    length: int  # no row reads its own keys beyond this
    mask: Tensor  # (R, 1, C, length) bool, True where a token may read the key
    spans: Sequence[SharedSpan] = ()  # only where C = 1


def slot_attention(module, query, key, value, attention_mask, scaling, slots: SlotView, **_):
    """Attention of a batch over its slots; registered with transformers' attention interface.

    query (R, H, C, hd); key and value (R, KVH, C, hd) are written to the cache first.
    """
    cache = slots.kv[module.layer_idx]
    own = cache[:, slots.rows]
    rows = torch.arange(query.shape[0], device=query.device)[:, None]
    own[0][rows, :, slots.indices] = key.transpose(1, 2)
    own[1][rows, :, slots.indices] = value.transpose(1, 2)
    keys, values = own[:, :, :, : slots.length]
    r, heads, c, width = query.shape
    if c > 1:
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=slots.mask, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    # The heads of a group are queries of one key head, so keys need not be repeated.
    query = query.view(r, keys.shape[1], -1, width)
    if slots.spans:
        out = shared_attention(query, keys, values, cache, slots, scaling)
    else:
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=slots.mask, scale=scaling
        )
    return out.reshape(r, 1, heads, width), None


AttentionInterface.register("spo_slots", slot_attention)


def shared_attention(
    query: Tensor,  # (R, KVH, G, hd), G query heads for each key head
    keys: Tensor,  # (R, KVH, length, hd), each row's own
    values: Tensor,  # (R, KVH, length, hd)
    cache: Tensor,  # (2, slots, KVH, max_len + 1, hd), of this layer
    slots: SlotView,
    scaling: float,
) -> Tensor:  # (R, KVH, G, hd)
    """Softmax attention over a row's own keys and those of its shared spans."""
    r, kv_heads, group, width = query.shape
    scaled = query.float() * scaling
    parts = [partial_attention(scaled, keys, values, slots.mask)]
    scattered: dict[int, Part] = {}  # depth -> part; a row reads at most one span per depth
    for span in slots.spans:
        rows = slice(None) if span.rows is None else span.rows
        queries = scaled[rows].transpose(0, 1).reshape(kv_heads, -1, width)
        n = queries.shape[1] // group
        visible = span.visible
        if visible is not None:
            visible = visible.expand(n, group, span.length).reshape(n * group, span.length)
        shared_keys, shared_values = cache[:, span.slot, :, : span.length]
        numerator, maximum, denominator = (
            x.view(kv_heads, n, group, -1).transpose(0, 1)
            for x in partial_attention(queries, shared_keys, shared_values, visible)
        )
        part = numerator, maximum, denominator
        if span.rows is None:
            parts.append(part)
            continue
        if span.depth not in scattered:
            empty = (torch.zeros_like(scaled), scaled.new_full((r, kv_heads, group, 1), -torch.inf))
            scattered[span.depth] = (*empty, torch.zeros_like(empty[1]))
        for whole, piece in zip(scattered[span.depth], part, strict=True):
            whole[rows] = piece
    return merge([*parts, *scattered.values()]).to(query.dtype)


def partial_attention(
    query: Tensor,  # (..., Q, hd) fp32, scaled
    keys: Tensor,  # (..., K, hd)
    values: Tensor,  # (..., K, hd)
    visible: Tensor | None,  # (..., Q, K) bool, at least one True in every row; None: all
) -> Part:
    """Softmax of `query @ keys.T` times values, not yet normalised, so that parts can be merged.

    Computed in fp32 for any cache dtype: scores rounded to bfloat16 would be off by a percent.
    """
    scores = query @ keys.float().transpose(-1, -2)
    if visible is not None:
        scores.masked_fill_(~visible, -torch.inf)
    maximum = scores.amax(-1, keepdim=True)
    weights = scores.sub_(maximum).exp_()
    return weights @ values.float(), maximum, weights.sum(-1, keepdim=True)


def merge(parts: Sequence[Part]) -> Tensor:
    """Normalised attention over the union of the parts' keys.

    A part that read no key has -inf as its maximum; at least one part must have read one.
    """
    maximum = parts[0][1]
    for part in parts[1:]:
        maximum = torch.maximum(maximum, part[1])
    numerator = denominator = maximum.new_zeros(())
    for part in parts:
        weight = (part[1] - maximum).exp_()
        numerator = numerator + part[0] * weight
        denominator = denominator + part[2] * weight
    return numerator / denominator
