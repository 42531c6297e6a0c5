"""Cases, data, floors and checks of the two ops that end at the vocabulary.

Byte model from logits: kept rows are read once (by logprobs twice: forward and backward), and the
gradient of all rows is written once. Work from hidden states: three products of the kept rows,
6 n D V. Floors, measured in the same run: a copy of as many bytes as the model's, and `torch.mm`
three times at exactly those shapes and dtypes into buffers that exist.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.common import Call, Row, Shape, compare, copy_of
from benchmarks.kernels.rivals import (
    COMPILED,
    EAGER,
    RHO,
    RIVALS,
    Problem,
    Rival,
    eager_logprobs,
    weighted_sum,
)
from spo_kernels.dispatch import unavailable

KEPT_ONLY = ", kept rows only"
OURS = "spo_kernels"
Loss = Callable[[Tensor, Problem], Tensor]  # logprobs (N,) -> a number
# What spo_kernels and the rivals may be off by, as a part of the largest magnitude.
BOUND = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
RIVAL_BOUND = 0.1


@dataclass(frozen=True)
class Case:
    """N rows, V vocabulary, D hidden (0: logits in), the share of rows that the mask keeps."""

    rows: int
    vocab: int
    width: int
    kept: float
    dtype: torch.dtype

    @property
    def name(self) -> str:
        kind = f"head D {self.width}" if self.width else "logits"
        return f"{kind}, N {self.rows}, V {self.vocab}, {self.dtype_name}, {self.kept:.0%} kept"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def num_kept(self) -> int:
        return round(self.rows * self.kept)

    def shape(self, op: str) -> Shape:
        axes = {"rows": self.rows, "vocab": self.vocab, "width": self.width, "kept": self.kept}
        axes["dtype"] = self.dtype_name
        if self.width:
            flop = 6 * self.num_kept * self.width * self.vocab
            return Shape(f"linear_{op}", self.name, axes, flop=flop)
        reads = 2 if op == "logprobs" else 1  # its backward cannot know its gradient before
        size = (reads * self.num_kept + self.rows) * self.vocab * self.dtype.itemsize
        return Shape(op, self.name, axes, bytes=size)


SHARES = (1.0, 0.2, 0.1, 0.05)


def cases(device: str, quick: bool) -> list[Case]:
    """The most telling shapes first, so that a run which is out of time has them."""
    fp32, bf16 = torch.float32, torch.bfloat16
    if quick:
        return [Case(24, 1031, d, kept, t) for d in (0, 128) for kept in (1, 0.25) for t in (fp32,)]
    if device == "cuda":
        # V 131072 is the shape of RL-Kernel's published figures on an H100.
        first = [(0, 1.0), (0, 0.1), (2048, 0.1), (4096, 0.1), (2048, 1.0)]
        return [
            *(Case(8192, 151936, d, s, bf16) for d, s in first),
            Case(4096, 131072, 2048, 1.0, bf16),
            Case(8192, 151936, 0, 1.0, fp32),
            Case(8192, 151937, 2048, 0.1, bf16),
            *(Case(8192, 32000, d, 0.1, bf16) for d in (0, 2048)),
            *(Case(8192, 151936, d, s, bf16) for d in (0, 2048, 4096) for s in (0.2, 0.05)),
            *(Case(32768, 151936, d, 0.1, bf16) for d in (0, 2048)),
            Case(8192, 151936, 4096, 1.0, bf16),
        ]
    logits = [Case(256, 151936, 0, s, t) for t in (fp32, bf16) for s in SHARES]
    logits += [Case(1024, v, 0, s, fp32) for v in (32000, 50257) for s in (1, 0.1)]
    wide = [Case(512, 151936, d, s, fp32) for d in (512, 1024, 256) for s in SHARES]
    small = [Case(1024, 32000, d, s, fp32) for d in (512, 1024, 256) for s in SHARES]
    half = [Case(1024, v, d, s, bf16) for v, d in ((32000, 512), (151936, 1024)) for s in (0.1, 1)]
    return [*logits, *small, *half, *wide]


def make(case: Case, device: str) -> Problem:
    """Random inputs; `old` is near the policy on kept rows and close to 0 on the others."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype, device=device).mul_(scale)

    ids = torch.randint(0, case.vocab, (case.rows,), generator=generator, device=device)
    order = torch.randperm(case.rows, generator=generator, device=device)
    if case.width:
        hidden = normal(case.rows, case.width, dtype=case.dtype)
        weight = normal(case.vocab, case.width, dtype=case.dtype, scale=case.width**-0.5)
        inputs = (hidden.requires_grad_(), weight.requires_grad_())
    else:
        # One row more than is used: see Problem.pad.
        buffer = normal(case.rows + 1, case.vocab, dtype=case.dtype, scale=3.0)
        inputs = (buffer[:-1].requires_grad_(),)
    now = torch.empty(case.rows, device=device)
    with torch.no_grad():
        for rows in torch.arange(case.rows, device=device).split(256):
            part = Problem((inputs[0][rows], *inputs[1:]), ids[rows], now, now)
            now[rows] = eager_logprobs(part)
    old = (now + normal(case.rows, scale=0.1)).clamp(max=math.log(RHO) - 0.01)
    old = torch.where(order < case.num_kept, old, -0.01)
    return Problem(inputs, ids, old, normal(case.rows).abs() + 0.1)


