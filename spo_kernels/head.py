"""The vocabulary projection of selected rows, in chunks: logits forward, the two products backward.

The logits are fp32 unless the caller asks for a lower `logits_dtype`: rounding them to bf16 costs
up to 4e-3 in a logprob. Only sums of their gradient are used, so it is bf16 for bf16 operands
wherever the device multiplies bf16 fast.

A CPU without bf16 instructions multiplies bf16 up to a hundred times slower than fp32. There bf16
operands are widened to fp32, the weight block by block, as fp16 operands are everywhere.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from spo_kernels import cpu_bf16, memory, rows

BLOCK_ELEMENTS = 1 << 22  # of the weight widened at a time: 16 MiB of fp32, to stay in the cache


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_index: Tensor | None
) -> tuple[int, ...]:
    """Check the head's tensors; the shape that the per-token arguments must have."""
    rows.check_tensors(hidden=hidden, weight=weight)
    rows.check_optional_tensors(bias=bias, hidden_index=hidden_index)
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name}: expected floating-point numbers, found {tensor.dtype}")
    if weight.ndim != 2 or hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden and weight: expected shapes (..., D) and (V, D) with the same D, "
            f"found {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), found {tuple(bias.shape)}")
    if hidden_index is None:
        return tuple(hidden.shape[:-1])
    if hidden.ndim != 2:
        raise ValueError(f"hidden: expected (H, D) with hidden_index, found {tuple(hidden.shape)}")
    if hidden_index.dtype != torch.int64 or hidden_index.ndim != 1:
        raise TypeError(
            "hidden_index: expected a 1-D int64 tensor, "
            f"found {hidden_index.dtype} of shape {tuple(hidden_index.shape)}"
        )
    return tuple(hidden_index.shape)


def check_options(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden_index: Tensor | None,
    logits_dtype: torch.dtype,
) -> None:
    """Raise ValueError for tensors on different devices or an unknown `logits_dtype`."""
    rows.check_devices(hidden, weight=weight, bias=bias, hidden_index=hidden_index)
    if logits_dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"logits_dtype: expected torch.float32 or torch.bfloat16, found {logits_dtype}"
        )


def needs_grad(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[bool]:
    """Which of the three want a gradient."""
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in (hidden, weight, bias)]


def refuse_low_precision(logits_dtype: torch.dtype) -> None:
    """Raise ValueError for logits that the reference cannot make: it has fp32 and fp64 only."""
    if logits_dtype != torch.float32:
        raise ValueError(
            f"logits_dtype: expected torch.float32 on the reference backend, found {logits_dtype}"
        )


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Buffers for dhidden, dweight, dbias; (0,) where no gradient is wanted."""
    wanted = zip((hidden, weight, bias), needs, strict=True)
    return tuple(
        x.new_empty(x.shape) if need and x is not None else hidden.new_empty(0)
        for x, need in wanted
    )


def select_states(hidden: Tensor, hidden_index: Tensor | None, index: Tensor) -> Tensor:
    """Rows of `hidden.reshape(-1, D)` that predict the selected tokens `index` (n,)."""
    if hidden_index is None:
        return index
    states = hidden_index[index]
    first, last = (int(states.min()), int(states.max())) if states.numel() else (0, -1)
    if first < 0 or last >= hidden.shape[0]:
        raise ValueError(
            f"hidden_index: expected indices in [0, {hidden.shape[0]}) where a token is kept, "
            f"found {first} to {last}"
        )
    return states


def select_states_fixed(
    flat: Tensor, hidden_index: Tensor | None, index: Tensor
) -> tuple[Tensor, Tensor]:  # (n,), (n,) bool
    """`select_states` without reading the data, for CUDA graphs.

    An entry N of `index`, or an entry of `hidden_index` out of range, gives state H. The second
    result is False for entries out of range.
    """
    last = flat.shape[0]
    if hidden_index is None:
        return index, torch.ones_like(index, dtype=torch.bool)
    states = torch.cat([hidden_index, hidden_index.new_full((1,), last)])[index]
    known = (states >= 0) & (states < last) | (index == hidden_index.shape[0])
    return torch.where(known, states, last), known


def chunks(count: int, vocab: int, dtype: torch.dtype, memory_budget: int) -> Iterator[slice]:
    """Cut the rows into the fewest equal chunks whose logits fit the budget (bytes)."""
    if count == 0:
        return
    pieces = math.ceil(count * vocab * dtype.itemsize / max(memory_budget, 1))
    size = math.ceil(count / min(count, max(pieces, 1)))
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def _is_fast_bf16(x: Tensor, weight: Tensor) -> bool:
    """Whether both are bf16 and the device multiplies bf16 matrices fast."""
    if not x.dtype == weight.dtype == torch.bfloat16:
        return False
    return x.device.type != "cpu" or cpu_bf16.is_fast()


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """The weight in `dtype`: whole if it has that dtype, else block by block in one buffer."""
    vocab, width = weight.shape
    if weight.dtype == dtype:
        yield slice(0, vocab), weight
        return
    size = max(1, BLOCK_ELEMENTS // max(width, 1))
    buffer = memory.empty((min(size, vocab), width), dtype, weight.device)
    for begin in range(0, vocab, size):
        block = slice(begin, min(begin + size, vocab))
        yield block, buffer[: block.stop - begin].copy_(weight[block])


def project(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x (n, D) times weight (V, D) transposed, plus bias: logits (n, V) of `dtype`."""
    fast = _is_fast_bf16(x, weight)
    if fast and dtype == torch.float32 and x.is_cuda:
        logits = torch.mm(x, weight.t(), out_dtype=dtype)
    else:
        logits = memory.empty((x.shape[0], weight.shape[0]), dtype, x.device)
        wide = fast and dtype == torch.float32
        if not (wide and cpu_bf16.multiply(x, weight, logits)):
            with cpu_bf16.rounded() if wide else contextlib.nullcontext():
                x = x.to(dtype)
                for block, w in _blocks(weight, dtype):
                    torch.mm(x, w.t(), out=logits[:, block])
    return logits if bias is None else logits.add_(bias)


