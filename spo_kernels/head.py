"""The vocabulary projection of selected rows, in chunks: logits forward, the two products backward.

Logits are fp32 unless the caller asks for a lower `logits_dtype`: bf16 costs up to 4e-3 in a
logprob. Only sums of their gradient are used, so it is bf16 wherever bf16 products are fast.

A CPU without bf16 instructions multiplies bf16 up to a hundred times slower than fp32. There bf16
operands are widened to fp32, the weight block by block, as fp16 operands are everywhere.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from spo_kernels import cpu_bf16, cpu_fixed, memory, products, rows

MEMORY_BUDGET = 1 << 30  # bytes of logits that the head makes at a time
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


def check_reference(hidden: Tensor, logits_dtype: torch.dtype, batch_invariant: bool) -> None:
    """Raise ValueError for what the reference cannot do: it has fp32 and fp64 logits only, from
    PyTorch's products."""
    if hidden.is_meta:
        return
    if logits_dtype != torch.float32:
        raise ValueError(
            f"logits_dtype: expected torch.float32 on the reference backend, found {logits_dtype}"
        )
    if batch_invariant:
        raise ValueError(
            "batch_invariant: expected False on the reference backend, found True: the bits of "
            "PyTorch's products depend on the batch"
        )


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, ...]:
    """Buffers for dhidden, dweight, dbias; (0,) where no gradient is wanted."""
    wanted = zip((hidden, weight, bias), needs, strict=True)
    return tuple(
        x.new_empty(x.shape, dtype=gradient_dtype(x)) if need and x is not None
        else hidden.new_empty(0, dtype=gradient_dtype(hidden))
        for x, need in wanted
    )  # fmt: skip


def gradient_dtype(leaf: Tensor) -> torch.dtype:
    """Of a gradient that the forward forms. That of an fp16 tensor is rounded in the backward, when
    the factor of a loss scaler has reached it."""
    return torch.float32 if leaf.dtype == torch.float16 else leaf.dtype


def operand_of(hidden: Tensor, weight: Tensor) -> Tensor:
    """The weight as the products take it. The CPU widens it block by block instead."""
    if not products.on_gpu(hidden):
        return weight
    return weight.to(products.common_dtype(hidden, weight))


def budget(given: int | None, device: torch.device, needed: int) -> int:
    """Bytes of logits that may exist at a time, of `needed` in all.

    Every chunk but the first reads and writes an fp32 gradient of the weight, so a GPU takes a
    quarter of what is free, up to 6 GiB.
    """
    if given is not None or device.type != "cuda" or needed <= MEMORY_BUDGET:
        return MEMORY_BUDGET if given is None else given
    if torch.cuda.is_current_stream_capturing():
        return MEMORY_BUDGET
    free = torch.cuda.mem_get_info(device)[0]
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return share_of(free)


