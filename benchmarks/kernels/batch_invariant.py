"""What `batch_invariant=True` costs: the time with it over the time without it.

    python -m benchmarks.kernels.batch_invariant [--device cuda] [--seconds 1] [--quick]

One line per shape: the loss with its gradients, and the logprobs without gradients. Both ways are
timed in turn in one run; before that, their results are compared.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.common import measure
from benchmarks.provenance import commit, device_name
from spo_kernels import linear_masked_ppo_loss, linear_token_logprobs
from spo_kernels.testing import loss_inputs

DTYPES = (torch.float32, torch.bfloat16)
KEPT = (1, 24, 100, 1024)  # rows that reach the head
SHAPES = tuple(itertools.product((512, 1024, 2048), (32000, 151936)))
QUICK = ((512, 32000),)


def ways(
    rows: int, width: int, vocab: int, dtype: torch.dtype, device: str
) -> dict[str, Callable[[], torch.Tensor]]:
    """The four calls of a shape, by name."""
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(rows, width, generator=g, device=device).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=g, device=device)
    weight = (weight / width**0.5).to(dtype).requires_grad_()
    t = loss_inputs(rows, 64, kept=1.0, device=device)

    def loss(invariant: bool) -> torch.Tensor:
        hidden.grad = weight.grad = None
        tokens = (t.token_ids, t.old_logprobs.clamp(max=-0.2), t.advantages)
        record = linear_masked_ppo_loss(hidden, weight, *tokens, batch_invariant=invariant)
        record.loss.backward()
        assert hidden.grad is not None
        return hidden.grad

    def logprobs(invariant: bool) -> torch.Tensor:
        with torch.no_grad():
            return linear_token_logprobs(hidden, weight, t.token_ids, batch_invariant=invariant)

    return {
        "loss": partial(loss, False),
        "loss invariant": partial(loss, True),
        "logprobs": partial(logprobs, False),
        "logprobs invariant": partial(logprobs, True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    print({"device": device_name(args.device), "torch": torch.__version__, "commit": commit()})
    for (width, vocab), dtype, rows in itertools.product(
        QUICK if args.quick else SHAPES, DTYPES, KEPT
    ):
        calls = ways(rows, width, vocab, dtype, args.device)
        for name in ("loss", "logprobs"):
            plain, fixed = calls[name]().clone(), calls[f"{name} invariant"]()
            off = float((plain.float() - fixed.float()).abs().max() / plain.float().abs().max())
            assert off < (1e-4 if dtype == torch.float32 else 2e-2), f"{name}: {off:.1e} off"
        timings = measure({**calls}, seconds=args.seconds, device=args.device)
        line = f"{str(dtype).removeprefix('torch.'):8} D {width:4} V {vocab:6} rows {rows:4}"
        for name in ("loss", "logprobs"):
            plain_ms, fixed_ms = timings[name].ms, timings[f"{name} invariant"].ms
            line += f"   {name} {plain_ms:7.1f} -> {fixed_ms:7.1f} ms, {fixed_ms / plain_ms:.2f}x"
        print(line, flush=True)


if __name__ == "__main__":
    main()
