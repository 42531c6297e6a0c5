"""Shapes: what to grow when a sample has finished. Stars and trees; chains are in chain.py.

A shape adds a sample to its tree and returns the sibling groups to sample next. It knows nothing of
engines, rewards or losses. A recipe names its kind, a dataclass of settings that makes the shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import numpy as np

from spo.config.ranges import Count, PositiveInt
from spo.config.shape import Cost, Growing, ShapeConfig
from spo.records import LENGTH, PROMPT, SEGMENT, STOP, Completion, Prompt


@dataclass
class Node:
    """One segment while its tree grows; the fields are those of `Forest`."""

    parent: int
    token_ids: Sequence[int]
    logprobs: Sequence[float]
    trained: bool
    in_value: bool
    finish: int
    born: int
    reward: float = float("nan")
    weight: int = 1
    index: int = 0  # of its sample in the sibling group


@dataclass
class Tree:
    """A prompt's tree under construction; node 0 is the prompt."""

    index: int  # of the prompt in its iteration
    prompt: Prompt
    shape: Shape | None = None  # the rollout's shape when the prompt was admitted
    iteration: int = 0
    serial: int = 0  # index among all trees of a rollout
    open: int = 0  # samples and gradings it still waits for
    dropped: bool = False  # a sample failed in every retry
    too_long: bool = False  # a response may not fit the context, so nothing grows
    nodes: list[Node] = field(default_factory=list)
    trajectories: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # chains only

    def __post_init__(self):
        ids = self.prompt.prompt_ids
        self.nodes.append(Node(-1, ids, (0.0,) * len(ids), False, False, PROMPT, -1))

    def add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def sort(self) -> None:
        """Sort the nodes depth first, siblings in the order of sampling.

        In the order in which they ended, short responses come first, so a rule that takes the
        first few would favour them.
        """
        paths: list[tuple[int, ...]] = []
        for node in self.nodes:
            paths.append((*paths[node.parent], node.index) if node.parent >= 0 else ())
        order = sorted(range(len(paths)), key=paths.__getitem__)
        index = {old: new for new, old in enumerate(order)}
        self.nodes = [self.nodes[old] for old in order]
        for node in self.nodes:
            node.parent = index.get(node.parent, -1)

    def response_ids(self, node: int) -> list[int]:
        """Token ids from the end of the prompt to the end of `node`."""
        pieces = []
        while node > 0:
            pieces.append(self.nodes[node].token_ids)
            node = self.nodes[node].parent
        return [t for piece in reversed(pieces) for t in piece]


@dataclass(frozen=True)
class Growth:
    """A sibling group to sample under `parent`."""

    parent: int
    n: int
    max_new_tokens: int
    path: tuple[int, ...]  # identifies the group within its tree; seeds are derived from it
    level: int = 0
    probe: bool = False  # chains: a value estimate, not a trajectory to train


class Shape(Protocol):
    """What grows under a prompt."""

    @property
    def max_new_tokens(self) -> int:
        """Maximum length of a response, in tokens."""
        ...

    @property
    def max_level(self) -> int:
        """Deepest level of a growth."""
        ...

    def start(self, tree: Tree) -> list[Growth]:
        """The sibling groups under the prompt."""
        ...

    def extend(self, tree: Tree, growth: Growth, sample: Completion) -> list[Growth]:
        """Add a finished sample of `growth` to `tree`; returns the groups to grow from it."""
        ...


