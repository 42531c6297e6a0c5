"""Forest -> packed batches: every unique token once, in depth-first order.

In this order the descendants of a node are contiguous. So one integer per token, the end of its
node's subtree, is the whole attention mask. Nodes with nothing to train in or below them are left
out, and so is the end of a node after its last trained token if nothing below it trains. A KL term
over all tokens keeps nodes without an advantage.
`packing="rows"` makes one sequence per node instead, for models that cannot be packed and for
comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from spo.credit.nodes import ZERO_CREDIT
from spo.records import Batch, Forest


@dataclass(frozen=True)
class PackStats:
    """Counts over one optimiser step."""

    kept_tokens: int  # Z: trained tokens that the mask keeps, times their weights
    kl_tokens: int  # those that the KL term covers
    trained_tokens: int  # tokens of all nodes with an advantage, before the mask
    packed_tokens: int  # forwarded, over all ranks; padding not counted
    repeated_tokens: int  # of these, prefixes repeated because a tree was split


def pack(
    forest: Forest,
    credit: Tensor,
    *,
    prob_threshold: float | None,
    tokens_per_batch: int,
    trees: Sequence[int] | None = None,
    every_token: bool = False,
    packing: str = "tree",
    share: tuple[int, int] = (0, 1),
) -> tuple[list[Batch], PackStats]:
    """Pack the trained nodes of `trees` (all by default) into batches of one optimiser step.

    A batch holds at most `tokens_per_batch` tokens, unless a single path is longer. A larger tree
    is split at its branches; the shared prefix is repeated, its loss is not.

    Args:
        credit: (T,) fp32. A node trains if a token of it has credit.
        prob_threshold: of the loss's mask; tokens at or above it need no hidden state. None: all
            tokens need one.
        every_token: the KL term covers every token of the forest's trained nodes, masked ones and
            those of nodes without credit too. They have rows, which `loss_mask` leaves out if
            their node has no credit.
        packing: tree, or rows: one sequence per trained node, and padding counts as tokens.
        share: (rank, ranks) to pack for. All ranks have the same number of batches and about as
            many tokens; the norms and the stats are those of the whole step on every rank.
    """
    plan = _Plan(forest, credit, prob_threshold, every_token)
    roots = torch.nonzero(forest.parent < 0)[:, 0].tolist()
    chosen = [roots[t] for t in (range(len(roots)) if trees is None else trees)]
    rank, ranks = share
    needed = sum(plan.below[root] for root in chosen)
    largest = min(tokens_per_batch, -(-needed // ranks))  # no rank waits for one large tree
    cut = plan.rows if packing == "rows" else plan.split
    pieces = [piece for root in chosen for piece in cut(root, largest)]
    rows = np.concatenate([plan.loss_rows(n) for p in pieces for n in p.trained] or [_NONE])
    kept = int(plan.kept[rows].sum())
    packed = sum(p.tokens for p in pieces)
    stats = PackStats(
        kept_tokens=kept,
        kl_tokens=rows.size if every_token else kept,
        trained_tokens=plan.trained_tokens(chosen),
        packed_tokens=packed,
        repeated_tokens=packed - needed,
    )
    grouped = [_groups(dealt, tokens_per_batch, packing) for dealt in _deal(pieces, ranks)]
    batches = [plan.batch(group, stats) for group in grouped[rank]]
    idle = max(map(len, grouped)) - len(batches)
    return batches + [_idle_batch(stats)] * idle, stats


def unpack(forest: Forest, batches: Sequence[Batch], rows: Sequence[Tensor]) -> Tensor:
    """(T,) fp32 on the CPU: the numbers of the batches' (N,) rows, at the forest's tokens.

    Tokens without a row are 0, and so are those of other ranks: the sum over ranks is complete.
    """
    tokens = torch.zeros(forest.token_ids.numel())
    for batch, values in zip(batches, rows, strict=True):
        assert batch.token_index is not None
        tokens[batch.token_index.cpu()] = values.float().cpu()
    return tokens


@dataclass(frozen=True)
class _Piece:
    """A path from a root and whole subtrees below its end."""

    nodes: list[int]  # depth-first
    sizes: list[int]  # tokens to forward in each node
    trained: list[int]  # nodes whose rows belong to this piece

    @property
    def tokens(self) -> int:
        return sum(self.sizes)


class _Plan:
    """Which nodes and tokens of a forest must be forwarded."""

    def __init__(
        self, forest: Forest, credit: Tensor, prob_threshold: float | None, every_token: bool
    ):
        self.token_ids = forest.token_ids.numpy()
        self.logprobs = forest.rollout_logprobs.numpy()
        self.weight = forest.weight.numpy()
        self.start = forest.cu_tokens[:-1].numpy()
        self.full = forest.cu_tokens.diff().tolist()
        self.parent = forest.parent.tolist()
        self.node_of = np.repeat(np.arange(forest.num_nodes), self.full)
        credited = np.zeros(forest.num_nodes, dtype=bool)
        credited[self.node_of[np.abs(credit.numpy()) > ZERO_CREDIT]] = True
        trained = forest.trained.numpy() & credited
        self.in_loss = trained[self.node_of]  # (T,) of a node with an advantage
        self.credit = np.where(self.in_loss, credit.numpy(), np.float32(0))
        self.kept = self.in_loss & (self.logprobs < _limit(prob_threshold))
        active = forest.trained.numpy()[self.node_of] if every_token else self.kept
        where = np.flatnonzero(active)
        last = np.zeros(forest.num_nodes, dtype=np.int64)
        np.maximum.at(last, self.node_of[where], where + 1 - self.start[self.node_of[where]])
        self.last = last.tolist()  # number of tokens up to the node's last active one, inclusive
        self.children: list[list[int]] = [[] for _ in self.parent]
        needed = [last > 0 for last in self.last]
        for node in range(forest.num_nodes - 1, -1, -1):
            if needed[node] and self.parent[node] >= 0:
                needed[self.parent[node]] = True
                self.children[self.parent[node]].append(node)
        for children in self.children:
            children.reverse()
        self.size = [  # tokens to forward; all of them if something below trains
            0 if not n else full if kids else max(last - 1, 0)
            for n, full, kids, last in zip(needed, self.full, self.children, self.last, strict=True)
        ]
        self.below = list(self.size)  # tokens of the subtree
        for node in range(forest.num_nodes - 1, -1, -1):
            if self.parent[node] >= 0:
                self.below[self.parent[node]] += self.below[node]
        self.needed = needed
        self.trained = trained

    def trained_tokens(self, roots: Sequence[int]) -> int:
        """Tokens of the nodes with an advantage in these trees, masked ones included."""
        chosen = np.zeros(len(self.parent), dtype=bool)
        chosen[list(roots)] = True
        for node, parent in enumerate(self.parent):
            if parent >= 0:
                chosen[node] = chosen[parent]
        return int((np.array(self.full) * self.weight)[chosen & self.trained].sum())

    def subtree(self, root: int) -> list[int]:
        """Needed nodes from `root` down, depth-first."""
        order, stack = [], [root] if self.needed[root] else []
        while stack:
            node = stack.pop()
            order.append(node)
            stack.extend(reversed(self.children[node]))
        return order

    def split(self, root: int, budget: int) -> list[_Piece]:
        """Pieces of one tree that fit the budget if possible."""
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
        return _Piece(nodes, [self.size[n] for n in nodes], trained)

    def rows(self, root: int, budget: int) -> list[_Piece]:
        """A piece per trained node: its path, cut before its last active token."""
        pieces: list[_Piece] = []
        path: list[int] = []
        for node in self.subtree(root):
            while path and path[-1] != self.parent[node]:
                path.pop()
            path.append(node)
            if self.last[node]:
                sizes = [*(self.full[n] for n in path[:-1]), self.last[node] - 1]
                pieces.append(_Piece([*path], sizes, [node]))
        return pieces

    def loss_rows(self, node: int) -> np.ndarray:
        """Token indices of the node's loss rows.

        Rows after the last active token are dropped. A row of a node of weight w appears w times,
        because each trajectory counts.
        """
        start = int(self.start[node])
        return np.repeat(np.arange(start, start + self.last[node]), int(self.weight[node]))

    def batch(self, pieces: Sequence[_Piece], stats: PackStats) -> Batch:
        ids, depth, until, hidden, rows = [], [], [], [], []
        begin_piece = 0
        for piece in pieces:
            begin: dict[int, int] = {}
            depths: dict[int, int] = {}
            trained = set(piece.trained)
            ends: dict[int, int] = {}
            at = begin_piece
            for node, size in zip(piece.nodes, piece.sizes, strict=True):
                begin[node] = at
                at += size
                ends[node] = at
            for node in reversed(piece.nodes):
                parent = self.parent[node]
                if parent in ends:
                    ends[parent] = max(ends[parent], ends[node])
            for node, size in zip(piece.nodes, piece.sizes, strict=True):
                parent, start = self.parent[node], int(self.start[node])
                base = depths[parent] + self.full[parent] if parent >= 0 else 0
                depths[node] = base
                ids.append(self.token_ids[start : start + size])
                depth.append(np.arange(base, base + size))
                until.append(np.full(size, ends[node]))
                if node in trained:
                    where = self.loss_rows(node)
                    rows.append(where)
                    before = begin[node] + (where - start) - 1
                    first = begin[parent] + self.full[parent] - 1
                    hidden.append(np.where(where == start, first, before))
            begin_piece = at
        where = np.concatenate(rows or [_NONE])
        return Batch(
            token_ids=torch.from_numpy(np.concatenate(ids).astype(np.int64)),
            position_ids=torch.from_numpy(np.concatenate(depth).astype(np.int64)),
            visible_until=torch.from_numpy(np.concatenate(until).astype(np.int32)),
            hidden_index=torch.from_numpy(np.concatenate(hidden or [_NONE]).astype(np.int64)),
            targets=torch.from_numpy(self.token_ids[where].astype(np.int64)),
            old_logprobs=torch.from_numpy(self.logprobs[where]),
            advantages=torch.from_numpy(self.credit[where]),
            loss_mask=torch.from_numpy(self.in_loss[where]),
            policy_norm=float(stats.kept_tokens),
            kl_norm=float(stats.kl_tokens),
            share=float(self.kept[where].sum()) / max(stats.kept_tokens, 1),
            token_index=torch.from_numpy(where),
        )


_NONE = np.empty(0, dtype=np.int64)


def _limit(prob_threshold: float | None) -> float:
    """Tokens with a logprob below this are active."""
    return math.inf if prob_threshold is None else math.log(prob_threshold)


def _deal(pieces: Sequence[_Piece], ranks: int) -> list[list[_Piece]]:
    """Pieces of every rank: the largest first, each to the rank with the fewest tokens."""
    if ranks == 1:
        return [list(pieces)]
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in sorted(range(len(pieces)), key=lambda i: -pieces[i].tokens):
        least = load.index(min(load))
        dealt[least].append(i)
        load[least] += pieces[i].tokens
    return [[pieces[i] for i in sorted(mine)] for mine in dealt]


def _groups(pieces: Sequence[_Piece], budget: int, packing: str) -> list[list[_Piece]]:
    """Pieces grouped up to the budget: trees in order; rows by length, for little padding."""
    rows = packing == "rows"
    if rows:
        pieces = sorted(pieces, key=lambda piece: -piece.tokens)
    groups: list[list[_Piece]] = []
    used = 0
    for piece in pieces:
        cost = groups[-1][0].tokens if rows and groups else piece.tokens
        if groups and used + cost <= budget:
            groups[-1].append(piece)
            used += cost
        else:
            groups.append([piece])
            used = piece.tokens
    return groups


def _idle_batch(stats: PackStats) -> Batch:
    """One token and no loss, for a rank that has fewer batches than the others."""
    return Batch(
        token_ids=torch.zeros(1, dtype=torch.int64),
        position_ids=torch.zeros(1, dtype=torch.int64),
        visible_until=torch.ones(1, dtype=torch.int32),
        hidden_index=torch.empty(0, dtype=torch.int64),
        targets=torch.empty(0, dtype=torch.int64),
        old_logprobs=torch.empty(0),
        advantages=torch.empty(0),
        loss_mask=torch.empty(0, dtype=torch.bool),
        policy_norm=float(stats.kept_tokens),
        kl_norm=float(stats.kl_tokens),
        share=0.0,
        token_index=torch.empty(0, dtype=torch.int64),
    )
