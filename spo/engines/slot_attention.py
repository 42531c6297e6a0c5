"""Attention of the embedded engine: every row against its own slot and the prefixes it shares.

A decode step reads each shared prefix once for all its branches: one matrix product per prefix
computes a partial softmax (numerator, maximum, denominator) of every branch, and the parts are
merged. Reading the prefix once per branch would read rows * prefix keys, which takes most of the
time of a step when many branches share a long prefix.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

IMPLEMENTATION = "spo_slots"  # its name in transformers' attention interface
NOTHING = -1e30  # maximum of a part that read no key; finite, so that merging it gives no NaN
SCORES = 1 << 26  # maximum number of attention scores of a prefill that are held at once

Part = tuple[Tensor, Tensor, Tensor]
"""Numerator (..., hd), maximum (..., 1) and denominator (..., 1) of a softmax over some keys."""


@dataclass(frozen=True)
class SharedSpan:
    """A stretch of one slot's keys that several rows of the batch read."""

    slot: int
    start: int  # position of its first key in the rows' sequences
    length: int  # keys 0:length of the slot are read by the row with the longest read
    rows: Tensor | None  # (n,) int64, indices in the batch; None: all rows
    depth: int  # number of shared spans before it in its rows' sequences
    visible: Tensor | None  # (n, 1, length) bool if the rows read different lengths


@dataclass(frozen=True)
class Visible:
    """What the tokens of a batch may read under one of the model's mask patterns."""

    own: Tensor  # (R, 1, C, length) bool, of their rows' own keys
    spans: Sequence[Tensor | None] = ()  # (n, 1, length) bool for each shared span; None: all


@dataclass
class SlotView:
    """Where this forward writes its keys and values, and what each query may read."""

    calls: Sequence[tuple[Tensor, Tensor]]  # (slots, KVH, max_len + 1, hd) of keys and of values,
    # for each call of the attention in a forward, in order
    rows: slice  # the slots of this batch
    indices: Tensor  # (R, C) int64, index of every token of the batch in its row's own slot
    length: int  # no row reads its own keys beyond this
    visible: Sequence[Visible]  # for each call
    spans: Sequence[SharedSpan] = ()  # only where C = 1
    done: int = 0  # calls so far


_VIEW: ContextVar[SlotView] = ContextVar("slots that this forward reads and writes")


@contextmanager
def reading(view: SlotView) -> Iterator[None]:
    """Forwards inside read and write these slots. Not every model passes options on to its layers.

    Raises ValueError if the forward did not call its attention once for each of `view.calls`.
    """
    token = _VIEW.set(view)
    try:
        yield
    finally:
        _VIEW.reset(token)
    if view.done != len(view.calls):
        raise ValueError(
            f"expected {len(view.calls)} calls of the attention in a forward, found {view.done}"
        )


def slot_attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **_
):
    """Attention of a batch over its slots; registered with transformers' attention interface.

    query (R, H, C, hd); key and value (R, KVH, C, hd) are written to the cache first. The masks are
    those of the view: the model makes none for this implementation.
    """
    view = _VIEW.get()
    cache, visible = view.calls[view.done], view.visible[view.done]
    view.done += 1
    rows = torch.arange(query.shape[0], device=query.device)[:, None]
    own = []
    for plane, new in zip(cache, (key, value), strict=True):
        mine = plane[view.rows]
        mine[rows, :, view.indices] = new.transpose(1, 2)
        own.append(mine[:, :, : view.length])
    keys, values = own
    r, heads, c, width = query.shape
    plain = softcap is None and s_aux is None
    if c > 1 and plain:
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible.own, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2), None
    if c == 1 and plain and not view.spans:
        # The heads of a group are queries of one key head, so keys need not be repeated.
        query = query.reshape(r, keys.shape[1], -1, width)
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible.own, scale=scaling
        )
        return out.reshape(r, 1, heads, -1), None
    scaled = query.float() * (width**-0.5 if scaling is None else scaling)
    scaled = scaled.reshape(r, keys.shape[1], -1, c, width)
    step = max(1, SCORES // (r * heads * view.length))
    pieces = [
        _attend(
            scaled[:, :, :, at : at + step],
            keys,
            values,
            cache,
            Visible(visible.own[:, :, at : at + step], visible.spans),
            view.spans,
            softcap,
            s_aux,
        )
        for at in range(0, c, step)
    ]
    out = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 3)
    return out.to(query.dtype).reshape(r, heads, c, -1).transpose(1, 2), None


