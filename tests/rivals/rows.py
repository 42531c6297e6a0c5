"""What a row of docs/losses.md is: a loss of another library, and how it is written with ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import spo_kernels

NAMES = {
    "logits": "(B, L, V), raw",
    "ids": "(B, L) int64, the sampled tokens",
    "old": "(B, L), logprobs of the policy before the step",
    "sampled": "(B, L), logprobs of the engine that sampled",
    "ref": "(B, L), logprobs of the reference policy",
    "advantages": "(B, 1), one per sequence",
    "mask": "(B, L) bool, the trained tokens",
    "lengths": "(B, 1), `mask.sum(-1, keepdim=True)`",
    "tokens": "a number: the trained tokens of the optimiser step",
    "sequences": "a number: the sequences of the optimiser step",
    "longest": "a number: the maximum of a completion's length",
}


@dataclass(frozen=True)
class Row:
    """`theirs` takes a batch and its differentiable logprobs and entropies (B, L)."""

    library: str
    option: str
    theirs: Callable[[dict, Tensor, Tensor], Tensor]
    code: str  # of a user of spo_kernels: makes `loss` from NAMES


def batch(dtype: torch.dtype = torch.float32) -> dict:
    """Four sequences of 17, 11, 6 and 1 tokens. Ratios, KL and advantages take both signs; padding
    holds numbers that no loss may see."""
    generator = torch.Generator().manual_seed(16)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    B, L, V = 4, 17, 13
    logits = 1.5 * draw(B, L, V)
    ids = torch.randint(V, (B, L), generator=generator)
    lengths = torch.tensor([[17], [11], [6], [1]])
    logprobs = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    made = dict(
        logits=logits,
        old=(logprobs + 0.4 * draw(B, L)).clamp(max=-0.01),
        sampled=(logprobs + 0.4 * draw(B, L)).clamp(max=-0.01),
        ref=(logprobs + 0.5 * draw(B, L)).clamp(max=-0.01),
        advantages=torch.tensor([[1.2], [-0.8], [0.5], [-1.5]], dtype=torch.float64),
    )
    numbers = {name: value.to(dtype) for name, value in made.items()}
    mask = torch.arange(L) < lengths
    return numbers | dict(ids=ids, mask=mask, lengths=lengths, tokens=50, sequences=B, longest=L)


def error(got: Tensor, want: Tensor) -> float:
    """The largest deviation, as a share of the largest magnitude."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def ours(code: str, names: dict) -> tuple[Tensor, Tensor]:
    """The loss that the code makes from a batch, and its gradient with respect to the logits."""
    names = names | {"logits": names["logits"].detach().requires_grad_()}
    public = {name: getattr(spo_kernels, name) for name in spo_kernels.__all__}
    exec(code, public | {"torch": torch} | names, names)  # the document's own lines
    (dlogits,) = torch.autograd.grad(names["loss"], names["logits"])
    return names["loss"].detach(), dlogits


def theirs(row: Row, names: dict) -> tuple[Tensor, Tensor]:
    """The loss of the other library, from PyTorch's logprobs and entropies."""
    logits = names["logits"].detach().requires_grad_()
    names = names | {"logits": logits}
    log_p = logits.log_softmax(-1)
    logprobs = log_p.gather(-1, names["ids"][..., None])[..., 0]
    loss = row.theirs(names, logprobs, -(log_p.exp() * log_p).sum(-1))
    (dlogits,) = torch.autograd.grad(loss, logits)
    return loss.detach(), dlogits
