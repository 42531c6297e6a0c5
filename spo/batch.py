"""Forest -> packed batches: every unique token once, in depth-first order.

In that order the descendants of a node are contiguous, so one integer per token, the end of its
node's subtree, is the whole attention mask. Left out: nodes with nothing to train in or below them,
and the tail of a node after its last trained token if nothing below it trains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spo.advantages import ZERO_ADVANTAGE
from spo.records import Batch, Forest


@dataclass(frozen=True)
class PackStats:
    """Counts over one optimiser step."""

    kept_tokens: int  # Z: trained tokens that pass the mask, by weight
    trained_tokens: int  # the same before the mask
    packed_tokens: int  # forwarded
    repeated_tokens: int  # of these, prefixes repeated because a tree was split


def pack(
    forest: Forest,
    advantages: Tensor,
    *,
    prob_threshold: float | None,
    tokens_per_batch: int,
    trees: Sequence[int] | None = None,
    every_token: bool = False,
) -> tuple[list[Batch], PackStats]:
    """Pack the trained nodes of `trees` (all by default) into batches of one optimiser step.

    Each batch holds at most `tokens_per_batch` tokens unless a single path is longer. A tree over
    the budget is split at its branches; the shared prefix is repeated, its loss is not.

    Args:
        advantages: (S,) fp32, one per node.
        prob_threshold: the loss's mask; tokens at or above it need no hidden state. None: all do.
        every_token: the loss reads masked tokens too (a KL term over all tokens).
    """
    plan = _Plan(forest, advantages, None if every_token else prob_threshold)
    roots = torch.nonzero(forest.parent < 0)[:, 0].tolist()
    chosen = [roots[t] for t in (range(len(roots)) if trees is None else trees)]
    pieces = [piece for root in chosen for piece in plan.split(root, tokens_per_batch)]
    rows = np.concatenate([plan.rows(node) for p in pieces for node in p.trained] or [plan.empty])
    old_logprobs = plan.logprobs[rows]
    kept = old_logprobs < (math.inf if prob_threshold is None else math.log(prob_threshold))
    policy_norm = int(kept.sum())
    packed = sum(p.tokens for p in pieces)
    batches = [plan.batch(group, float(policy_norm)) for group in _groups(pieces, tokens_per_batch)]
    needed = sum(plan.size[n] for root in chosen for n in plan.subtree(root))
    stats = PackStats(
        kept_tokens=policy_norm,
        trained_tokens=sum(plan.full[n] * int(plan.weight[n]) for p in pieces for n in p.trained),
        packed_tokens=packed,
        repeated_tokens=packed - needed,
    )
    return batches, stats


@dataclass(frozen=True)
class _Piece:
    """A path from a root and whole subtrees below its end."""

    nodes: list[int]  # depth-first
    trained: list[int]  # those whose loss this piece carries
    tokens: int


class _Plan:
    """Which nodes and tokens of a forest have to be forwarded."""

    empty = np.empty(0, dtype=np.int64)

    def __init__(self, forest: Forest, advantages: Tensor, prob_threshold: float | None):
        self.token_ids = forest.token_ids.numpy()
        self.logprobs = forest.rollout_logprobs.numpy()
        self.advantages = advantages.numpy()
        self.weight = forest.weight.numpy()
        self.start = forest.cu_tokens[:-1].numpy()
        self.full = forest.cu_tokens.diff().tolist()
        self.parent = forest.parent.tolist()
        self.node_of = np.repeat(np.arange(forest.num_nodes), self.full)
        self.trained = (forest.trained & (advantages.abs() > ZERO_ADVANTAGE)).tolist()
        limit = math.inf if prob_threshold is None else math.log(prob_threshold)
        active = (self.logprobs < limit) & np.array(self.trained)[self.node_of]
        self.last = [0] * forest.num_nodes  # tokens up to and with the node's last active one
        where = np.flatnonzero(active)
        for node, token in zip(self.node_of[where].tolist(), where.tolist(), strict=True):
            self.last[node] = token + 1 - int(self.start[node])
        self.children: list[list[int]] = [[] for _ in self.parent]
        needed = [last > 0 for last in self.last]
        for node in range(forest.num_nodes - 1, -1, -1):
            if needed[node] and self.parent[node] >= 0:
                needed[self.parent[node]] = True
                self.children[self.parent[node]].append(node)
        for children in self.children:
            children.reverse()
        self.size = [  # tokens to forward: all, if something below trains
            0 if not n else full if kids else max(last - 1, 0)
            for n, full, kids, last in zip(needed, self.full, self.children, self.last, strict=True)
        ]
        self.below = list(self.size)  # tokens of the subtree
        for node in range(forest.num_nodes - 1, -1, -1):
            if self.parent[node] >= 0:
                self.below[self.parent[node]] += self.below[node]
        self.needed = needed

    def subtree(self, root: int) -> list[int]:
        """Needed nodes from `root` down, depth-first."""
        order, stack = [], [root] if self.needed[root] else []
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(reversed(self.children[node]))
        return order

    def split(self, root: int, budget: int) -> list[_Piece]:
        """Pieces of one tree that fit the budget where they can."""
        if not self.needed[root]:
            return []
        pieces: list[_Piece] = []
        stack: list[tuple[list[int], int]] = [([], root)]  # prefix path, subtree
        carried: set[int] = set()
        while stack:
            prefix, node = stack.pop()
            used = sum(self.size[n] for n in prefix)
            if used + self.below[node] > budget and self.children[node]:
                path = [*prefix, node]
                stack.extend((path, child) for child in reversed(self.children[node]))
                continue
            last = pieces[-1] if pieces else None
            if last is not None and prefix and last.nodes[: len(prefix)] == prefix:
                if last.tokens + self.below[node] <= budget:
                    nodes = [*last.nodes, *self.subtree(node)]
                    pieces[-1] = self._piece(nodes, carried - set(last.trained))
                    carried.update(pieces[-1].trained)
                    continue
            pieces.append(self._piece([*prefix, *self.subtree(node)], carried))
            carried.update(pieces[-1].trained)
        return pieces

    def _piece(self, nodes: list[int], carried: set[int]) -> _Piece:
        trained = [n for n in nodes if self.last[n] and n not in carried]
        return _Piece(nodes, trained, sum(self.size[n] for n in nodes))

    def rows(self, node: int) -> np.ndarray:
        """Token indices of the node's loss rows; those after its last active token are dropped,
        and a row of a node of weight w appears w times (each trajectory counts)."""
        start = int(self.start[node])
        return np.repeat(np.arange(start, start + self.last[node]), int(self.weight[node]))

    def batch(self, pieces: Sequence[_Piece], policy_norm: float) -> Batch:
        ids, depth, until, hidden, rows = [], [], [], [], []
        place = 0
        for piece in pieces:
            begin: dict[int, int] = {}
            depths: dict[int, int] = {}
            trained = set(piece.trained)
            ends: dict[int, int] = {}
            at = place
            for node in piece.nodes:
                begin[node] = at
                at += self.size[node]
                ends[node] = at
            for node in reversed(piece.nodes):
                parent = self.parent[node]
                if parent in ends:
                    ends[parent] = max(ends[parent], ends[node])
            for node in piece.nodes:
                parent, size, start = self.parent[node], self.size[node], int(self.start[node])
                base = depths[parent] + self.full[parent] if parent >= 0 else 0
                depths[node] = base
                ids.append(self.token_ids[start : start + size])
                depth.append(np.arange(base, base + size))
                until.append(np.full(size, ends[node]))
                if node in trained:
                    where = self.rows(node)
                    rows.append(where)
                    before = begin[node] + (where - start) - 1
                    first = begin[parent] + self.full[parent] - 1
                    hidden.append(np.where(where == start, first, before))
            place = at
        where = np.concatenate(rows or [self.empty])
        return Batch(
            token_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
            position_ids=torch.from_numpy(np.concatenate(depth).astype(np.int64)),
            visible_until=torch.from_numpy(np.concatenate(until).astype(np.int32)),
            hidden_index=torch.from_numpy(np.concatenate(hidden or [self.empty]).astype(np.int64)),
            targets=torch.from_numpy(self.token_ids[where].astype(np.int64)),
            old_logprobs=torch.from_numpy(self.logprobs[where]),
            advantages=torch.from_numpy(self.advantages[self.node_of[where]]),
            loss_mask=torch.ones(where.size, dtype=torch.bool),
            policy_norm=policy_norm,
        )


def _groups(pieces: Sequence[_Piece], budget: int) -> list[list[_Piece]]:
    """Consecutive pieces filled up to the budget."""
    groups: list[list[_Piece]] = []
    used = 0
    for piece in pieces:
        if groups and used + piece.tokens <= budget:
            groups[-1].append(piece)
            used += piece.tokens
        else:
            groups.append([piece])
            used = piece.tokens
    return groups
