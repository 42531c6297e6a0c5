"""Attention over a pack, where a token sees only its ancestors; for transformers' interface.

Key k is visible to query q iff k <= q < visible_until[k]; nothing else describes the forest.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from spo.learn.dense import dense, dense_plan
from spo.learn.flex import block_mask, flex, padded_length
from spo.learn.runs import Run, find_runs
from spo.models.load import HARMLESS

BENDS = {"sliding_window", "softcap", "s_aux"}  # options that the dense backend attends to
ROUND = 16  # runs whose lengths round up to the same multiple share a call


class Layout:
    """A pack, prepared once for all layers in the form that each way of attending needs."""

    def __init__(self, visible_until: Tensor, position_ids: Tensor, backend: str):
        size = visible_until.numel()
        self.backend = backend
        self.size = padded_length(size) if backend == "flex" else size  # tokens to forward
        self.tokens = size
        self.longest = int(position_ids.max()) + 1  # tokens of the longest path
        self._visible_until = visible_until
        self._plans: dict[str, Any] = {}

    def plan(self, backend: str) -> Any:
        """What `backend` needs to know of the pack."""
        if backend not in self._plans:
            self._plans[backend] = BACKENDS[backend][0](self._visible_until)
        return self._plans[backend]


_layout: ContextVar[Layout] = ContextVar("layout")


@contextmanager
def attending(layout: Layout):
    """Within it, `packed_attention` attends over this pack: not every model hands arguments on."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def attending_again() -> AbstractContextManager[None]:
    """A context in which attention is over the pack of now: for a layer's recomputation, later."""
    layout = _layout.get(None)
    return nullcontext() if layout is None else attending(layout)


@torch.compiler.disable  # it finds its pack in a context, and calls kernels of its own
def packed_attention(
    module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options
):
    """Attention for transformers' interface: query (1, H, T, hd), key and value (1, KVH, T, hd).

    A soft cap on scores, sinks, and a window that is shorter than a path are attended to by the
    dense backend, whatever the recipe says: the others leave them out.
    """
    layout = _layout.get(None)
    if layout is None:
        raise ValueError("expected a packed batch: call spo.learn.model.hidden_states")
    if dropout:
        raise ValueError(
            f"policy.dropout: packed training expects attention dropout 0, found {dropout:g}; "
            "policy.packing=rows trains with it"
        )
    given = {name for name, x in options.items() if x is not None and x is not False}
    if unknown := sorted(given - BENDS - HARMLESS):
        raise ValueError(f"the policy's attention uses {', '.join(unknown)}, which packing lacks")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = options.get("sliding_window")
    bends = {
        "window": window if window is not None and layout.longest > window else None,
        "softcap": options.get("softcap"),
        "sinks": options.get("s_aux"),
    }
    # Under autocast the rotary embedding returns query and key in fp32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    if any(x is not None for x in bends.values()):
        query, key, value = (x[:, :, : layout.tokens] for x in (query, key, value))
        out = dense(query, key, value, layout.plan("dense"), scaling, **bends)
        out = F.pad(out, (0, 0, 0, layout.size - layout.tokens))
        return out.transpose(1, 2).contiguous(), None
    wide = query.shape[-1] - value.shape[-1]  # MLA: values are narrower than keys
    padded = F.pad(value, (0, wide)) if wide else value
    plan = layout.plan(layout.backend)
    out = BACKENDS[layout.backend][1](query, key, padded, plan, scaling)
    return out[..., : value.shape[-1]].transpose(1, 2).contiguous(), None


# grouped: exactly the visible pairs, on the CPU


@dataclass(frozen=True)
class Group:
    """Runs of similar length, whose attention to themselves is one call."""

    index: Tensor  # (n, L) int64, tokens; a shorter run repeats its last token
    valid: Tensor | None  # (n, L) bool; None: no run is shorter


@dataclass(frozen=True)
class GroupedPlan:
    own: list[Group]
    above: list[Run]  # runs with descendants