def share_of(free: int) -> int:
    """Bytes of logits that a GPU with so many free bytes makes at a time."""
    return max(MEMORY_BUDGET, min(6 * MEMORY_BUDGET, free // 4))


def flatten(hidden: Tensor) -> Tensor:
    """Hidden states (..., D) as (H, D), for D of 0 too."""
    return hidden.reshape(math.prod(hidden.shape[:-1]), hidden.shape[-1])


def select_states(hidden: Tensor, hidden_index: Tensor | None, index: Tensor) -> Tensor:
    """Rows of `hidden.reshape(-1, D)` that predict the selected tokens `index` (n,)."""
    if hidden_index is None:
        return index
    check_states(hidden_index, hidden.shape[0], index)
    return hidden_index[index]


def check_states(hidden_index: Tensor, num_states: int, index: Tensor) -> None:
    """Raise ValueError if one of the tokens `index` (n,) has no hidden state."""
    states = hidden_index[index]
    first, last = (int(states.min()), int(states.max())) if states.numel() else (0, -1)
    if first < 0 or last >= num_states:
        raise ValueError(
            f"hidden_index: expected indices in [0, {num_states}) where a token is kept, "
            f"found {first} to {last}"
        )


def chunks(count: int, vocab: int, dtype: torch.dtype, memory_budget: int) -> Iterator[slice]:
    """Cut the rows into the fewest equal chunks whose logits fit the budget (bytes)."""
    if count == 0:
        return
    pieces = math.ceil(count * vocab * dtype.itemsize / max(memory_budget, 1))
    size = math.ceil(count / min(count, max(pieces, 1)))
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


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


def project(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, fixed: bool = False
) -> Tensor:
    """x (n, D) times weight (V, D) transposed, plus bias: logits (n, V) of `dtype`.

    `fixed`: a row has the same bits whatever rows, and on the CPU threads, stand beside it.
    """
    if products.on_gpu(x):
        logits = products.logits(x.to(weight.dtype), weight, dtype, fixed)
        return logits if bias is None else logits.add_(bias)
    rows_alike = -(-weight.shape[0] // 64) * 64  # Triton sums a row by how its start is aligned
    width = rows_alike if fixed else weight.shape[0]
    logits = memory.empty((x.shape[0], width), dtype, x.device)[:, : weight.shape[0]]
    if fixed:
        cpu_fixed.logits(x, weight, logits)
    else:
        wide = dtype == torch.float32 and cpu_bf16.multiplies(x, weight)
        if not (wide and cpu_bf16.multiply(x, weight, logits)):
            with cpu_bf16.rounded() if wide else contextlib.nullcontext():
                x = x.to(dtype)
                for block, w in _blocks(weight, dtype):
                    torch.mm(x, w.t(), out=logits[:, block])
    return logits if bias is None else logits.add_(bias)


def gradient_buffer(logits: Tensor, x: Tensor, weight: Tensor, backend: str) -> Tensor:
    """Where the gradient of the logits goes: over the logits, unless a GPU's is half as wide.

    On the CPU a bf16 gradient fills the first half of each fp32 row, which its sweep has read.
    """
    if products.on_gpu(x):
        if logits.dtype == torch.bfloat16 or weight.dtype == torch.float32:
            return logits
        n, vocab = logits.shape
        return products.columns(n, vocab, weight.dtype, logits.device)
    if logits.dtype == torch.float32 and cpu_bf16.multiplies(x, weight):
        if backend == "cpu":  # its sweep writes behind what it has read
            return logits.view(torch.bfloat16)[:, : logits.shape[1]]
        return memory.empty(logits.shape, torch.bfloat16, logits.device)
    return logits


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (n, D) to logits (n, V) in differentiable PyTorch, fp32 (fp64 for fp64 x)."""
    dtype, outside = rows.math_dtype(x), contextlib.nullcontext()
    with outside if x.is_meta else torch.autocast(x.device.type, enabled=False):
        bias = None if bias is None else bias.to(dtype)
        return torch.nn.functional.linear(x.to(dtype), weight.to(dtype), bias)


class HeadGradients:
    """Gradients of a head, chunk by chunk.

    dweight and dbias are summed over chunks in fp32. dhidden is collected per row, and summed at
    the end over the rows that share a hidden state.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        operand: Tensor,  # the weight in the dtype of the products
        bias: Tensor | None,
        needs: list[bool],
        fixed: bool = False,
    ):
        """`needs`: which of the three want a gradient. `fixed`: of `project`, for dhidden."""
        self.fixed = fixed
        self.weight, self.operand, self.bias = weight, operand, bias
        self.hidden_dtype, self.weight_dtype = gradient_dtype(hidden), gradient_dtype(weight)
        self.needs_hidden, self.needs_weight, self.needs_bias = needs
        self.dx: list[Tensor] = []  # (c, D) of each chunk
        self.dweight: Tensor | None = None  # (V, D)
        self.dbias: Tensor | None = None  # (V,) fp32

    def add(self, dlogits: Tensor, x: Tensor, only: bool) -> None:
        """Add a chunk: dlogits (c, V), x (c, D).

        `only`: there is no other chunk, so dweight is written in its own dtype at once.
        """
        if self.needs_hidden:
            self.dx.append(self._states_gradient(dlogits))
        if self.needs_weight:
            self._add_weight(dlogits, x.to(dlogits.dtype), only)
        if self.needs_bias:
            dbias = dlogits.sum(0, dtype=rows.math_dtype(dlogits))
            self.dbias = dbias if self.dbias is None else self.dbias.add_(dbias)

    def _states_gradient(self, dlogits: Tensor) -> Tensor:
        if products.on_gpu(dlogits):
            operand = self.operand.to(dlogits.dtype)
            return products.states_gradient(dlogits, operand, self.hidden_dtype, self.fixed)
        if self.fixed:
            return cpu_fixed.states_gradient(dlogits, self.operand)
        if dlogits.dtype == torch.bfloat16:
            cpu_bf16.clear_behind(dlogits)
        blocks = _blocks(self.operand, dlogits.dtype)
        block, w = next(blocks)
        dx = torch.mm(dlogits[:, block], w)
        for block, w in blocks:
            dx.addmm_(dlogits[:, block], w)
        return dx

    def _add_weight(self, dlogits: Tensor, x: Tensor, only: bool) -> None:
        total, first = self.dweight, self.dweight is None
        if total is None:
            dtype = self.weight_dtype if only else rows.math_dtype(dlogits)
            if products.on_gpu(dlogits):
                dtype = products.result_dtype(dlogits, dtype)
            total = self.dweight = memory.empty(self.weight.shape, dtype, x.device)
        if products.on_gpu(dlogits):
            return products.weight_gradient(dlogits, x, total, first)
        if total.dtype == dlogits.dtype:
            if first:
                torch.mm(dlogits.t(), x, out=total)
            else:
                total.addmm_(dlogits.t(), x)
            return
        vocab, width = total.shape
        size = max(1, BLOCK_ELEMENTS // max(width, 1))
        buffer = memory.empty((min(size, vocab), width), dlogits.dtype, x.device)
        for begin in range(0, vocab, size):
            piece = total[begin : begin + size]
            part = torch.mm(dlogits[:, begin : begin + size].t(), x, out=buffer[: len(piece)])
            piece.copy_(part) if first else piece.add_(part)

    def finish(
        self, hidden: Tensor, states: Tensor, shared: bool, spare: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dhidden, dweight, dbias, shaped as hidden, weight, bias; empty where not needed.

        `states` (n,) is the hidden state of each added row. `shared`: states may repeat. `spare`:
        one more state takes the rows of none.
        """
        dhidden, dweight, dbias = (hidden.new_empty(0, dtype=self.hidden_dtype) for _ in range(3))
        if self.needs_hidden:
            width, last = hidden.shape[-1], hidden.numel() // max(hidden.shape[-1], 1)
            dhidden = hidden.new_zeros((last + (shared or spare), width), dtype=self.hidden_dtype)
            if self.dx:
                dx = torch.cat(self.dx) if len(self.dx) > 1 else self.dx[0]
                if shared:
                    states, dx = _sum_shared(states, dx.to(rows.math_dtype(dx)), last)
                dhidden.index_copy_(0, states, dx.to(self.hidden_dtype))
            dhidden = dhidden[:last].view(hidden.shape)
        if self.needs_weight:
            dweight = self.dweight
            if dweight is None:
                dweight = memory.zeros(self.weight.shape, self.weight_dtype, self.weight.device)
            dweight = dweight.to(self.weight_dtype)
        if self.needs_bias and self.bias is not None:
            dtype = gradient_dtype(self.bias)
            zeros = self.bias.new_zeros(self.bias.shape, dtype=dtype)
            dbias = zeros if self.dbias is None else self.dbias.to(dtype)
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
