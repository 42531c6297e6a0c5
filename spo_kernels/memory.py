"""Large CPU buffers on huge pages, reused from call to call.

PyTorch maps every large CPU tensor anew in 4 KiB pages. The first write to those pages takes
several times as long as a kernel of this package. numpy asks for huge pages, and its zeros are
pages that the operating system clears at the first write. Even so, a new buffer costs as much as
the kernel that fills it. So buffers whose tensors are gone are reused, as PyTorch does on a GPU.

A free buffer is given back when, since it was last used, `PATIENCE` times a size came for which
there was none. So a step that takes a few sizes in turn keeps a buffer for each.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line and the widest vector
SMALLEST = 1 << 20  # bytes; smaller buffers come from the heap, which reuses them itself
PATIENCE = 4  # more sizes than a step takes in turn

_lock = threading.Lock()
_buffers: list[np.ndarray] = []  # in use, or free to be reused
_missed: list[int] = []  # of each: sizes since its last use for which there was none
_probe = [np.empty(0)]
_FREE = sys.getrefcount(_probe[0])  # the count of a buffer that only a list refers to


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`; on the CPU, pages that are never written cost nothing."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return _tensor(np.zeros(_bytes(shape, dtype) + ALIGNMENT, np.uint8), shape, dtype)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`; on the CPU, a free buffer is reused if there is one."""
    size = _bytes(shape, dtype) + ALIGNMENT
    if device.type != "cpu" or size < SMALLEST:
        return torch.empty(shape, dtype=dtype, device=device)
    with _lock:
        return _tensor(_take(size), shape, dtype)


def empty_cache() -> None:
    """Give the CPU memory that is kept for reuse back to the operating system."""
    with _lock:
        _drop_free()


def _take(size: int) -> np.ndarray:
    """The smallest free buffer of `size` to 2 * `size` bytes, else a new one."""
    best = None
    for i in range(len(_buffers)):
        if sys.getrefcount(_buffers[i]) == _FREE and size <= _buffers[i].size <= 2 * size:
            if best is None or _buffers[i].size < _buffers[best].size:
                best = i
    if best is None:
        _missed[:] = [count + 1 for count in _missed]
        _drop_free(PATIENCE)  # the sizes may have changed
        # Rounded up by up to an eighth: the next call may need a little more.
        step = 1 << max(size.bit_length() - 3, 0)
        _buffers.append(np.empty(-(-size // step) * step, np.uint8))
        _missed.append(0)
        best = -1
    _missed[best] = 0
    return _buffers[best]


def _drop_free(missed: int = 0) -> None:
    for i in reversed(range(len(_buffers))):
        if sys.getrefcount(_buffers[i]) == _FREE and _missed[i] >= missed:
            del _buffers[i], _missed[i]


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _tensor(buffer: np.ndarray, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor at the start of the buffer, which it keeps alive."""
    start = -buffer.ctypes.data % ALIGNMENT
    return torch.from_numpy(buffer[start : start + _bytes(shape, dtype)]).view(dtype).view(shape)
