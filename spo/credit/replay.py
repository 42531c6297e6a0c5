"""Nodes kept between iterations.

A node keeps the logprobs that it was sampled with. A node that did not train stays in the buffer
until it trains or is too old. Its age counts from the iteration that received it: the tokens of a
stream (`train.stream_depth`) are older.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from spo.credit.nodes import ZERO_CREDIT, of_nodes, of_tokens, rank_in_group
from spo.records import Credit, Forest, Replay, concat, select


def merge(
    forest: Forest,
    credit: Credit,
    buffer: Replay,
    *,
    iteration: int,
    nodes_per_prompt: int,
    max_age: int,
    seed: int,
    max_nodes: int | None = None,
) -> tuple[Forest, Credit, Replay]:
    """Add a rollout to the buffer, and take out the nodes that train now.

    At most `nodes_per_prompt` nodes of each tree, and `max_nodes` in all, are drawn at random among
    those with credit. `nodes_per_prompt` = 0 trains the whole new forest and keeps nothing. Nodes
    that will be `max_age` iterations old in the next one are dropped, and counted in the figure
    `replay_dropped`. Returns the trees of drawn nodes (`trained` marks these), their credit, and
    the new buffer; if no node is drawn, all trees.
    """
    if nodes_per_prompt == 0:
        return forest, credit, Replay()
    tokens = credit.tokens
    received = torch.full((len(forest.prompts),), iteration)
    if buffer.forest is not None and buffer.credit is not None and buffer.received is not None:
        forest = concat([buffer.forest, forest])
        tokens = torch.cat([buffer.credit, tokens])
        received = torch.cat([buffer.received, received])
    age = (iteration - received)[forest.prompt.long()]
    credited = forest.trained & (of_nodes(forest, tokens).abs() > ZERO_CREDIT)
    eligible = credited & (age < max_age)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(forest.num_nodes, generator=generator)
    order = order[eligible[order]]
    order = order[forest.prompt[order].argsort(stable=True)]
    order = order[rank_in_group(forest.prompt[order]) < nodes_per_prompt]
    order = order[torch.randperm(order.numel(), generator=generator)[:max_nodes]]
    drawn = torch.zeros_like(forest.trained)
    drawn[order] = True
    rest = dataclasses.replace(forest, trained=eligible & ~drawn & (age + 1 < max_age))
    dropped = int((credited & ~drawn & ~rest.trained).sum())
    left, kept = Replay(), _trees(rest)
    if kept.any():
        left = Replay(*_select(rest, tokens, kept), received[kept])
    chosen = dataclasses.replace(forest, trained=drawn)
    if drawn.any():
        chosen, tokens = _select(chosen, tokens, _trees(chosen))
    figures = credit.figures | {"replay_dropped": dropped}
    return chosen, dataclasses.replace(credit, tokens=tokens, figures=figures), left


def _trees(forest: Forest) -> Tensor:
    """(B,) bool, the trees with a node to train."""
    trees = torch.zeros(len(forest.prompts), dtype=torch.bool)
    trees[forest.prompt[forest.trained].long()] = True
    return trees


def _select(forest: Forest, tokens: Tensor, trees: Tensor) -> tuple[Forest, Tensor]:
    """The trees where `trees` (B,) bool is True, and their part of (T,) numbers."""
    return select(forest, trees), tokens[of_tokens(forest, trees[forest.prompt.long()])]
