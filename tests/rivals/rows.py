"""What a row of docs/losses.md is: a loss of another library, and how it is written with ours."""

from __future__ import annotations

import itertools
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
    "lengths": "(B, 1), `mask.sum(-1, keepdim=True).clamp(min=1)`",
    "tokens": "a number: the trained tokens of the optimiser step",
    "sequences": "a number: the sequences of the optimiser step",
    "longest": "a number: the maximum of a completion's length",
}


NUMBERS = ("logits", "old", "sampled", "ref", "advantages")
REACHES = (3.0, 8.0, 12.0, 25.0)  # of `far`: within all bounds, near 10, between 10 and 20, beyond


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


def far(reach: float, dtype: torch.dtype = torch.float32) -> dict:
    """The batch with log-ratios and reference differences of +-`reach`, alone and together.

    They are in sequences of both signs of the advantage; the one of one token has a ratio alone.
    """
    names = batch(torch.float64)
    logits, ids, old, sampled = (names[x] for x in ("logits", "ids", "old", "sampled"))
    noise = sampled - old
    for i, j in itertools.product(range(3), (1, 3, 5)):  # rare: others may be likelier by far
        others = logits[i, j].scatter(0, ids[i, j], -torch.inf)
        logits[i, j, ids[i, j]] = others.max() - reach - 1
    logprobs = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    signs = {"old": {0: -1, 1: 1, 3: 0, 4: -1, 5: 1}, "ref": {1: 0, 2: -1, 3: 1, 4: -1, 5: 1}}
    for name in signs:
        for j, sign in signs[name].items():
            names[name][:3, j] = logprobs[:3, j] + sign * reach - 0.1
    old[3, 0] = logprobs[3, 0] - reach
    names["sampled"] = (old + noise).clamp(max=-0.01)
    return {k: v.to(dtype) if k in NUMBERS else v for k, v in names.items()}


def emptied(dtype: torch.dtype = torch.float32) -> dict:
    """The batch with a sequence of which no token trains."""
    names = batch(dtype)
    mask = names["mask"].clone()
    mask[2] = False
    lengths = mask.sum(-1, keepdim=True).clamp(min=1)
    return names | dict(mask=mask, lengths=lengths, tokens=int(mask.sum()))


def token_error(got: Tensor, want: Tensor) -> float:
    """The largest deviation of gradients (B, L, V), as a share of that of the same token.

    A loss that one token dominates would hide the others in `error`.
    """
    size = want.double().abs().amax(-1)
    floor = 1e-6 * size[size > 0].median()
    return float(((got.double() - want.double()).abs().amax(-1) / (size + floor)).max())


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