def padded(problem: Problem) -> Problem:
    """The same logits with the row behind them."""
    logits = problem.inputs[0].detach()
    whole = logits.as_strided((logits.shape[0] + 1, logits.shape[1]), logits.stride())
    return replace(problem, inputs=(whole.requires_grad_(),), pad=1)


def step(forward: Callable[[Problem], Tensor], problem: Problem) -> tuple[Tensor, ...]:
    loss = forward(problem)
    return (loss.detach(), *torch.autograd.grad(loss, problem.inputs))


def oracle(problem: Problem, loss: Loss) -> tuple[Tensor, ...]:
    """Loss and gradients of the kept rows, in fp32 from the first product on."""
    rows = problem.mask.nonzero()[:, 0]
    inputs = (problem.inputs[0][rows], *problem.inputs[1:])
    wide = tuple(x.detach().float().requires_grad_() for x in inputs)
    exact = replace(problem.compact(), inputs=wide)
    return step(lambda p: loss(eager_logprobs(p), p), exact)


def error(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], mask: Tensor) -> float:
    """The largest error of the loss and the gradients, each over its largest magnitude."""
    value, rows, *others = found
    rows = rows[: len(mask)]
    if not bool((rows[~mask] == 0).all()):
        return math.inf
    pairs = zip((value, rows[mask], *others), exact, strict=True)
    return max(((f.float() - e).abs().max() / e.abs().max()).item() for f, e in pairs)


@dataclass(frozen=True)
class Candidate:
    """An implementation to try on a case."""

    name: str
    role: str  # see common.Call
    forward: Callable[[Problem], Tensor]  # -> the loss
    package: str = "torch"
    pad: int = 0


def candidates(case: Case, device: str, loss: Loss, compiled: bool) -> Iterator[Candidate]:
    """The rivals that fit the case, eager first.

    A library that does not see the mask takes as long whatever is kept: with all rows it is tried
    only where all are kept, otherwise in its fair form.
    """
    level = "head" if case.width else "logits"
    for rival in RIVALS:
        if rival.level not in ("any", level) or rival.device not in ("", device):
            continue
        if (rival is COMPILED and not compiled) or (rival.gives == "loss" and loss is weighted_sum):
            continue
        if isinstance(compute := loaded(rival), str):
            continue
        forward = compute if rival.gives == "loss" else functools.partial(_lift, loss, compute)
        dense = "fair" if case.kept == 1 else "rival"
        if case.kept == 1 or rival in (EAGER, COMPILED) or rival.sees_mask:
            role = "base" if rival is EAGER else dense
            yield Candidate(rival.name, role, forward, rival.package, rival.pad)
        if case.kept < 1:
            fair = functools.partial(_on_kept, forward)
            yield Candidate(rival.name + KEPT_ONLY, "fair", fair, rival.package, rival.pad)


def _lift(loss: Loss, compute: Callable[[Problem], Tensor], problem: Problem) -> Tensor:
    return loss(compute(problem), problem)


def _on_kept(forward: Callable[[Problem], Tensor], problem: Problem) -> Tensor:
    return forward(problem.compact())


