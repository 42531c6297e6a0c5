"""The references where no shape and no error may depend on data: meta and fake tensors, torch.vmap.

All rows are computed. What a mask drops is replaced before the arithmetic, since it may be anything
(a padding id, a NaN), and is hidden in the results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from spo_kernels import rows
from spo_kernels.objective import PolicyLoss
from spo_kernels.tokens import Tokens


def policy_loss(
    reference: Callable[..., PolicyLoss],  # of spo_kernels/policy_loss.py
    logits: Tensor,  # (N, V)
    tokens: Tokens,  # N rows
    shape: tuple[int, ...],
    entropy: bool,
) -> PolicyLoss:
    """`masked_ppo_loss_ref` over all rows."""
    runs = tokens.runs()
    logits, ids, heat = _cleaned(logits, tokens.token_ids, tokens.temperatures(), runs)
    tokens = dataclasses.replace(tokens, token_ids=ids, temperature=heat)
    index = torch.arange(runs.shape[0], device=runs.device)
    return reference(logits, tokens, index, shape, entropy, runs)


def logprobs(
    logits: Tensor,  # (N, V)
    ids: Tensor,  # (N,) int64
    mask: Tensor,  # (N,) bool
    temperature: Tensor,  # (N,) or (1,)
    entropy: bool,
    logit_scale: float,
    logit_softcap: float | None,
) -> tuple[Tensor, Tensor | None]:  # (N,), (N,)
    """`token_logprobs_ref` over all rows."""
    cleaned = _cleaned(logits, ids, temperature, mask)
    found, row_entropy = rows.logprobs_of(*cleaned, entropy, logit_scale, logit_softcap)
    if row_entropy is not None:
        row_entropy = torch.where(mask, row_entropy, 0)
    return torch.where(mask, found, 0), row_entropy


def all_states(
    flat: Tensor,  # (H, D)
    hidden_index: Tensor | None,  # (N,) int64
) -> Tensor:  # (N, D)
    """The hidden state of every token; an index that is out of range takes the nearest."""
    if hidden_index is None:
        return flat
    return flat[hidden_index.clamp(0, max(flat.shape[0] - 1, 0))]


def _cleaned(
    logits: Tensor, ids: Tensor, temperature: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits 0, id 0 and temperature 1 in dropped rows."""
    heat = temperature if temperature.shape[0] == 1 else torch.where(kept, temperature, 1)
    return logits.masked_fill(~kept.unsqueeze(1), 0), torch.where(kept, ids, 0), heat
