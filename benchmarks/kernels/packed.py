"""Packed sequences: the cases of the ops that run over them, and the padding that rivals need."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """T tokens in sequences of `length` tokens on average, from 1 to twice that."""

    tokens: int
    length: int

    @property
    def name(self) -> str:
        return f"{self.tokens:,} tokens, sequences of about {self.length}"

    @property
    def axes(self) -> dict[str, int]:
        return {"tokens": self.tokens, "length": self.length}


def cases(device: str, quick: bool) -> list[Case]:
    return [Case(2000, 40)] if quick else [Case(1_000_000, 1000), Case(1_000_000, 100)]


@dataclass(frozen=True)
class Pack:
    """Where the sequences of a case lie, packed and padded."""

    cu_seqlens: Tensor  # (B+1,) int64
    inside: Tensor  # (B, L) bool, the tokens among the padding

    def pad(self, packed: Tensor) -> Tensor:  # (T,) -> (B, L)
        return packed.new_zeros(self.inside.shape).masked_scatter_(self.inside, packed)


@functools.cache
def pack_of(case: Case, device: str) -> Pack:
    generator = torch.Generator().manual_seed(0)
    many = torch.randint(1, 2 * case.length, (2 * case.tokens // case.length,), generator=generator)
    ends = many.cumsum(0).clamp(max=case.tokens)
    ends = ends[: int((ends < case.tokens).sum()) + 1]
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).to(device)
    lengths = cu_seqlens.diff()
    inside = torch.arange(int(lengths.max()), device=device) < lengths[:, None]
    return Pack(cu_seqlens, inside)


def random(case: Case, device: str, count: int) -> list[Tensor]:
    """`count` tensors (T,) of normal numbers."""
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(case.tokens, generator=generator, device=device) for _ in range(count)]
