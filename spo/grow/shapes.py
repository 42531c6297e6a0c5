"""Shapes: what to grow when a sample is finished. `star`, `tree` and `chain` serve every method.

A shape edits the tree it is given and answers with the sibling groups to sample next; it knows
nothing of engines, rewards or losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Protocol

import numpy as np
import torch

from spo.config.recipe import AdvantageConfig, ShapeConfig
from spo.grow.steps import line_ends, sentence_ends
from spo.records import LENGTH, PROMPT, SEGMENT, STOP, Completion, Prompt
from spo_kernels import cutpoint_segments


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
    index: int = 0  # place of its sample in the sibling group


@dataclass
class Tree:
    """A prompt's tree under construction; node 0 is the prompt."""

    index: int  # place of the prompt in its iteration
    prompt: Prompt
    shape: Shape | None = None  # what it grows into; a rollout's may change between prompts
    iteration: int = 0
    serial: int = 0  # place among all trees of a rollout
    open: int = 0  # samples and gradings it still waits for
    dropped: bool = False  # a sample of it failed for good
    nodes: list[Node] = field(default_factory=list)
    trajectories: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)  # of a chain

    def __post_init__(self):
        ids = self.prompt.prompt_ids
        self.nodes.append(Node(-1, ids, (0.0,) * len(ids), False, False, PROMPT, -1))

    def add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def sort(self) -> None:
        """Depth first, siblings in the order of sampling: that in which they ended favours short
        responses wherever the first of some are taken.
        """
        paths: list[tuple[int, ...]] = []
        for node in self.nodes:
            paths.append((*paths[node.parent], node.index) if node.parent >= 0 else ())
        order = sorted(range(len(paths)), key=paths.__getitem__)
        place = {old: new for new, old in enumerate(order)}
        self.nodes = [self.nodes[old] for old in order]
        for node in self.nodes:
            node.parent = place.get(node.parent, -1)

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
    path: tuple[int, ...]  # identifies the group within its tree; seeds are made of it
    level: int = 0
    probe: bool = False  # chains: a value estimate, not a trajectory to train


class Shape(Protocol):
    max_new_tokens: int  # longest response
    max_level: int  # deepest level of a growth

    def start(self, tree: Tree) -> list[Growth]:
        """Groups under the prompt."""

    def extend(self, tree: Tree, growth: Growth, sample: Completion) -> list[Growth]:
        """Add a finished sample of `growth` to `tree`; the groups to grow from it."""


