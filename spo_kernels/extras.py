"""What may be asked of each row besides its logprob, without gradients, in plain PyTorch.

It is computed while the logits of a chunk are in memory, and costs time only where it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from spo_kernels import rows

BLOCK_ELEMENTS = 1 << 23  # logits looked at together: 32 MiB in fp32, 64 MiB as sorting keys


@dataclass(frozen=True)
class TokenExtras:
    """What `extras` asked for, of each token; None where it did not. Masked tokens have False, 0
    and -1."""

    is_top1: Tensor | None  # (...) bool: no logit is larger, and none before it as large
    log_sum_sq_probs: Tensor | None  # (...) log of the sum over the vocabulary of p^2
    mean_logits: Tensor | None  # (...) mean over the vocabulary, at the temperature
    top_ids: Tensor | None  # (..., top_k) int64, the largest first, of equal ones the smallest id


NAMES = tuple(field.name for field in fields(TokenExtras))


def check(extras: Sequence[str] | None, top_k: int, vocab: int) -> list[str]:
    """The names that are asked for. Raises TypeError and ValueError."""
    if isinstance(extras, str):
        raise TypeError(f"extras: expected a sequence of names, found the string {extras!r}")
    names = list(extras or ())
    for name in names:
        if name not in NAMES:
            raise ValueError(f"extras: expected names among {', '.join(NAMES)}, found {name!r}")
    if "top_ids" not in names and top_k != 1:
        raise ValueError(f"top_k: expected 'top_ids' among the extras, found top_k={top_k} alone")
    if "top_ids" in names and not 1 <= top_k <= vocab:
        raise ValueError(f"top_k: expected a number from 1 to {vocab}, found {top_k}")
    return names


def new_results(
    like: Tensor, count: int, names: Sequence[str], top_k: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, ...]:
    """Tensors in the order of NAMES, of no rows where not asked for; all tokens masked."""
    sizes = [count if name in names else 0 for name in NAMES]
    return (
        like.new_zeros(sizes[0], dtype=torch.bool),
        like.new_zeros(sizes[1], dtype=dtype),
        like.new_zeros(sizes[2], dtype=dtype),
        like.new_full((sizes[3], top_k), -1, dtype=torch.int64),
    )


def fill(
    results: Sequence[Tensor],  # from `new_results`
    index: Tensor,  # (c,) their rows that are given
    logits: Tensor,  # (c, V)
    ids: Tensor,  # (c,)
    temperature: Tensor,  # (c,) or (1,)
    logit_scale: float,
    logit_softcap: float | None,
    names: Sequence[str],
    top_k: int,
) -> None:
    """Write what is asked for of some rows."""
    if not names:
        return
    size = max(1, BLOCK_ELEMENTS // logits.shape[1])
    for begin in range(0, index.shape[0], size):
        part = slice(begin, begin + size)
        heat = temperature if temperature.shape[0] == 1 else temperature[part]
        z = rows.scaled(logits[part], heat, logit_scale, logit_softcap)
        for name, values in measure(z, ids[part], names, top_k).items():
            results[NAMES.index(name)][index[part]] = values


def measure(
    z: Tensor,  # (c, V) fp32 or fp64, as they enter the softmax
    ids: Tensor,  # (c,)
    names: Sequence[str],
    top_k: int,
) -> dict[str, Tensor]:
    """What is asked for, by name."""
    found = {}
    if "mean_logits" in names:
        found["mean_logits"] = z.mean(-1)
    if "top_ids" in names:
        found["top_ids"] = top_ids(z, top_k)
    if "is_top1" in names or "log_sum_sq_probs" in names:
        top = found["top_ids"][:, :1] if "top_ids" in names else top_ids(z, 1)
        if "is_top1" in names:
            found["is_top1"] = top.squeeze(1) == ids
        if "log_sum_sq_probs" in names:
            # log sum p^2 = logsumexp(2 z) - 2 logsumexp(z), each taken from the largest logit.
            once, twice = (x.log_softmax(-1).gather(1, top).squeeze(1) for x in (z, 2 * z))
            found["log_sum_sq_probs"] = 2 * once - twice
    return found


def top_ids(z: Tensor, top_k: int) -> Tensor:
    """Ids (c, top_k) of the largest numbers of z (c, V), of equal ones the smallest id first."""
    if top_k == 1:
        return z.argmax(-1, keepdim=True)  # the first maximum
    if z.dtype == torch.float64:
        return torch.sort(z, dim=-1, descending=True, stable=True).indices[:, :top_k]
    values, ids = z.topk(min(top_k + 1, z.shape[1]))  # which leaves open what comes first of equals
    ids, tied = ids[:, :top_k], (values[:, 1:] == values[:, :-1]).any(1)
    if tied.any():
        ids[tied] = _top_ids_of_ties(z[tied], top_k)
    return ids


def _top_ids_of_ties(z: Tensor, top_k: int) -> Tensor:
    """fp32 numbers become integers of the same order, with the id below."""
    bits = (z + 0.0).view(torch.int32)  # -0 is 0
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    below = torch.arange(z.shape[1] - 1, -1, -1, device=z.device)
    return ((order.long() << 32) | below).topk(top_k).indices


def record(results: Sequence[Tensor], names: Sequence[str], shape: tuple[int, ...]) -> TokenExtras:
    """Results of all tokens in the tokens' shape."""
    shaped = (x.reshape(*shape, *x.shape[1:]) if n in names else None
              for n, x in zip(NAMES, results, strict=True))  # fmt: skip
    return TokenExtras(*shaped)
