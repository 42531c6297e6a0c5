"""Turns finished trees into a Forest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from spo.grow.shapes import Node, Tree
from spo.records import LENGTH, STOP, Forest, Origin


def is_leaf(node: Node) -> bool:
    """Whether a node's response has ended, so that it earns a reward."""
    return node.finish in (STOP, LENGTH)


def leave_out_unrewarded(tree: Tree) -> None:
    """Leave nodes without any reward below them out of values and training (never as zeros)."""
    valued = [node.reward == node.reward for node in tree.nodes]
    for index in range(len(tree.nodes) - 1, 0, -1):
        node = tree.nodes[index]
        if valued[index]:
            if node.in_value:
                valued[node.parent] = True
        else:
            node.in_value = node.trained = False
    for node in tree.nodes[1:]:
        if node.parent and not valued[node.parent]:  # a segment whose start has no value
            node.trained = False


def assemble(trees: Sequence[Tree], temperature: float, origin: Origin | None = None) -> Forest:
    """Flatten trees, if any, into one Forest."""
    nodes = [node for tree in trees for node in tree.nodes]
    offsets = np.cumsum([0] + [len(tree.nodes) for tree in trees])
    parent = [
        node.parent + int(offset) if node.parent >= 0 else -1
        for tree, offset in zip(trees, offsets, strict=False)
        for node in tree.nodes
    ]
    sizes = torch.tensor([0] + [len(node.token_ids) for node in nodes])
    return Forest(
        token_ids=torch.tensor([t for n in nodes for t in n.token_ids], dtype=torch.int32),
        rollout_logprobs=torch.tensor([x for n in nodes for x in n.logprobs], dtype=torch.float32),
        cu_tokens=sizes.cumsum(0),
        parent=torch.tensor(parent, dtype=torch.int32),
        rewards=torch.tensor([n.reward for n in nodes], dtype=torch.float32),
        in_value=torch.tensor([n.in_value for n in nodes], dtype=torch.bool),
        trained=torch.tensor([n.trained for n in nodes], dtype=torch.bool),
        finish=torch.tensor([n.finish for n in nodes], dtype=torch.int8),
        weight=torch.tensor([n.weight for n in nodes], dtype=torch.int32),
        prompt=torch.tensor(
            [i for i, tree in enumerate(trees) for _ in tree.nodes], dtype=torch.int32
        ),
        born=torch.tensor([n.born for n in nodes], dtype=torch.int32),
        prompts=tuple(tree.prompt for tree in trees),
        temperature=temperature,
        origin=origin,
    )
