"""The error rule and the input makers that tests and benchmarks share."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

# The backend that the kernel tests compare with the reference, and the device of its tensors.
FAST = os.environ.get("SPO_TEST_BACKEND", "cpu")
_ON_CPU = FAST == "cpu" or os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if _ON_CPU else "cuda")

# An error up to this share of the oracle's largest magnitude is always allowed.
SLACK = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float64: 1e-12}


def assert_as_good_as_torch(
    name: str,
    found: Tensor,  # from a kernel
    torch_result: Tensor,  # the same from PyTorch on the same inputs
    oracle: Tensor,  # the same from the reference on fp64 copies of the inputs
    scale: float = 0.0,  # magnitude of what was summed, where the sum itself may cancel
) -> None:
    """max error(found) <= 2 max error(torch_result) + a small bound; NaN at the same indices."""
    assert found.shape == oracle.shape, f"{name}: expected {oracle.shape}, found {found.shape}"
    if found.numel() == 0:
        return
    error = (found.double() - oracle).abs()
    nan = oracle.isnan()
    assert torch.equal(found.isnan(), nan), f"{name}: NaN at other indices than in the oracle"
    error = error.masked_fill(nan, 0).masked_fill(found == oracle, 0)  # equal infinities
    own = (torch_result.double() - oracle).abs()
    own = own.masked_fill(nan, 0).masked_fill(torch_result == oracle, 0).max().item()
    finite = oracle[oracle.isfinite()].abs()
    scale = max(scale, finite.max().item()) if finite.numel() else scale
    bound = 2 * own + SLACK[found.dtype] * scale
    worst = int(error.argmax())
    assert error.max().item() <= bound, (
        f"{name}: error {error.max().item():.3g} > {bound:.3g} (2 x PyTorch's {own:.3g} + "
        f"{bound - 2 * own:.3g}); worst element {worst}: found "
        f"{found.reshape(-1)[worst].item():.9g}, oracle {oracle.reshape(-1)[worst].item():.9g}"
    )


@dataclass(frozen=True)
class LossInputs:
    """Arguments of `masked_ppo_loss` with N rows; all on one device."""

    logits: Tensor  # (N, V)
    token_ids: Tensor  # (N,) int64
    old_logprobs: Tensor  # (N,) fp32
    advantages: Tensor  # (N,) fp32
    loss_mask: Tensor  # (N,) bool
    ref_logprobs: Tensor  # (N,) fp32


def loss_inputs(
    rows: int,
    vocab: int,
    dtype: torch.dtype = torch.float32,
    *,
    kept: float = 0.5,  # expected share of tokens that the probability mask keeps
    seed: int = 0,
    temperature: float = 1.0,  # what old and reference logprobs are near to
    spread: float = 2.0,  # standard deviation of the logits
    device: torch.device | str = DEVICE,
) -> LossInputs:
    """Random arguments in which ratios fall inside, below and above the clip range.

    Small ones are the same on every device.
    """
    source = "cpu" if rows * vocab < 1 << 22 else device
    where = {"generator": torch.Generator(source).manual_seed(seed), "device": source}
    logits = (torch.randn(rows, vocab, **where) * spread).to(dtype)
    ids = torch.randint(vocab, (rows,), **where)
    z = (logits.double() / temperature).log_softmax(-1) if rows else logits.double()
    logprobs = z.gather(1, ids[:, None]).squeeze(1).float()
    old = logprobs + 0.3 * torch.randn(rows, **where)
    old = torch.where(torch.rand(rows, **where) < kept, old.clamp(max=-0.2), -0.01)
    advantages, loss_mask = torch.randn(rows, **where), torch.rand(rows, **where) < 0.9
    reference = logprobs + 0.3 * torch.randn(rows, **where)
    drawn = (logits, ids, old, advantages, loss_mask, reference)
    return LossInputs(*(x.to(device) for x in drawn))


def poison(tensor: Tensor, rows: Tensor) -> Tensor:
    """A copy with NaN in the given rows."""
    tensor = tensor.clone()
    tensor[rows] = float("nan")
    return tensor
