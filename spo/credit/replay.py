"""Nodes kept between iterations. A node keeps the logprobs it was sampled with; what is not trained
stays until it is too old; nothing popped is thrown away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from spo.credit.values import ZERO_ADVANTAGE
from spo.records import FOREST_TENSORS, Forest, Replay


def merge(
    forest: Forest,
    advantages: Tensor,
    buffer: Replay,
    *,
    version: int,
    nodes_per_prompt: int,
    max_age: int,
    seed: int,
    max_nodes: int | None = None,
) -> tuple[Forest, Tensor, Replay]:
    """Add a rollout to the buffer and take out what trains now.

    At most `nodes_per_prompt` nodes of each tree, and `max_nodes` in all, are drawn at random among
    those with an advantage (0: all of the new forest, and nothing is kept). Nodes born `max_age` or
    more versions before `version` are dropped. Returns the forest to train (its `trained` marks the
    drawn nodes), its advantages, and the new buffer.
    """
    if nodes_per_prompt == 0:
        return forest, advantages, Replay()
    if buffer.forest is not None:
        forest = concat([buffer.forest, forest])
        advantages = torch.cat([buffer.advantages, advantages])
    fresh = version - forest.born < max_age
    eligible = forest.trained & fresh & (advantages.abs() > ZERO_ADVANTAGE)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(forest.num_nodes, generator=generator)
    order = order[eligible[order]]
    order = order[forest.prompt[order].argsort(stable=True)]
    trees, counts = forest.prompt[order].unique_consecutive(return_counts=True)
    rank = torch.arange(order.numel()) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    order = order[rank < nodes_per_prompt]
    order = order[torch.randperm(order.numel(), generator=generator)[:max_nodes]]
    drawn = torch.zeros_like(forest.trained)
    drawn[order] = True
    rest = dataclasses.replace(forest, trained=eligible & ~drawn)
    kept = torch.zeros(len(forest.prompts), dtype=torch.bool)
    kept[forest.prompt[rest.trained].long()] = True
    nodes = kept[forest.prompt.long()]
    left = Replay(select(rest, kept), advantages[nodes]) if kept.any() else Replay()
    return dataclasses.replace(forest, trained=drawn), advantages, left


def concat(forests: Sequence[Forest]) -> Forest:
    """One forest of all trees, in order."""
    fields = {name: [getattr(f, name) for f in forests] for name in FOREST_TENSORS}
    nodes, tokens, trees = 0, 0, 0
    for i, f in enumerate(forests):
        fields["parent"][i] = torch.where(f.parent >= 0, f.parent + nodes, f.parent)
        fields["prompt"][i] = f.prompt + trees
        fields["cu_tokens"][i] = (f.cu_tokens + tokens)[0 if i == 0 else 1 :]
        nodes, tokens, trees = (
            nodes + f.num_nodes,
            tokens + f.token_ids.numel(),
            trees + len(f.prompts),
        )
    return Forest(
        **{name: torch.cat(parts) for name, parts in fields.items()},
        prompts=tuple(p for f in forests for p in f.prompts),
        temperature=forests[0].temperature,
    )


def select(forest: Forest, trees: Tensor) -> Forest:
    """The trees marked in `trees` (B,) bool."""
    nodes = trees[forest.prompt.long()]
    sizes = forest.cu_tokens.diff()
    tokens = nodes.repeat_interleave(sizes)
    place = nodes.cumsum(0).to(torch.int32) - 1
    parent = forest.parent[nodes]
    per_node = set(FOREST_TENSORS) - {"token_ids", "rollout_logprobs", "cu_tokens"}
    fields = {name: getattr(forest, name)[nodes] for name in per_node}
    fields["parent"] = torch.where(parent >= 0, place[parent.clamp(min=0).long()], parent)
    fields["prompt"] = (trees.cumsum(0).to(torch.int32) - 1)[forest.prompt[nodes].long()]
    return Forest(
        **fields,
        token_ids=forest.token_ids[tokens],
        rollout_logprobs=forest.rollout_logprobs[tokens],
        cu_tokens=torch.cat([torch.zeros(1, dtype=torch.int64), sizes[nodes].cumsum(0)]),
        prompts=tuple(p for p, keep in zip(forest.prompts, trees.tolist(), strict=True) if keep),
        temperature=forest.temperature,
    )