@dataclass(frozen=True)
class TreeShape:
    """`widths[i]` children per node of level i; level i < last runs `segment_tokens[i]` tokens, the
    last to the end. An early stop is a leaf. A single width is a star.

    With `align` > 1, segments are moved to the nearest lengths at which a branch recomputes a
    single token in a prefix cache that shares full blocks of `align` tokens: every prefix then has
    1 modulo `align` tokens. The lengths of a forest's nodes record what was taken.
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
                "shape.segment_tokens: expected one length per level but the last, "
                f"{len(self.widths) - 1} for widths {self.widths}, found {self.segment_tokens}"
            )
        if any(m < 1 for m in self.segment_tokens):
            raise ValueError(f"shape.segment_tokens: must be positive, found {self.segment_tokens}")
        if self.align > 1 and any(m < self.align for m in self.segment_tokens):
            raise ValueError(
                f"shape.segment_tokens: {self.segment_tokens} cannot be aligned to cache blocks of "
                f"{self.align} tokens, which are longer; switch align_segments off"
            )
        longest = sum(self.segment_tokens) + self.align // 2 * len(self.segment_tokens)
        if longest >= self.max_new_tokens:
            raise ValueError(
                f"shape.segment_tokens: {longest} tokens before the last level "
                f"leave nothing of max_new_tokens={self.max_new_tokens}"
            )

    @property
    def max_level(self) -> int:
        return len(self.widths) - 1

    def segments(self, prompt_tokens: int) -> tuple[int, ...]:
        """Segment lengths under a prompt of that many tokens."""
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
        node = tree.add(_sampled(growth.parent, sample, finish, trained=True, in_value=True))
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


Partition = Callable[[np.ndarray, np.ndarray], list[int]]
"""(token_ids (L,), logprobs (L,)) -> segment starts, ascending, the first 0."""


def cutpoint_partition(prob_threshold: float, interval: int) -> Partition:
    """A boundary before every `interval`-th token whose probability is below the threshold."""

    def partition(token_ids: np.ndarray, logprobs: np.ndarray) -> list[int]:
        packed = torch.from_numpy(logprobs.astype(np.float32))
        cu_seqlens = torch.tensor([0, len(token_ids)])
        return cutpoint_segments(packed, cu_seqlens, prob_threshold, interval)[0][:-1].tolist()

    return partition


def fixed_partition(segment_tokens: int) -> Partition:
    """A boundary every `segment_tokens` tokens."""
    if segment_tokens < 1:
        raise ValueError(f"shape.segment_tokens: must be positive, found {segment_tokens}")
    return lambda token_ids, logprobs: list(range(0, len(token_ids), segment_tokens))


def step_partition(
    text_of: Callable[[int], str],  # a token's own part of the text
    ends: Callable[[str], list[int]],  # where steps of a text end
    max_steps: int = 25,
) -> Partition:
    """A boundary before the first token behind each end of a step, at most `max_steps` steps.
    Tokens past the last allowed boundary belong to the last step.
    """

    def partition(token_ids: np.ndarray, logprobs: np.ndarray) -> list[int]:
        pieces = [text_of(token) for token in token_ids.tolist()]
        starts = np.cumsum([0, *map(len, pieces)])[:-1]
        inner = np.unique(np.searchsorted(starts, ends("".join(pieces)))).tolist()
        return [0, *(start for start in inner if 0 < start < len(pieces))][:max_steps]

    return partition


@dataclass(frozen=True)
class ChainShape:
    """`group_size` trajectories per prompt, each cut by `partition`; `num_probes` completions from
    every inner boundary estimate its value (and from the prompt if `probe_prompt`).

    Trajectories that share a segment token for token share its node and its probes.
    `rescore(prefix_ids, token_ids)` replaces the sampler's logprobs with the trainer's.
    """

    group_size: int
    num_probes: int
    partition: Partition
    max_new_tokens: int
    probe_prompt: bool = False
    rescore: Callable[[list[int], list[int]], list[float]] | None = None
    max_level: int = 1

    def __post_init__(self):
        if self.group_size < 1 or self.num_probes < 1:
            raise ValueError(
                "shape.group_size and shape.num_probes must be positive, "
                f"found {self.group_size} and {self.num_probes}"
            )

    def start(self, tree: Tree) -> list[Growth]:
        trunk = Growth(0, self.group_size, self.max_new_tokens, ())
        probes = Growth(0, self.num_probes, self.max_new_tokens, (0,), 1, probe=True)
        return [trunk, probes] if self.probe_prompt else [trunk]

    def extend(self, tree: Tree, growth: Growth, sample: Completion) -> list[Growth]:
        if growth.probe:
            tree.add(_sampled(growth.parent, sample, sample.finish, trained=False, in_value=True))
            return []
        token_ids = np.array(sample.token_ids)
        logprobs = self._logprobs(tree, token_ids, sample)
        starts = self.partition(token_ids, logprobs)
        growths: list[Growth] = []
        parent = 0
        for start, end in zip(starts, [*starts[1:], len(token_ids)], strict=True):
            last = end == len(token_ids)
            piece = sample.token_ids[start:end]
            finish = sample.finish if last else SEGMENT
            node = _shared(tree, parent, piece, finish)
            if node is not None:
                tree.nodes[node].weight += 1
            else:
                node = tree.add(
                    Node(
                        parent,
                        piece,
                        logprobs[start:end].tolist(),
                        trained=True,
                        in_value=False,
                        finish=finish,
                        born=sample.first_version,
                        index=sample.index,
                    )
                )
                if not last:
                    room = self.max_new_tokens - end
                    path = (1, *sample.token_ids[:end])  # equal prefixes are one node, one seed
                    growths.append(Growth(node, self.num_probes, room, path, 1, probe=True))
            parent = node
        return growths

    def _logprobs(self, tree: Tree, token_ids: np.ndarray, sample: Completion) -> np.ndarray:
        """Logprobs of the trajectory; where it repeats an earlier one, that one's, so that equal
        prefixes are cut at equal places.
        """
        if self.rescore is not None:
            values = self.rescore(list(tree.prompt.prompt_ids), list(sample.token_ids))
            logprobs = np.array(values)
        else:
            logprobs = np.array(sample.logprobs)
        best, source = 0, None
        for earlier_ids, earlier_logprobs in tree.trajectories:
            size = min(len(earlier_ids), len(token_ids))
            same = earlier_ids[:size] == token_ids[:size]
            shared = size if same.all() else int(same.argmin())
            if shared > best:
                best, source = shared, earlier_logprobs
        if source is not None:
            logprobs[:best] = source[:best]
        tree.trajectories.append((token_ids, logprobs))
        return logprobs


def _sampled(parent: int, sample: Completion, finish: int, trained: bool, in_value: bool) -> Node:
    return Node(
        parent, sample.token_ids, sample.logprobs, trained, in_value, finish,
        born=sample.first_version, index=sample.index,
    )  # fmt: skip


def _shared(tree: Tree, parent: int, token_ids: Sequence[int], finish: int) -> int | None:
    """The trunk node under `parent` that holds exactly these tokens, if there is one."""
    for index, node in enumerate(tree.nodes):
        if node.parent == parent and node.trained and node.finish == finish:
            if tuple(node.token_ids) == tuple(token_ids):
                return index
    return None


def text_of(tokenizer) -> Callable[[int], str]:
    """What a token adds to a text; some tokenizers drop the space before the first word."""

    @cache
    def text_of(token: int) -> str:
        return tokenizer.decode([token, token])[len(tokenizer.decode([token])) :]

    return text_of


def make_shape(
    config: ShapeConfig,
    advantage: AdvantageConfig,
    max_new_tokens: int,
    tokenizer,
    rescore: Callable[[list[int], list[int]], list[float]],
    align: int = 1,
) -> Shape:
    """The shape that a recipe describes. Raises ValueError where its numbers contradict.

    `align` is the engine's block size where segments shall end at the edge of a block.
    """
    if config.kind == "star":
        return star(config.group_size, max_new_tokens)
    if config.kind == "tree":
        return TreeShape(config.widths, config.segment_tokens, max_new_tokens, align)
    if config.partition == "cutpoint":
        partition = cutpoint_partition(config.prob_threshold, config.interval)
    elif config.partition == "fixed":
        if len(config.segment_tokens) != 1:
            raise ValueError(
                "shape.segment_tokens: partition fixed takes one length, "
                f"found {config.segment_tokens}"
            )
        partition = fixed_partition(config.segment_tokens[0])
    else:
        ends = line_ends if config.partition == "steps" else sentence_ends
        partition = step_partition(text_of(tokenizer), ends, config.max_steps)
    return ChainShape(
        config.group_size,
        config.num_probes,
        partition,
        max_new_tokens,
        probe_prompt=advantage.root_value == "mc",
        rescore=rescore if config.rescore else None,
    )
