"""Large CPU buffers on huge pages.

PyTorch maps a large CPU tensor afresh in 4 KiB pages, and touching those pages for the first time
costs several times what the kernels of this package cost. numpy asks for huge pages, and its
zeros are pages that the operating system clears when they are touched, if ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line and the widest vector


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`; on the CPU, what is never written costs nothing."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return _on_cpu(np.zeros, shape, dtype)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return _on_cpu(np.empty, shape, dtype)


def _on_cpu(
    allocate: Callable[..., np.ndarray], shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    size = math.prod(shape) * dtype.itemsize
    buffer = allocate(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return torch.from_numpy(buffer[start : start + size]).view(dtype).view(tuple(shape))
