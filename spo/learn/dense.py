"""Dense attention over a pack: the reference for every device.

It is also the only one that bends scores: with a soft cap, sinks, or a window shorter than a path.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spo.learn.runs import tree_spans


def dense_plan(visible_until: Tensor) -> list[tuple[int, int, Tensor]]:
    """(start, end, mask (L, L) bool) of each tree: trees do not see each other."""
    blocks = []
    for start, end in tree_spans(visible_until):
        query = torch.arange(start, end, device=visible_until.device)[:, None]
        blocks.append((start, end, (query.T <= query) & (query < visible_until[start:end])))
    return blocks


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: list[tuple[int, int, Tensor]],
    scale: float,
    *,
    window: int | None = None,  # tokens, the query's own included
    softcap: float | None = None,  # of the scores
    sinks: Tensor | None = None,  # (H,), a score without a value
) -> Tensor:
    pieces = []
    for start, end, mask in plan:
        q, k, v = (x[:, :, start:end] for x in (query, key, value))
        if window is not None:
            position = mask.sum(1)  # along its path, as a token sees just that
            mask = mask & (position[:, None] - position < window)
        if softcap is None and sinks is None:
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
            )
        else:
            out = _bent_attention(q, k, v, mask, scale, softcap, sinks)
        pieces.append(out)
    return torch.cat(pieces, dim=2)


def _bent_attention(
    query: Tensor,  # (1, H, L, hd)
    key: Tensor,
    value: Tensor,
    mask: Tensor,  # (L, L) bool
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    times = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(times, 1) for x in (key, value))
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    share = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    return share[..., : key.shape[2]].to(value.dtype) @ value
