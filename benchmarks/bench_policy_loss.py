"""The masked policy loss, forward and backward, from logits and from hidden states.

    python benchmarks/bench_policy_loss.py [--json FILE]
    pytest benchmarks/bench_policy_loss.py --benchmark-only

Rivals: PyTorch eager as trainers write it (all rows, log_softmax over the whole vocabulary), and
the fair rival, the same with the dropped rows removed first. Byte model from logits: one read and
one write of the logits. From hidden states: the logits of the kept rows, read and written once.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import Row, measure, print_table, write_json
from torch import Tensor

from spo_kernels import linear_masked_ppo_loss, masked_ppo_loss

RHO = 0.9
EAGER, COMPACT, OURS = "PyTorch eager", "PyTorch eager, kept rows only", "spo_kernels"


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
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{kind}, N {self.rows}, V {self.vocab}, {dtype}, {self.kept:.0%} kept"

    @property
    def bytes(self) -> float:
        rows = self.rows * (self.kept if self.width else 1)
        return 2 * rows * self.vocab * self.dtype.itemsize


CASES = [
    *(Case(256, 151936, 0, kept, d) for d in (torch.float32, torch.bfloat16) for kept in (1, 0.1)),
    *(Case(1024, v, d, 0.1, torch.float32) for v, d in ((32000, 512), (32000, 1024))),
    Case(512, 151936, 512, 0.1, torch.float32),
]


def eager_loss(logits: Tensor, ids: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """The loss of a trainer that makes all logits and masks afterwards."""
    logprobs = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, None])[:, 0]
    ratio = torch.exp(logprobs - old)
    mask = (old < math.log(RHO)).float()
    term = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -(term * mask).sum() / mask.sum()


def make(case: Case) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Calls that return (loss, gradients …) of every implementation on the same data."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    ids = torch.randint(0, case.vocab, (case.rows,), generator=generator)
    advantages = normal(case.rows)
    chosen = torch.randperm(case.rows, generator=generator) < round(case.rows * case.kept)
    if case.width:
        hidden = normal(case.rows, case.width).to(case.dtype).requires_grad_()
        weight = (normal(case.vocab, case.width) / case.width**0.5).to(case.dtype)
        inputs = (hidden, weight.requires_grad_())
    else:
        inputs = ((3 * normal(case.rows, case.vocab)).to(case.dtype).requires_grad_(),)
    with torch.no_grad():
        logits = inputs[0] @ inputs[1].T if case.width else inputs[0]
        now = torch.log_softmax(logits.float(), -1).gather(-1, ids[:, None])[:, 0]
        del logits
    old = torch.where(chosen, now + 0.1 * normal(case.rows), torch.tensor(-0.01))

    def eager() -> Tensor:
        logits = inputs[0] @ inputs[1].T if case.width else inputs[0]
        return eager_loss(logits, ids, old, advantages)

    def compact() -> Tensor:
        kept = (old < math.log(RHO)).nonzero()[:, 0]
        rows = inputs[0][kept]
        logits = rows @ inputs[1].T if case.width else rows
        return eager_loss(logits, ids[kept], old[kept], advantages[kept])

    def ours() -> Tensor:
        op = linear_masked_ppo_loss if case.width else masked_ppo_loss
        return op(*inputs, ids, old, advantages).loss

    def step(forward: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        loss = forward()
        return (loss.detach(), *torch.autograd.grad(loss, inputs))

    return {
        n: functools.partial(step, f) for n, f in ((EAGER, eager), (COMPACT, compact), (OURS, ours))
    }


def check(calls: dict[str, Callable[[], tuple[Tensor, ...]]]) -> None:
    """All implementations must agree before any is timed."""
    expected = calls[EAGER]()
    for name in (COMPACT, OURS):
        for found, wanted in zip(calls[name](), expected, strict=True):
            scale = wanted.float().abs().max()
            worst = (found.float() - wanted.float()).abs().max()
            if (
                not worst <= 2e-2 * scale
                if wanted.dtype == torch.bfloat16
                else worst > 1e-3 * scale
            ):
                raise AssertionError(f"{name} differs from {EAGER} by {worst:.3g} of {scale:.3g}")


def run(case: Case, seconds: float) -> list[Row]:
    calls = make(case)
    check(calls)
    timings = measure(calls, seconds=seconds)
    base = timings[EAGER].ms
    return [
        Row(
            "policy_loss",
            case.name,
            name,
            t.ms,
            t.p20,
            t.p80,
            case.bytes / t.ms / 1e6,
            base / t.ms,
        )
        for name, t in timings.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", help="write the rows there")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each implementation")
    arguments = parser.parse_args()
    rows = [row for case in CASES for row in run(case, arguments.seconds)]
    print_table("masked policy loss, forward + backward", rows)
    if arguments.json:
        write_json(arguments.json, rows)


def pytest_generate_tests(metafunc) -> None:
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES, ids=lambda c: c.name)
        metafunc.parametrize("name", [EAGER, COMPACT, OURS])


def test_policy_loss(benchmark, case: Case, name: str) -> None:
    benchmark.group = case.name
    calls = make(case)
    check(calls)
    benchmark(calls[name])


if __name__ == "__main__":
    main()
