"""Checks of tensor arguments: each raises one sentence for bad input."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def check_vector(
    name: str,
    tensor: Tensor,
    dtypes: tuple[torch.dtype, ...],
    *,
    like: Tensor | None = None,  # `tensor` must be on its device
    size: int | None = None,
    at_least: int = 0,
) -> None:
    """TypeError or ValueError unless `tensor` is 1-D, of one of `dtypes` and of the given size."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, found {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        names = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        found = str(tensor.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected {names}, found {found}")
    if tensor.dim() != 1:
        raise ValueError(f"{name}: expected a 1-D tensor, found shape {tuple(tensor.shape)}")
    if size is not None and tensor.numel() != size:
        raise ValueError(f"{name}: expected {size} entries, found {tensor.numel()}")
    if tensor.numel() < at_least:
        raise ValueError(f"{name}: expected at least {at_least} entry, found none")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, found {tensor.device}")


def check_offsets(
    name: str,
    offsets: Tensor,  # (n+1,) int32 | int64, n >= 0
    total: int,
) -> None:
    """ValueError unless `offsets` starts at 0, never decreases and ends at `total`."""
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != total:
        raise ValueError(f"{name}: expected offsets from 0 to {total}, found {first} to {last}")
    falls = (offsets.diff() < 0).nonzero()
    if falls.numel():
        i = int(falls[0])
        pair = f"{int(offsets[i])} then {int(offsets[i + 1])}"
        raise ValueError(f"{name}: expected no decrease, found {pair} at {i}")