def gradient_buffer(logits: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Where the gradient of the logits goes: over the logits themselves; on CUDA unless it is bf16.

    On the CPU a bf16 gradient fills the first half of each fp32 row, which its sweep has read.
    """
    if logits.dtype == torch.float32 and _is_fast_bf16(x, weight):
        if logits.device.type == "cpu":
            return logits.view(torch.bfloat16)[:, : logits.shape[1]]
        return memory.empty(logits.shape, torch.bfloat16, logits.device)
    return logits


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (n, D) to logits (n, V) in differentiable PyTorch, fp32 (fp64 for fp64 x)."""
    dtype = rows.math_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        bias = None if bias is None else bias.to(dtype)
        return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias)


class HeadGradients:
    """Gradients of a head, chunk by chunk.

    dweight and dbias are summed over chunks in fp32. dhidden is collected per row, and summed at
    the end over the rows that share a hidden state.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, needs: list[bool]):
        """`needs`: which of hidden, weight and bias want a gradient."""
        self.weight, self.bias = weight, bias
        self.needs_hidden, self.needs_weight, self.needs_bias = needs
        self.dx: list[Tensor] = []  # (c, D) of each chunk
        self.dweight: Tensor | None = None  # (V, D)
        self.dbias: Tensor | None = None  # (V,) fp32

    def add(self, dlogits: Tensor, x: Tensor, only: bool) -> None:
        """Add a chunk: dlogits (c, V), x (c, D).

        `only`: there is no other chunk, so dweight is written in its own dtype at once.
        """
        if self.needs_hidden:
            blocks = _blocks(self.weight, dlogits.dtype)
            block, w = next(blocks)
            dx = torch.mm(dlogits[:, block], w)
            for block, w in blocks:
                dx.addmm_(dlogits[:, block], w)
            self.dx.append(dx)
        if self.needs_weight:
            self._add_weight(dlogits, x.to(dlogits.dtype), only)
        if self.needs_bias:
            dbias = dlogits.sum(0, dtype=torch.float32)
            self.dbias = dbias if self.dbias is None else self.dbias.add_(dbias)

    def _add_weight(self, dlogits: Tensor, x: Tensor, only: bool) -> None:
        total, first = self.dweight, self.dweight is None
        if total is None:
            dtype = self.weight.dtype if only else torch.float32
            total = self.dweight = memory.empty(self.weight.shape, dtype, x.device)
        if total.dtype == dlogits.dtype:
            if first:
                torch.mm(dlogits.t(), x, out=total)
            else:
                total.addmm_(dlogits.t(), x)
            return
        if total.is_cuda and total.dtype == torch.float32 and dlogits.dtype == torch.bfloat16:
            if first:
                torch.mm(dlogits.t(), x, out_dtype=total.dtype, out=total)
            else:
                torch.addmm(total, dlogits.t(), x, out_dtype=total.dtype, out=total)
            return
        vocab, width = total.shape
        size = max(1, BLOCK_ELEMENTS // max(width, 1))
        buffer = memory.empty((min(size, vocab), width), dlogits.dtype, x.device)
        for begin in range(0, vocab, size):
            piece = total[begin : begin + size]
            part = torch.mm(dlogits[:, begin : begin + size].t(), x, out=buffer[: len(piece)])
            piece.copy_(part) if first else piece.add_(part)

    def finish(self, hidden: Tensor, states: Tensor, shared: bool) -> tuple[Tensor, Tensor, Tensor]:
        """dhidden, dweight, dbias, shaped as hidden, weight, bias; empty where not needed.

        `states` (n,) is the hidden state of each added row; `shared`: states may repeat.
        """
        dhidden, dweight, dbias = (hidden.new_empty(0) for _ in range(3))
        if self.needs_hidden:
            width, last = hidden.shape[-1], hidden.numel() // max(hidden.shape[-1], 1)
            dhidden = hidden.new_zeros(last + shared, width)
            if self.dx:
                dx = torch.cat(self.dx) if len(self.dx) > 1 else self.dx[0]
                if shared:
                    states, dx = _sum_shared(states, dx.float(), last)
                dhidden[states] = dx.to(hidden.dtype)
            dhidden = dhidden[:last].view(hidden.shape)
        if self.needs_weight:
            dweight = self.dweight
            if dweight is None:
                dweight = memory.zeros(self.weight.shape, self.weight.dtype, self.weight.device)
            dweight = dweight.to(self.weight.dtype)
        if self.needs_bias and self.bias is not None:
            dbias = self.bias.new_zeros(self.bias.shape) if self.dbias is None else self.dbias
            dbias = dbias.to(self.bias.dtype)
        return dhidden, dweight, dbias


def _sum_shared(states: Tensor, dx: Tensor, unused: int) -> tuple[Tensor, Tensor]:
    """Sum the rows of dx (n, D) that have the same state, in their order.

    Returns n states and n sums; the entries that are left over have the state `unused`. So no shape
    depends on the data, and no sum is atomic.
    """
    states, order = torch.sort(states, stable=True)
    first = torch.ones_like(states, dtype=torch.bool)
    first[1:] = states[1:] != states[:-1]
    group = first.cumsum(0) - 1
    lengths = torch.zeros_like(states).scatter_add_(0, group, torch.ones_like(states))
    sums = torch.segment_reduce(dx[order], "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
    return torch.full_like(states, unused).scatter_(0, group, states), sums