@dataclass(frozen=True)
class TreeShape:
    """`widths[i]` children per node of level i; a single width is a star.

    Segments of level i have `segment_tokens[i]` tokens; those of the last level run to the end of
    the response. A segment that stops early is a leaf.

    `align` > 1 is the block size of a prefix cache that shares full blocks. Each segment's length
    is then changed to the nearest one at which a branch recomputes a single token: every prefix has
    1 modulo `align` tokens.
    """

    widths: tuple[int, ...]
    segment_tokens: tuple[int, ...]
    max_new_tokens: int
    align: int = 1

    def __post_init__(self):
        if not self.widths or min(self.widths) < 1:
            raise ValueError(f"shape.widths: expected positive integers, found {self.widths}")
        if len(self.segment_tokens) != len(self.widths) - 1:
            raise ValueError(
                "shape.segment_tokens: expected one length per level except the last, "
                f"{len(self.widths) - 1} for widths {self.widths}, found {self.segment_tokens}"
            )
        if any(m < 1 for m in self.segment_tokens):
            raise ValueError(
                f"shape.segment_tokens: expected positive numbers, found {self.segment_tokens}"
            )
        if self.align > 1 and any(m < self.align for m in self.segment_tokens):
            raise ValueError(
                "shape.segment_tokens: engine.align_segments expected at least a cache block of "
                f"{self.align} tokens, found {self.segment_tokens}"
            )
        longest = sum(self.segment_tokens) + self.align // 2 * len(self.segment_tokens)
        if longest >= self.max_new_tokens:
            raise ValueError(
                "shape.segment_tokens: expected fewer tokens before the last level than "
                f"max_new_tokens={self.max_new_tokens}, found {longest}"
            )

    @property
    def max_level(self) -> int:
        return len(self.widths) - 1

    def segments(self, prompt_tokens: int) -> tuple[int, ...]:
        """Segment lengths under a prompt of `prompt_tokens` tokens."""
        lengths, prefix = [], prompt_tokens
        for size in self.segment_tokens:
            shift = (1 - prefix - size) % self.align
            size += shift - (self.align if shift > self.align // 2 else 0)
            lengths.append(size)
            prefix += size
        return tuple(lengths)

    def start(self, tree: Tree) -> list[Growth]:
        return [self._group(tree, 0, 0, ())]

    def extend(self, tree: Tree, growth: Growth, sample: Completion) -> list[Growth]:
        ended = sample.finish == STOP
        last = growth.level == self.max_level
        finish = STOP if ended else LENGTH if last else SEGMENT
        node = tree.add(sampled(growth.parent, sample, finish, trained=True, in_value=True))
        if ended or last:
            return []
        return [self._group(tree, node, growth.level + 1, (*growth.path, sample.index))]

    def _group(self, tree: Tree, parent: int, level: int, path: tuple[int, ...]) -> Growth:
        lengths = self.segments(len(tree.prompt.prompt_ids))
        if level == self.max_level:
            tokens = self.max_new_tokens - sum(lengths)
        else:
            tokens = lengths[level]
        return Growth(parent, self.widths[level], tokens, path, level)


def star(group_size: int, max_new_tokens: int) -> TreeShape:
    """`group_size` independent trajectories per prompt: GRPO, RLOO, PPO, RestEM, DPO."""
    return TreeShape((group_size,), (), max_new_tokens)


@dataclass(frozen=True)
class StarConfig(ShapeConfig):
    """Independent responses to each prompt: GRPO, RLOO, PPO, RestEM, DPO."""

    whole_responses: ClassVar[bool] = True

    group_size: Count = 8
    """Responses per prompt."""

    def make(self, growing: Growing) -> Shape:
        return star(self.group_size, growing.max_new_tokens)

    def cost(self, max_new_tokens: int) -> Cost:
        return Cost(self.group_size * max_new_tokens, self.group_size)


@dataclass(frozen=True)
class TreeConfig(ShapeConfig):
    """Branches at fixed lengths: SPO-tree."""

    widths: tuple[Count, ...] = (6, 6, 6)
    """Children per node, level by level."""
    segment_tokens: tuple[PositiveInt, ...] = (30, 30)
    """Length of the segments of every level except the last."""

    def make(self, growing: Growing) -> Shape:
        return TreeShape(self.widths, self.segment_tokens, growing.max_new_tokens, growing.align)

    def cost(self, max_new_tokens: int) -> Cost:
        TreeShape(self.widths, self.segment_tokens, max_new_tokens)  # checks them
        nodes, tokens = 1, 0
        lengths = [*self.segment_tokens, max_new_tokens - sum(self.segment_tokens)]
        for width, length in zip(self.widths, lengths, strict=True):
            nodes *= width
            tokens += nodes * length
        return Cost(tokens, nodes)


def sampled(parent: int, sample: Completion, finish: int, trained: bool, in_value: bool) -> Node:
    """The node of one sample."""
    return Node(
        parent, sample.token_ids, sample.logprobs, trained, in_value, finish,
        born=sample.first_version, index=sample.index,
    )  # fmt: skip