def _grouped_plan(visible_until: Tensor) -> GroupedPlan:
    runs = find_runs(visible_until)
    lengths: dict[int, list[Run]] = {}
    for run in runs:
        lengths.setdefault(-(-(run.end - run.start) // ROUND), []).append(run)
    own = []
    for same in lengths.values():
        start, end = (torch.tensor(column)[:, None] for column in list(zip(*same, strict=True))[:2])
        index = start + torch.arange(int((end - start).max()))
        valid = index < end
        own.append(Group(torch.minimum(index, end - 1), None if valid.all() else valid))
    return GroupedPlan(own, [run for run in runs if run.until > run.end])


class _Grouped(torch.autograd.Function):
    """Softmax attention in parts: each run with itself, then each run's keys with its descendants.

    Parts are merged by their log-sum-exp. The gradient of a part needs only the merged output and
    log-sum-exp: P = exp(S - lse), dS = P * (dO V' - sum(dO * O)). So the same kernel, given these,
    returns each part's share. Tensors are (T, H, hd).
    """

    @staticmethod
    def forward(ctx, query, key, value, plan, scale):
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        keys, values = _repeat_heads(query, key, value)
        wide = torch.promote_types(query.dtype, torch.float32)
        out = query.new_empty(query.shape, dtype=wide)
        lse = query.new_empty(query.shape[:2], dtype=wide)
        for group in plan.own:
            parts = (_take(x, group).transpose(1, 2) for x in (query, keys, values))
            part, part_lse = kernel(*parts, 0.0, True, scale=scale)
            _put(out, group, part)
            _put(lse, group, part_lse)
        for start, end, until in plan.above:
            part, part_lse = kernel(
                _heads(query[end:until]),
                _heads(keys[start:end]),
                _heads(values[start:end]),
                0.0,
                False,
                scale=scale,
            )
            part, part_lse = part[0].transpose(0, 1), part_lse[0].transpose(0, 1)
            below = lse[end:until]
            share = torch.sigmoid(part_lse - below)[..., None]  # of the part in the merged softmax
            out[end:until].lerp_(part.to(wide), share)
            lse[end:until] = torch.logaddexp(below, part_lse)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.plan, ctx.scale = plan, scale
        return out

    # The type of torch's decorator loses the name `ctx`.
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_out):  # pyright: ignore[reportIncompatibleMethodOverride]
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, out, lse = ctx.saved_tensors
        keys, values = _repeat_heads(query, key, value)
        tensors = (grad_out.contiguous(), query, keys, values, out)
        dquery, dkeys, dvalues = (torch.empty_like(out, dtype=lse.dtype) for _ in range(3))
        for group in ctx.plan.own:
            parts = [_take(x, group).transpose(1, 2) for x in tensors]
            if group.valid is not None:
                parts[0] = parts[0] * group.valid[:, None, :, None]
            sums = _take(lse, group).transpose(1, 2)
            grads = kernel(*parts, sums, 0.0, True, scale=ctx.scale)
            for whole, part in zip((dquery, dkeys, dvalues), grads, strict=True):
                _put(whole, group, part)
        for start, end, until in ctx.plan.above:
            below, above = slice(end, until), slice(start, end)
            slices = (below, below, above, above, below)
            dq, dk, dv = kernel(
                *(_heads(tensors[i][rows]) for i, rows in enumerate(slices)),
                _heads(lse[below]),
                0.0,
                False,
                scale=ctx.scale,
            )
            dquery[below] += dq[0].transpose(0, 1)
            dkeys[above] += dk[0].transpose(0, 1)
            dvalues[above] += dv[0].transpose(0, 1)
        size, heads, width = key.shape
        dkey, dvalue = (x.view(size, heads, -1, width).sum(2) for x in (dkeys, dvalues))
        return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype), None, None


def _repeat_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """key and value (T, KVH, hd) with the heads of query (T, H, hd)."""
    times = query.shape[1] // key.shape[1]
    if times == 1:
        return key, value
    return key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)


def _heads(x: Tensor) -> Tensor:
    """(L, H, ...) as (1, H, L, ...)."""
    return x.transpose(0, 1)[None]


def _take(x: Tensor, group: Group) -> Tensor:
    """The group's tokens of x (T, ...): (n, L, ...). Row by row, twice as fast as an index."""
    return x.index_select(0, group.index.flatten()).unflatten(0, group.index.shape)


def _put(whole: Tensor, group: Group, part: Tensor) -> None:
    """Write part (n, H, L, ...) to the group's tokens of whole (T, H, ...)."""
    part = part.transpose(1, 2)
    if group.valid is None:
        whole[group.index] = part.to(whole.dtype)
    else:
        whole[group.index[group.valid]] = part[group.valid].to(whole.dtype)


def _grouped(query: Tensor, key: Tensor, value: Tensor, plan: GroupedPlan, scale: float) -> Tensor:
    if query.device.type != "cpu":
        raise ValueError(
            f"policy.attention=grouped: expected tensors on the CPU, found {query.device}"
        )
    tensors = (x[0].transpose(0, 1) for x in (query, key, value))
    return _heads(_Grouped.apply(*tensors, plan, scale))


# varlen: flash-attn, one sequence per run, with its ancestors' keys gathered


@dataclass(frozen=True)
class VarlenPlan:
    key_index: Tensor  # (K,) int64, every run's ancestors, then itself
    cu_queries: Tensor  # (R+1,) int32
    cu_keys: Tensor  # (R+1,) int32
    longest_query: int
    longest_key: int


def _varlen_plan(visible_until: Tensor) -> VarlenPlan:
    path: list[Run] = []
    index, queries, keys = [], [0], [0]
    for run in find_runs(visible_until):
        while path and path[-1].until <= run.start:
            path.pop()
        path.append(run)
        index += [torch.arange(start, end) for start, end, _ in path]
        queries.append(run.end)
        keys.append(keys[-1] + sum(end - start for start, end, _ in path))
    device = visible_until.device
    cu_queries, cu_keys = (torch.tensor(x, dtype=torch.int32) for x in (queries, keys))
    return VarlenPlan(
        torch.cat(index).to(device),
        cu_queries.to(device),
        cu_keys.to(device),
        int(cu_queries.diff().max()),
        int(cu_keys.diff().max()),
    )


def _varlen(query: Tensor, key: Tensor, value: Tensor, plan: VarlenPlan, scale: float) -> Tensor:
    try:  # an optional package
        from flash_attn import flash_attn_varlen_func  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            "policy.attention=varlen needs the package flash-attn: "
            "pip install --no-build-isolation 'spo-kernels[flash-attn]'"
        ) from error
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    out = flash_attn_varlen_func(
        query,
        key[plan.key_index],
        value[plan.key_index],
        plan.cu_queries,
        plan.cu_keys,
        plan.longest_query,
        plan.longest_key,
        softmax_scale=scale,
        causal=True,  # aligned to the last key: a run's tokens are the end of its path
    )
    return _heads(out)


BACKENDS: dict[str, tuple[Callable, Callable]] = {
    "dense": (dense_plan, dense),
    "grouped": (_grouped_plan, _grouped),
    "flex": (block_mask, flex),
    "varlen": (_varlen_plan, _varlen),
}
PREFIX = "spo_"  # of the backends' names in transformers' interface
for _name in BACKENDS:
    AttentionInterface.register(PREFIX + _name, packed_attention)
