"""What the machine can do: copies, and the three products of a vocabulary head.

    python -m benchmarks.kernels.ceilings [--device cuda] [--quick] [--json FILE] [--csv FILE]

Products take bf16 operands on a GPU and fp32 elsewhere; logits come out in fp32. "strided" cuts the
operand out of a wider matrix, as a chunk of a larger buffer would be.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks import common
from benchmarks.common import Call, Row, Shape, compare, copy_of

ROWS = (400, 800, 1600, 3300, 8192, 33000)


@dataclass(frozen=True)
class Copy:
    """A copy that reads and writes `size` bytes in all."""

    size: int

    @property
    def name(self) -> str:
        return f"copy, {self.size / 1e6:g} MB read and written"


@dataclass(frozen=True)
class Head:
    """n rows, D hidden, V vocabulary."""

    rows: int
    width: int
    vocab: int

    @property
    def name(self) -> str:
        return f"head, n {self.rows}, D {self.width}, V {self.vocab}"


def cases(device: str, quick: bool) -> list[Copy | Head]:
    if quick:
        return [Copy(10**6), Head(8, 32, 1000)]
    if device == "cpu":
        heads = [
            Head(n, d, v) for v in (32000, 151936) for d in (256, 512, 1024) for n in (51, 102)
        ]
        return [Copy(10**8), Copy(10**9), *heads]
    heads = [Head(n, d, v) for v in (151936, 32000) for d in (2048, 4096, 1536) for n in ROWS]
    return [Copy(10**9), Copy(10**10), *heads]


def products(case: Head, device: str) -> dict[str, Call]:
    """Every product into a buffer that exists, of random numbers: a GPU multiplies ones faster."""
    options = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    n, d, v = case.rows, case.width, case.vocab
    x, weight = torch.randn(n, d, **options), torch.randn(v, d, **options)
    wider = torch.randn(n, v + 64, **options)
    dlogits, strided = torch.randn(n, v, **options), wider[:, :v]
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)
    logits = torch.empty(n, v, device=device)
    wide = {"out_dtype": torch.float32} if device == "cuda" else {}
    ways: dict[str, Callable[[], object]] = {
        "logits": lambda: torch.mm(x, weight.T, out=logits, **wide),
        "dhidden": lambda: torch.mm(dlogits, weight, out=dx),
        "dhidden, strided": lambda: torch.mm(strided, weight, out=dx),
        "dweight": lambda: torch.mm(dlogits.T, x, out=dweight),
        "dweight, strided": lambda: torch.mm(strided.T, x, out=dweight),
    }
    if device == "cuda":
        low = torch.empty_like(dlogits)
        ways["logits, bf16 output"] = lambda: torch.mm(x, weight.T, out=low)
    return {name: Call(way, "floor") for name, way in ways.items()}


def run(case: Copy | Head, args: argparse.Namespace) -> tuple[Shape, list[Row]]:
    if isinstance(case, Copy):
        shape = Shape("ceiling", case.name, {}, bytes=case.size)
        calls = {"copy": copy_of(case.size, args.device)}
    else:
        axes = {"rows": case.rows, "width": case.width, "vocab": case.vocab}
        shape = Shape("ceiling", case.name, axes, flop=2 * case.rows * case.width * case.vocab)
        calls = products(case, args.device)
    return shape, compare(shape, calls, seconds=args.seconds, device=args.device)


def main(argv: Sequence[str] | None = None) -> None:
    common.main(__doc__, cases, run, argv)


if __name__ == "__main__":
    main()
