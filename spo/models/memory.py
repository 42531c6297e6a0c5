"""How much memory a device has left, and zeros that take it when they are written."""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spo_kernels import memory

ALIGNMENT = 64  # bytes, as PyTorch allocates on the CPU: elsewhere products may round otherwise
CONTAINER = Path("/sys/fs/cgroup")  # of a container with a limit


def free_bytes(device: torch.device) -> int:
    """Bytes that this process can still allocate on `device`; on the CPU its share of a host's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        pool = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + pool
    return _free_on_host() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _free_on_host() -> int:
    try:  # unlike free pages, it counts what the system caches of files
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = int((CONTAINER / "memory.max").read_text())
        used = int((CONTAINER / "memory.current").read_text())
        stat = dict(line.split() for line in (CONTAINER / "memory.stat").read_text().splitlines())
        return min(free, limit - used + int(stat["file"]))
    except (OSError, KeyError, ValueError):  # no container, or no limit
        return free


def zeros(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`; on the CPU a page takes memory when it is first written."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    count = math.prod(size) * dtype.itemsize
    pages = np.zeros(count + ALIGNMENT, dtype=np.uint8)
    start = -pages.ctypes.data % ALIGNMENT
    return torch.from_numpy(pages[start : start + count]).view(dtype).view(size)


def release_caches() -> None:
    """Give memory that this process keeps for its next tensors back to its devices."""
    memory.empty_cache()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def gigabytes(count: int) -> str:
    return f"{count / 1e9:.3g} GB"