@functools.cache
def loaded(rival: Rival) -> Callable[[Problem], Tensor] | str:
    """What the rival computes with, or why it cannot run here, which is printed once."""
    try:
        return rival.load()
    except (ImportError, AttributeError, OSError) as reason:
        print(f"{rival.name}: skipped: {reason}", flush=True)
        return str(reason)


def ours(op: str, device: str, compute: Callable[..., Tensor]) -> Iterator[Candidate]:
    """What `spo_kernels` chooses by itself, and Triton where that is not what it chooses."""
    yield Candidate(OURS, "ours", compute, "spo-kernels")
    if device == "cuda" and not unavailable(op, "cuda") and not unavailable(op, "triton"):
        triton = functools.partial(compute, backend="triton")
        yield Candidate(f"{OURS}, Triton", "ours", triton, "spo-kernels")


def floor(case: Case, shape: Shape, device: str) -> Call:
    """A copy that moves the bytes of the model, or the three products of the head."""
    if not case.width:
        return copy_of(shape.bytes, device, uncached=True)
    n, options = case.num_kept, {"dtype": case.dtype, "device": device}
    # Random: a GPU multiplies ones faster, since fewer of its transistors switch.
    x, weight = (
        torch.randn(n, case.width, **options),
        torch.randn(case.vocab, case.width, **options),
    )
    dlogits = torch.randn(n, case.vocab, **options)
    dx, dweight = torch.ones_like(x), torch.ones_like(weight)
    wide = device == "cuda" and case.dtype != torch.float32
    logits = torch.ones_like(dlogits, dtype=torch.float32) if wide else dlogits
    out = {"out_dtype": torch.float32} if wide else {}

    def products() -> None:
        torch.mm(x, weight.T, out=logits, **out)
        torch.mm(dlogits, weight, out=dx)
        torch.mm(dlogits.T, x, out=dweight)

    return Call(products, "floor")


def run(
    op: str, loss: Loss, compute: Callable[..., Tensor], case: Case, args: argparse.Namespace
) -> tuple[Shape, list[Row]]:
    """Check every implementation against fp32, then time those that agree."""
    shape = case.shape(op)
    if args.compile:
        torch._dynamo.reset()  # every case is a fresh graph of static shapes: its best case
    tried = [*candidates(case, args.device, loss, args.compile), *ours(op, args.device, compute)]
    calls = checked(case, args.device, loss, tried, args.limit)
    calls["floor: torch.mm" if case.width else "floor: copy"] = floor(case, shape, args.device)
    return shape, compare(shape, calls, seconds=args.seconds, device=args.device)


def checked(
    case: Case,
    device: str,
    loss: Loss,
    tried: Sequence[Candidate],
    limit: float = math.inf,  # seconds that a rival's first call, compilation included, may take
) -> dict[str, Call]:
    """Those whose results are right, on the same data. Raises AssertionError if ours are not."""
    problem = make(case, device)
    exact, calls = oracle(problem, loss), {}
    for candidate in tried:
        given = padded(problem) if candidate.pad else problem
        run_once = functools.partial(step, candidate.forward, given)
        start = time.perf_counter()
        try:
            off = error(run_once(), exact, problem.mask)
        except Exception as failure:  # other people's code may fail in any way: that is a result
            if candidate.role == "ours":
                raise
            print(f"{case.name}: {candidate.name}: failed: {_first_line(failure)}", flush=True)
            continue
        took = time.perf_counter() - start
        if took > limit and candidate.role not in ("base", "ours"):
            print(f"{case.name}: {candidate.name} takes {took:.0f} s: left out", flush=True)
            continue
        bound = BOUND[case.dtype] if candidate.role == "ours" else RIVAL_BOUND
        if not off <= bound:
            message = f"{case.name}: {candidate.name} is off by {off:.2g}, allowed is {bound:.2g}"
            if candidate.role == "ours":
                raise AssertionError(message)
            print(f"{message}: left out", flush=True)
            continue
        calls[candidate.name] = Call(run_once, candidate.role, candidate.package, off)
    return calls


def _first_line(failure: Exception) -> str:
    return f"{type(failure).__name__}: {str(failure).strip()}".splitlines()[0][:200]
