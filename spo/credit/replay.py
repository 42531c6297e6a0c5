"""Nodes kept between iterations.

A node keeps the logprobs that it was sampled with. A node that did not train stays in the buffer
until it trains or is too old.
"""

from __future__ import annotations

import dataclasses

import torch

from spo.credit.nodes import ZERO_CREDIT, of_nodes, of_tokens, rank_in_group
from spo.records import Credit, Forest, Replay, concat, select


def merge(
    forest: Forest,
    credit: Credit,
    buffer: Replay,
    *,
    version: int,
    nodes_per_prompt: int,
    max_age: int,
    seed: int,
    max_nodes: int | None = None,
) -> tuple[Forest, Credit, Replay]:
    """Add a rollout to the buffer, and take out the nodes that train now.

    At most `nodes_per_prompt` nodes of each tree, and `max_nodes` in all, are drawn at random among
    those with credit. `nodes_per_prompt` = 0 trains the whole new forest and keeps nothing. Nodes
    sampled `max_age` or more versions before `version` are dropped. Returns the forest to train
    (its `trained` marks the drawn nodes), its credit, and the new buffer.
    """
    if nodes_per_prompt == 0:
        return forest, credit, Replay()
    tokens = credit.tokens
    if buffer.forest is not None and buffer.credit is not None:
        forest = concat([buffer.forest, forest])
        tokens = torch.cat([buffer.credit, tokens])
    fresh = version - forest.born < max_age
    eligible = forest.trained & fresh & (of_nodes(forest, tokens).abs() > ZERO_CREDIT)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(forest.num_nodes, generator=generator)
    order = order[eligible[order]]
    order = order[forest.prompt[order].argsort(stable=True)]
    order = order[rank_in_group(forest.prompt[order]) < nodes_per_prompt]
    order = order[torch.randperm(order.numel(), generator=generator)[:max_nodes]]
    drawn = torch.zeros_like(forest.trained)
    drawn[order] = True
    rest = dataclasses.replace(forest, trained=eligible & ~drawn)
    kept = torch.zeros(len(forest.prompts), dtype=torch.bool)
    kept[forest.prompt[rest.trained].long()] = True
    left = Replay()
    if kept.any():
        left = Replay(select(rest, kept), tokens[of_tokens(forest, kept[forest.prompt.long()])])
    trained = dataclasses.replace(forest, trained=drawn)
    return trained, dataclasses.replace(credit, tokens=tokens), left
