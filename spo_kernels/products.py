"""The three matrix products of a vocabulary head on a GPU.

Half-precision operands give fp32 logits and fp32 sums of gradients. cuBLAS moves 16 bytes at a time
only where every dimension is a multiple of 8 elements and every row starts on such a boundary; one
odd vocabulary makes the products six times slower (an H100, V 151937). So buffers have rows of a
multiple of 64 elements, and the last V % 8 columns are products of their own.

cuBLAS chooses the order of a sum by the shape of the product. `fixed` products have always
FIXED_ROWS rows, the last of them zeros: then a row has the same bits whatever stands beside it.
Reading the weight takes as long as the arithmetic of about so many rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

# addmm of half-precision operands onto an fp32 sum: https://github.com/pytorch/pytorch/pull/167931
ADDS_WIDE = TorchVersion(torch.__version__) >= "2.10"
HALVES = (torch.bfloat16, torch.float16)
FIXED_ROWS = 256


def on_gpu(x: Tensor) -> bool:
    """Whether the products of x run here; the CPU has its own in head.py."""
    return x.is_cuda


def common_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of both operands: fp32 beside bf16 or fp16 becomes that, as under autocast.

    fp32 products take ten times as long. bf16 beside fp16 has only fp32 in common.
    """
    low = {hidden.dtype, weight.dtype} - {torch.float32}
    return low.pop() if len(low) == 1 else torch.float32


def result_dtype(operand: Tensor, wanted: torch.dtype) -> torch.dtype:
    """What a product gives at once: the operands' dtype if that is wanted, else fp32."""
    return wanted if wanted == operand.dtype else torch.float32


def columns(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised matrix (rows, vocab) whose rows start at multiples of 128 bytes or more."""
    padded = -(-vocab // 64) * 64
    return torch.empty((rows, padded), dtype=dtype, device=device)[:, :vocab]


def logits(x: Tensor, weight: Tensor, dtype: torch.dtype, fixed: bool = False) -> Tensor:
    """x (n, D) times weight (V, D) transposed, both of one dtype: (n, V) of `dtype`."""
    count, vocab = x.shape[0], weight.shape[0]
    pieces = _pieces(count, fixed)
    out = columns(pieces[-1].stop, vocab, result_dtype(x, dtype), x.device)
    for piece in pieces:
        for part in _parts(weight):
            _multiply(_filled(x[piece], piece), weight[part].t(), out[piece, part])
    out = out[:count]
    return out if out.dtype == dtype else columns(count, vocab, dtype, x.device).copy_(out)


def states_gradient(
    dlogits: Tensor, weight: Tensor, dtype: torch.dtype, fixed: bool = False
) -> Tensor:
    """dlogits (n, V) times weight (V, D): (n, D) of `dtype`, rounded once."""
    parts, pieces = _parts(weight), _pieces(dlogits.shape[0], fixed)
    wide = torch.float32 if len(parts) > 1 else result_dtype(dlogits, dtype)
    shape = (pieces[-1].stop, weight.shape[1])
    out = torch.empty(shape, dtype=wide, device=dlogits.device)
    for piece in pieces:
        rows = _filled(dlogits[piece], piece)
        _multiply(rows[:, parts[0]], weight[parts[0]], out[piece])
        for part in parts[1:]:
            _add(rows[:, part], weight[part], out[piece])
    return out[: dlogits.shape[0]].to(dtype)


def weight_gradient(
    dlogits: Tensor,  # (n, V)
    x: Tensor,  # (n, D)
    total: Tensor,  # (V, D), of the operands' dtype or fp32
    first: bool,
) -> None:
    """total += dlogits transposed times x, or = if `first`."""
    for part in _parts(total, dlogits):
        (_multiply if first else _add)(dlogits[:, part].t(), x, total[part])


def _pieces(rows: int, fixed: bool) -> list[slice]:
    """The rows of a product in one piece, or in pieces of FIXED_ROWS, of which the last may lack
    some."""
    if not fixed:
        return [slice(0, rows)]
    starts = range(0, max(rows, 1), FIXED_ROWS)
    return [slice(start, start + FIXED_ROWS) for start in starts]


def _filled(rows: Tensor, piece: slice) -> Tensor:
    """The rows of a piece, with zeros for those that it lacks; laid out as a whole piece is."""
    missing = piece.stop - piece.start - rows.shape[0]
    if missing == 0:
        return rows
    filled = rows.new_empty_strided((piece.stop - piece.start, rows.shape[1]), rows.stride())
    filled[: rows.shape[0]] = rows
    filled[rows.shape[0] :] = 0
    return filled


def _parts(weight: Tensor, operand: Tensor | None = None) -> list[slice]:
    """The vocabulary in one piece, or in an aligned one and the rest."""
    vocab, half = weight.shape[0], (weight if operand is None else operand).dtype in HALVES
    aligned = vocab - vocab % 8 if half else vocab
    return [slice(0, aligned), slice(aligned, vocab)] if 0 < aligned < vocab else [slice(0, vocab)]


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    wide: dict[str, Any] = {} if out.dtype == a.dtype else {"out_dtype": out.dtype}
    torch.mm(a, b, out=out, **wide)


def _add(a: Tensor, b: Tensor, out: Tensor) -> None:
    if out.dtype == a.dtype:
        out.addmm_(a, b)
    elif ADDS_WIDE:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        out.add_(torch.mm(a, b, out_dtype=out.dtype))