AttentionInterface.register(IMPLEMENTATION, slot_attention)


def _attend(
    scaled: Tensor,  # (R, KVH, G, C, hd) fp32, G query heads for each key head
    keys: Tensor,  # (R, KVH, length, hd), each row's own
    values: Tensor,  # (R, KVH, length, hd)
    cache: tuple[Tensor, Tensor],  # keys and values of all slots
    visible: Visible,
    spans: Sequence[SharedSpan],
    softcap: float | None,  # of the scores
    sinks: Tensor | None,  # (H,), score of a key without a value
) -> Tensor:  # (R, KVH, G, C, hd) fp32
    """Softmax attention over a row's own keys and those of its shared spans."""
    r, kv_heads, group, c, width = scaled.shape
    query = scaled.reshape(r, kv_heads, group * c, width)
    own = visible.own
    if c > 1:
        own = own[:, :, None].expand(-1, -1, group, -1, -1).reshape(r, 1, group * c, -1)
    parts = [partial_attention(query, keys, values, own, softcap)]
    scattered: dict[int, Part] = {}  # depth -> part; a row reads at most one span per depth
    for span, mask in zip(spans, visible.spans, strict=True):
        rows = slice(None) if span.rows is None else span.rows
        queries = query[rows].transpose(0, 1).reshape(kv_heads, -1, width)
        n = queries.shape[1] // group
        if mask is not None:
            mask = mask.expand(n, group, span.length).reshape(n * group, span.length)
        shared_keys, shared_values = (plane[span.slot, :, : span.length] for plane in cache)
        numerator, maximum, denominator = (
            x.view(kv_heads, n, group, -1).transpose(0, 1)
            for x in partial_attention(queries, shared_keys, shared_values, mask, softcap)
        )
        part = numerator, maximum, denominator
        if span.rows is None:
            parts.append(part)
            continue
        if span.depth not in scattered:
            unread = query.new_full((r, kv_heads, group, 1), NOTHING)
            empty = query.new_zeros((r, kv_heads, group, values.shape[-1]))
            scattered[span.depth] = (empty, unread, torch.zeros_like(unread))
        for whole, piece in zip(scattered[span.depth], part, strict=True):
            whole[rows] = piece
    parts += scattered.values()
    if sinks is not None:
        sink = sinks.float().view(kv_heads, group, 1).repeat_interleave(c, 1)
        parts.append((torch.zeros_like(sink), sink, torch.ones_like(sink)))
    return merge(parts).view(r, kv_heads, group, c, -1)


def partial_attention(
    query: Tensor,  # (..., Q, hd) fp32, scaled
    keys: Tensor,  # (..., K, hd)
    values: Tensor,  # (..., K, hd)
    visible: Tensor | None,  # (..., Q, K) bool; None: all
    softcap: float | None = None,  # scores become softcap * tanh(scores / softcap)
) -> Part:
    """Softmax of `query @ keys.T` times values, not yet normalised, so that parts can be merged.

    Computed in fp32 for any cache dtype: scores rounded to bfloat16 would be off by a percent.
    """
    scores = query @ keys.float().transpose(-1, -2)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    if visible is not None:
        scores.masked_fill_(~visible, -torch.inf)
    maximum = scores.amax(-1, keepdim=True)
    if visible is not None:
        maximum.clamp_(min=NOTHING)
    weights = scores.sub_(maximum).exp_()
    return weights @ values.float(), maximum, weights.sum(-1, keepdim=True)


def merge(parts: Sequence[Part]) -> Tensor:
    """Normalised attention over the union of the parts' keys.

    A part that read no key has a maximum of at most `NOTHING`; one part must have read one.
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
