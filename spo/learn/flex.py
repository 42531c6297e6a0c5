"""FlexAttention over a pack: the default backend of `attention` on CUDA."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

BLOCK = 128  # tokens of a FlexAttention block
BUCKETS = 8  # FlexAttention compiles per length: at most this many lengths per power of two


def padded_length(size: int) -> int:
    """`size` rounded up to one of a few lengths, at most BUCKETS per power of two."""
    blocks = -(-size // BLOCK)
    step = 1 << max(0, (blocks - 1).bit_length() - BUCKETS.bit_length())
    return -(-blocks // step) * step * BLOCK


def block_mask(visible_until: Tensor):
    """FlexAttention's BlockMask of a pack, from one minimum and one maximum per key block.

    Block (i, j), j <= i, holds a visible pair iff max(until[j]) > i * BLOCK, and only visible pairs
    iff j < i and min(until[j]) >= (i + 1) * BLOCK. A padding token sees only itself.
    """
    from torch.nn.attention.flex_attention import BlockMask

    size, device = visible_until.numel(), visible_until.device
    total = padded_length(size)
    until = torch.arange(1, total + 1, device=device, dtype=torch.int32)
    until[:size] = visible_until
    per_block = until.view(-1, BLOCK)
    begin = torch.arange(total // BLOCK, device=device)[:, None] * BLOCK
    earlier = begin.T < begin
    full = earlier & (per_block.amin(1) >= begin + BLOCK)
    partial = (earlier & (per_block.amax(1) > begin) & ~full) | (begin.T == begin)
    lists = []
    for blocks in (partial, full):
        order = torch.argsort(blocks.int(), dim=1, descending=True, stable=True)
        lists += [blocks.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]]

    def visible(batch, head, q, k):
        return (k <= q) & (q < until[k])

    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=BLOCK, mask_mod=visible)


@cache
def _flex_kernel(device: str) -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    if device != "cuda":
        return flex_attention
    limits = torch._dynamo.config  # past its limit of lengths all scores would be materialised
    limits.recompile_limit = max(limits.recompile_limit, 16 * BUCKETS)
    return torch.compile(flex_attention, dynamic=False)


def flex(query: Tensor, key: Tensor, value: Tensor, plan, scale: float) -> Tensor:
    if query.device.type == "cpu" and query.requires_grad:
        raise ValueError("policy.attention=flex has no backward on the CPU")
    kernel = _flex_kernel(query.device.type)
    return kernel(query, key, value, block_mask=plan, scale=scale, enable_gqa=True)
