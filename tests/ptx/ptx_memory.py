"""Memory of the PTX interpreter: bytes of which each may be read, written, or neither."""

from __future__ import annotations

import numpy as np
from ptx_program import PtxError

ABSENT, UNWRITTEN, WRITTEN = 0, 1, 3


class Memory:
    """One address space. Every access is checked: where it lies, its alignment, what it reads."""

    def __init__(self, name: str, size: int):
        self.name = name
        self.bytes = np.zeros(-(-size // 16) * 16, np.uint8)
        self.state = np.full_like(self.bytes, ABSENT)

    def allow(self, begin: int, size: int) -> None:
        self.state[begin : begin + size] = UNWRITTEN

    def put(self, begin: int, data: np.ndarray) -> None:
        """Writes bytes to where a program may read them."""
        self.bytes[begin : begin + data.size] = data
        self.state[begin : begin + data.size] = WRITTEN

    def place(self, addresses: np.ndarray, width: int, reads: bool) -> np.ndarray:
        """The indices of numbers of `width` bytes. Raises PtxError for a bad address."""
        if addresses.size == 0:
            return addresses
        lowest, highest = int(addresses.min()), int(addresses.max())
        if lowest < 0 or highest + width > self.bytes.size:
            bad = lowest if lowest < 0 else highest
            raise PtxError(f"address {bad} lies outside of {self.name} memory")
        index = addresses // width
        if (index * width != addresses).any():
            bad = addresses[index * width != addresses][0]
            raise PtxError(f"address {bad} of {self.name} memory is not aligned to {width} bytes")
        wanted = WRITTEN if reads else UNWRITTEN
        pattern = int.from_bytes(bytes([wanted]) * width, "little")
        kind = np.dtype(f"u{width}").type
        good = self.state.view(kind)[index] & kind(pattern) == pattern
        if not good.all():
            self._refuse(int(addresses[~good][0]), width)
        return index

    def _refuse(self, address: int, width: int) -> None:
        if (self.state[address : address + width] == ABSENT).any():
            raise PtxError(f"address {address} lies in no buffer of {self.name} memory")
        raise PtxError(f"nothing has written what is read at address {address} of {self.name}")

    def load(self, addresses: np.ndarray, kind: np.dtype) -> np.ndarray:
        return self.bytes.view(kind)[self.place(addresses, kind.itemsize, True)]

    def store(self, addresses: np.ndarray, values: np.ndarray) -> None:
        kind = values.dtype
        index = self.place(addresses, kind.itemsize, False)
        self.bytes.view(kind)[index] = values
        self.state.view(f"u{kind.itemsize}")[index] = int.from_bytes(
            bytes([WRITTEN]) * kind.itemsize, "little"
        )


class Global(Memory):
    """Buffers at multiples of 256, with room between them that belongs to none."""

    FIRST = 4096  # so that small numbers are no addresses

    def __init__(self, size: int):
        super().__init__("global", size)
        self.end = self.FIRST

    def allocate(self, size: int) -> int:
        begin, self.end = self.end, self.end + -(-(size + 256) // 256) * 256
        if self.end > self.bytes.size:
            raise MemoryError(f"{self.end} bytes of {self.bytes.size}")
        self.allow(begin, size)
        return begin
