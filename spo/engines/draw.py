"""One token per row by inverse CDF; the noise depends only on (seed, depth)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from spo.records import Sampling

BLOCK = 128  # probabilities summed at once when a token is drawn


def draw(
    logits: Tensor,  # (R, V)
    sampling: Sequence[Sampling],  # of each row
    seeds: np.ndarray,  # (R,) uint64
    depth: np.ndarray,  # (R,) uint64, tokens drawn before this one
) -> tuple[np.ndarray, np.ndarray]:  # (R,) int64; (R,) fp32
    """Token ids and their logprobs, at each row's temperature and over the ids that it may draw.

    Rows that truncate draw from what `truncated` leaves; their logprobs are those of all ids.
    """
    temperature = np.array([s.temperature for s in sampling])
    divisor = np.where(temperature > 0, temperature, 1.0).astype(np.float32)
    sizes = [logits.shape[1] if s.vocab_size is None else s.vocab_size for s in sampling]
    logits = logits[:, : max(sizes)].float() / torch.from_numpy(divisor).to(logits.device)[:, None]
    if min(sizes) < logits.shape[1]:
        ids = torch.arange(logits.shape[1], device=logits.device)
        outside = ids >= torch.tensor(sizes, device=logits.device)[:, None]
        logits = logits.masked_fill(outside, -torch.inf)
    logprobs = torch.log_softmax(logits, -1)
    noise = torch.from_numpy(uniform(seeds, depth)).to(logits.device)
    probs = logprobs.exp()
    cut = [row for row, one in enumerate(sampling) if one.truncates]
    if cut:
        probs[cut] = truncated(probs[cut], [sampling[row] for row in cut])
    token_ids = inverse_cdf(probs, noise)
    if (temperature <= 0).any():
        greedy = torch.from_numpy(temperature <= 0).to(logits.device)
        token_ids = torch.where(greedy, logits.argmax(-1), token_ids)
    chosen = logprobs.gather(-1, token_ids[:, None])[:, 0]
    return token_ids.cpu().numpy(), chosen.cpu().numpy()


def truncated(
    probs: Tensor,  # (R, V) fp32
    sampling: Sequence[Sampling],  # of each row
) -> Tensor:  # (R, V) fp32, not renormalised
    """`probs` with 0 for the ids that min-p, then top-k, then top-p of what is left drop.

    That is vLLM's order. Of equal probabilities the lower ids stay.
    """
    min_p, top_p = (
        torch.tensor([[getattr(s, name)] for s in sampling]).double().to(probs.device)
        for name in ("min_p", "top_p")
    )
    top_k = torch.tensor([[s.top_k or probs.shape[1]] for s in sampling], device=probs.device)
    ranked, ids = probs.sort(dim=-1, descending=True, stable=True)
    keep = ranked >= min_p * ranked[:, :1]
    keep &= torch.arange(probs.shape[1], device=probs.device) < top_k
    left = (ranked * keep).double()
    above = left.cumsum(-1) - left  # of the more likely ids
    keep &= (above < top_p * left.sum(-1, keepdim=True)) | (top_p >= 1)
    return torch.zeros_like(probs).scatter(-1, ids, ranked * keep)


def inverse_cdf(
    probs: Tensor,  # (R, V) fp32
    noise: Tensor,  # (R,) fp64, uniform in [0, 1)
) -> Tensor:  # (R,) int64
    """The token at which the running sum of `probs`, as a share of its total, exceeds the noise.

    It finds the block of tokens first, then the token in it: a running sum in fp64 over the whole
    vocabulary costs as much as a layer.
    """
    rows, vocabulary = probs.shape
    padded = F.pad(probs, (0, -vocabulary % BLOCK)).view(rows, -1, BLOCK)
    blocks = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    target = noise * blocks[:, -1]
    block = torch.searchsorted(blocks, target[:, None], right=True)[:, 0]
    block = block.clamp(max=blocks.shape[1] - 1)
    every = torch.arange(rows, device=probs.device)
    inside = padded[every, block].double().cumsum(-1)
    rest = target - blocks[every, block] + inside[:, -1]
    token = torch.searchsorted(inside, rest[:, None], right=True)[:, 0]
    last = (padded[every, block] > 0).long().cumsum(-1).argmax(-1)  # rounding must not step past
    return block * BLOCK + torch.minimum(token, last)


def uniform(seed: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Uniform [0, 1) noise (R,) fp64 from two (R,) uint64 counters: the splitmix64 finaliser."""
    with np.errstate(over="ignore"):
        x = seed * np.uint64(0x9E3779B97F4A7C15) + counter * np.uint64(0xD1B54A32D192ED03)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
