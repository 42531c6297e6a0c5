"""Functions of a forest's nodes and tokens that the credit rules share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from spo.records import LENGTH, Credit, Forest

ZERO_CREDIT = 1e-6  # a token trains only if its credit is larger


def check_credit(forest: Forest, credit: Credit) -> None:
    """Raise ValueError unless there is one finite number for each token."""
    if not isinstance(credit, Credit):
        raise ValueError(f"credit: expected a spo.Credit, found {type(credit).__name__}")
    expected, tokens = forest.token_ids.numel(), credit.tokens
    found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
    if found != (expected,):
        raise ValueError(
            f"credit: expected one number for each of the forest's {expected} tokens, found "
            f"{found}; `of_tokens` makes them from (S,) numbers of nodes"
        )
    if not tokens.isfinite().all():
        token = int((~tokens.isfinite()).nonzero()[0])
        raise ValueError(f"credit: expected finite numbers, found {tokens[token]} at token {token}")


def of_tokens(forest: Forest, of_nodes: Tensor) -> Tensor:
    """(S,) numbers of nodes -> (T,) numbers of their tokens."""
    return of_nodes.repeat_interleave(forest.cu_tokens.diff())


def of_nodes(forest: Forest, of_tokens: Tensor) -> Tensor:
    """(T,) numbers of tokens -> (S,): each node's largest by magnitude, with sign; 0 if empty."""
    nodes = torch.arange(forest.num_nodes).repeat_interleave(forest.cu_tokens.diff())
    largest = torch.zeros(2, forest.num_nodes, dtype=of_tokens.dtype)
    for row, sign in zip(largest, (1, -1), strict=True):
        row.scatter_reduce_(0, nodes, sign * of_tokens, "amax")
    return torch.where(largest[0] >= largest[1], largest[0], -largest[1])


def responses(forest: Forest) -> tuple[Tensor, Tensor]:
    """Trained leaves with a reward above 0, and those without: (n,) int64 each."""
    graded = forest.trained & forest.is_leaf & forest.rewards.isfinite()
    right, wrong = (graded & earned for earned in (forest.rewards > 0, forest.rewards <= 0))
    return torch.nonzero(right)[:, 0], torch.nonzero(wrong)[:, 0]


def rank_in_group(groups: Tensor) -> Tensor:
    """Index of every entry within its group; `groups` is sorted."""
    counts = groups.unique_consecutive(return_counts=True)[1]
    return torch.arange(groups.numel()) - (counts.cumsum(0) - counts).repeat_interleave(counts)


def whiten(credit: Tensor, chosen: Tensor) -> Tensor:
    """The chosen entries scaled to mean 0 and deviation 1, others 0; unchanged if fewer than 2."""
    if chosen.sum() < 2:
        return credit
    std, mean = torch.std_mean(credit[chosen], correction=0)
    return torch.where(chosen, (credit - mean) / (std + 1e-8), 0.0)


def ancestors(parent: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """For every node its parent, then its grandparent, …: pairs (exists, index)."""
    ancestor = parent
    while bool((exists := ancestor >= 0).any()):
        step = ancestor.clamp(min=0)
        yield exists, step
        ancestor = torch.where(exists, parent[step], -1)


def figures(forest: Forest, values: Tensor, credit: Tensor) -> dict[str, float]:
    """Figures to report with every rollout.

    Args:
        values: (S,), of the nodes.
        credit: (n,), of the trained nodes or of the trained tokens, each once.
    """
    roots = forest.parent < 0
    seen = values[roots & values.isfinite()]
    stderr = float(seen.std(correction=0)) / seen.numel() ** 0.5 if seen.numel() else math.nan
    graded = forest.rewards[forest.rewards.isfinite()]
    segments, sizes = forest.trained.long(), forest.cu_tokens.diff() * ~roots
    lengths = sizes
    for exists, ancestor in ancestors(forest.parent.long()):
        segments = segments + torch.where(exists, forest.trained[ancestor], False)
        lengths = lengths + torch.where(exists, sizes[ancestor], 0)
    trajectories = torch.where(forest.is_leaf & forest.trained, forest.weight, 0)
    responses = lengths[forest.is_leaf]
    return {
        "value_n": float(seen.numel()),
        "value_mean": float(seen.mean()),
        "value_stderr": stderr,
        "reward_mean": float(graded.mean()),
        "reward_std": float(graded.std()) if graded.numel() > 1 else math.nan,
        "same_reward_share": _same_reward_share(forest),
        "response_tokens_mean": float(responses.double().mean()),
        "response_tokens_min": int(responses.min()),
        "response_tokens_max": int(responses.max()),
        "truncated_share": float((forest.finish[forest.is_leaf] == LENGTH).double().mean()),
        "zero_advantage_share": float((credit.abs() <= ZERO_CREDIT).float().mean()),
        "mean_abs_advantage": float(credit.abs().mean()),
        "segments_per_trajectory": float((segments * trajectories).sum())
        / max(float(trajectories.sum()), 1),
    }


def _same_reward_share(forest: Forest) -> float:
    """Share of the prompts with graded responses whose responses all have the same reward."""
    graded = forest.rewards.isfinite()
    prompts, rewards = forest.prompt[graded].long(), forest.rewards[graded]
    extremes = (
        torch.zeros(len(forest.prompts)).scatter_reduce_(
            0, prompts, rewards, reduce, include_self=False
        )
        for reduce in ("amin", "amax")
    )
    same = torch.eq(*extremes)
    return float(same[prompts.unique()].double().mean())
