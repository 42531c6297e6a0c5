"""Every kernel once, on the shapes whose addresses are hardest: what compute-sanitizer runs.

    compute-sanitizer --error-exitcode 1 python -m benchmarks.sanitize --device cuda

Rows of 151936 and more logits are held by clusters of 4 to 16 blocks; an odd vocabulary starts rows
at every alignment. Results are compared with the reference, so a race that the tool misses may
still show. Set PYTORCH_NO_CUDA_MEMORY_CACHING=1: inside PyTorch's own blocks an overrun is silent.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

import spo_kernels
from spo_kernels.testing import loss_inputs

ROWS = 6
SIZES = (1, 31, 1031, 151936, 151937, 262144)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def check(name: str, found: Sequence[Tensor], wanted: Sequence[Tensor], dtype: torch.dtype) -> None:
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        scale = other.abs().max().item() if other.numel() else 0.0
        off = (one.double() - other.double()).abs().max().item() if other.numel() else 0.0
        if not off <= TOLERANCE[dtype] * max(scale, 1e-3):
            raise AssertionError(f"{name}, result {i}: off by {off:.3g} of {scale:.3g}")


def loss_step(vocab: int, dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    data = loss_inputs(ROWS, vocab, dtype, device=device)
    logits = data.logits.requires_grad_()
    out = spo_kernels.masked_ppo_loss(
        logits, data.token_ids, data.old_logprobs, data.advantages, loss_mask=data.loss_mask,
        ref_logprobs=data.ref_logprobs, kl_coef=0.1, entropy=True, backend=backend,
    )  # fmt: skip
    out.loss.backward()
    return [out.loss.detach(), *_of_rows(out.logprobs), *_of_rows(out.entropy), logits.grad]


def option_step(vocab: int, dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    """What takes other kernels: on-policy with a late norm, an entropy bonus, a soft cap."""
    data = loss_inputs(ROWS, vocab, dtype, device=device)
    logits = data.logits.requires_grad_()
    out = spo_kernels.masked_ppo_loss(
        logits, data.token_ids, None, data.advantages, loss_mask=data.loss_mask,
        ref_logprobs=data.ref_logprobs, kl_coef=0.1, kl_ratio=True, entropy_coef=0.1,
        weights=data.advantages.abs(), logit_softcap=5.0, backend=backend,
    )  # fmt: skip
    out.loss.backward()
    return [out.loss.detach(), *_of_rows(out.logprobs), logits.grad]


def _of_rows(values: Tensor | None) -> tuple[Tensor, ...]:
    """Which rows were computed, and their values."""
    assert values is not None
    return values.isfinite().float(), values.nan_to_num()


def logprob_step(
    vocab: int, dtype: torch.dtype, device: str, backend: str, softcap: float | None = None
) -> list[Tensor]:
    data = loss_inputs(ROWS, vocab, dtype, device=device)
    logits = data.logits.requires_grad_()
    logprobs, entropy = spo_kernels.token_logprobs(
        logits, data.token_ids, entropy=True, logit_softcap=softcap, backend=backend
    )
    (logprobs * data.advantages + entropy).sum().backward()
    return [logprobs.detach(), entropy.detach(), logits.grad]


def capped_step(vocab: int, dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    return logprob_step(vocab, dtype, device, backend, softcap=5.0)


def head_step(vocab: int, dtype: torch.dtype, device: str, backend: str) -> list[Tensor]:
    data = loss_inputs(ROWS, vocab, dtype, device=device)
    generator = torch.Generator(device).manual_seed(1)
    hidden, weight = (
        torch.randn(n, 64, generator=generator, device=device).mul(0.2).to(dtype).requires_grad_()
        for n in (ROWS, vocab)
    )
    out = spo_kernels.linear_masked_ppo_loss(
        hidden, weight, data.token_ids, data.old_logprobs, data.advantages, backend=backend,
        memory_budget=4 * vocab * (ROWS // 2),
    )  # fmt: skip
    out.loss.backward()
    return [out.loss.detach(), hidden.grad, weight.grad]


def packed_steps(device: str, backend: str) -> list[Tensor]:
    """Trees, segments and their advantages, of 3000 nodes and 3000 tokens."""
    size = 3000
    generator = torch.Generator().manual_seed(0)
    parent = ((torch.arange(size) - 1) // 3).int()
    inner = torch.zeros(size, dtype=torch.bool)
    inner[parent[1:].long()] = True
    rewards = torch.rand(size, generator=generator).masked_fill(inner, torch.nan)
    logprobs = -torch.rand(size, generator=generator)
    cu_seqlens = torch.tensor([0, 0, 1, 1030, size])
    counted = torch.ones(size, dtype=torch.bool)
    nodes = [x.to(device) for x in (parent, rewards, counted)]
    values = spo_kernels.tree_values(*nodes, backend=backend)
    nodes[1] = values
    options = {"baseline": "loo", "scale": "std", "backend": backend}
    advantages = spo_kernels.tree_advantages(*nodes, **options)
    cu_segments, cu_seq_segments = spo_kernels.cutpoint_segments(
        logprobs.to(device), cu_seqlens.to(device), 0.7, backend=backend
    )
    boundaries = cu_segments.numel() + cu_seq_segments.numel() - 2
    on_tokens = spo_kernels.segment_advantages(
        values[:boundaries], cu_segments, cu_seq_segments, size, backend=backend
    )
    return [values, advantages, cu_segments, cu_seq_segments, on_tokens]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="of the vocabulary")
    parser.add_argument("--no-head", action="store_true", help="racecheck fails within cuBLAS")
    arguments = parser.parse_args(argv)
    fast = {"device": arguments.device, "backend": arguments.device}
    slow = fast | {"backend": "reference"}
    steps = [loss_step, option_step, logprob_step, capped_step]
    steps += [] if arguments.no_head else [head_step]
    for vocab, dtype, step in itertools.product(arguments.sizes, DTYPES, steps):
        name = f"{step.__name__}, V {vocab}, {dtype}"
        check(name, step(vocab, dtype, **fast), step(vocab, dtype, **slow), dtype)
        print(f"{name}: as the reference", flush=True)
    check("packed", packed_steps(**fast), packed_steps(**slow), torch.float32)
    print("trees and segments: as the reference", flush=True)


if __name__ == "__main__":
    main()
