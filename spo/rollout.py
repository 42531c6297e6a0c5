"""Grow a forest: prompts + engine + shape -> Forest.

A child is asked for as soon as its parent's segment is finished; nothing waits for siblings, levels
or other prompts. Grading runs beside the engine. A tree is kept whole or dropped whole.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from spo.engines import Engine
from spo.records import LENGTH, STOP, Completion, Forest, Prompt, Request
from spo.shapes import Growth, Node, Shape, Tree
from spo.tasks.grading import Grader

BARRIERS = ("none", "group", "level")
MAX_INVALID_RATE = 0.5  # of the gradings of one rollout; above it the run stops


@dataclass
class RolloutStats:
    """What a rollout cost. Counters are the engine's own, over this rollout only."""

    seconds: float = 0.0
    trees: int = 0
    dropped_prompts: int = 0
    retried: int = 0
    truncated: int = 0
    invalid_gradings: int = 0
    gradings: int = 0
    engine: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class RolloutOptions:
    """How to sample.

    `truncated` says what a response cut by the token limit earns: "zero", "penalty" (-1) or "drop"
    (left out of its parent's value and of training). `barrier` exists for comparisons: "group"
    waits for a whole sibling group before branching, "level" for every running sample.
    """

    stop_token_ids: tuple[int, ...]
    temperature: float = 1.0
    seed: int = 0
    iteration: int = 0
    truncated: str = "zero"
    barrier: str = "none"
    max_retries: int = 1


class Rollout:
    """One pass over `prompts`; iterate over it to receive trees as they are completed.

    Args:
        decode: token ids of a response -> text, for grading only.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        engine: Engine,
        shape: Shape,
        grader: Grader,
        decode: Callable[[list[int]], str],
        options: RolloutOptions,
    ):
        if options.barrier not in BARRIERS:
            raise ValueError(f"barrier: expected one of {BARRIERS}, found {options.barrier!r}")
        if not prompts:
            raise ValueError("prompts: expected at least one, found none")
        longest = max(len(p.prompt_ids) for p in prompts)
        if longest + shape.max_new_tokens > engine.max_model_len:
            raise ValueError(
                f"prompt of {longest} tokens + max_new_tokens={shape.max_new_tokens} exceeds the "
                f"context of {engine.max_model_len}"
            )
        self.trees = [Tree(i, prompt) for i, prompt in enumerate(prompts)]
        self.engine, self.shape, self.grader = engine, shape, grader
        self.decode, self.options = decode, options
        self.stats = RolloutStats()
        self._open = [0] * len(prompts)  # samples and gradings a tree still waits for
        self._dropped: set[int] = set()
        self._flights: dict[int, tuple[Tree, Growth, int]] = {}  # key -> tree, group, first index
        self._left: dict[int, int] = {}  # key -> samples still to come
        self._held: dict[int, list[tuple[Tree, Growth]]] = {}
        self._retries: dict[tuple[int, tuple[int, ...], int], int] = {}
        self._next_key = 0
        self._leaves: list[tuple[Tree, int]] = []  # handed to the grader, by its key

    def __iter__(self) -> Iterator[Tree]:
        start, before = time.perf_counter(), self.engine.counters()
        for tree in self.trees:
            for growth in self.shape.start(tree):
                self._submit(tree, growth)
        finished: list[Tree] = []
        while self._flights or self.grader.pending:
            for completion in self.engine.poll():
                self._receive(completion, finished)
            for graded in self.grader.poll(timeout_s=0.0 if self._flights else 0.1):
                self._grade(graded, finished)
            while finished:
                yield finished.pop(0)
        after = self.engine.counters()
        self.stats.engine = {k: after[k] - before.get(k, 0) for k in after}
        self.stats.seconds = time.perf_counter() - start
        invalid, total = self.stats.invalid_gradings, self.stats.gradings
        if total and invalid / total > MAX_INVALID_RATE:
            raise RuntimeError(f"{invalid} of {total} gradings failed; see the grader's reasons")

    def _submit(self, tree: Tree, growth: Growth, index: int = 0, n: int | None = None) -> None:
        options = self.options
        n = growth.n if n is None else n
        key, self._next_key = self._next_key, self._next_key + 1
        prefix = (*tree.prompt.prompt_ids, *tree.response_ids(growth.parent))
        seed = path_seed(options.seed, options.iteration, tree.index, growth.path) + index
        self._flights[key] = (tree, growth, index)
        self._left[key] = n
        self._open[tree.index] += n
        priority = tree.index * (self.shape.max_level + 1) - growth.level  # depth first
        self.engine.submit(
            Request(
                key=key,
                prefix_ids=prefix,
                n=n,
                max_new_tokens=growth.max_new_tokens,
                stop_token_ids=options.stop_token_ids,
                seed=seed,
                temperature=options.temperature,
                priority=priority,
            )
        )

    def _receive(self, completion: Completion, finished: list[Tree]) -> None:
        key = completion.key
        tree, growth, first = self._flights[key]
        sample = replace(completion, index=first + completion.index)
        self._left[key] -= 1
        if sample.error is not None:
            self._retry(tree, growth, sample)
        elif tree.index not in self._dropped:
            known = len(tree.nodes)
            for child in self.shape.extend(tree, growth, sample):
                self._branch(key, tree, child)
            for node in range(known, len(tree.nodes)):
                self._reward(tree, node)
        if self._left[key] == 0:
            del self._flights[key], self._left[key]
        self._release(key)
        self._close_one(tree, finished)

    def _branch(self, key: int, tree: Tree, growth: Growth) -> None:
        if self.options.barrier == "none":
            self._submit(tree, growth)
            return
        self._open[tree.index] += growth.n  # the tree is not complete while it is held
        group = key if self.options.barrier == "group" else -1
        self._held.setdefault(group, []).append((tree, growth))

    def _release(self, key: int) -> None:
        if self.options.barrier == "group" and key not in self._flights:
            ready = self._held.pop(key, [])
        elif self.options.barrier == "level" and not self._flights:
            ready = self._held.pop(-1, [])
        else:
            return
        for tree, growth in ready:
            self._open[tree.index] -= growth.n
            self._submit(tree, growth)

    def _retry(self, tree: Tree, growth: Growth, sample: Completion) -> None:
        """Repeat a failed sample with its seed; after that its prompt is dropped and counted."""
        name = (tree.index, growth.path, sample.index)
        self._retries[name] = self._retries.get(name, 0) + 1
        if self._retries[name] <= self.options.max_retries:
            self.stats.retried += 1
            self._submit(tree, growth, index=sample.index, n=1)
        else:
            self._dropped.add(tree.index)

    def _reward(self, tree: Tree, index: int) -> None:
        """Reward a leaf, or hand it to the grader."""
        node = tree.nodes[index]
        if not is_leaf(node):
            return
        if node.finish == LENGTH:
            self.stats.truncated += 1
            node.reward = {"zero": 0.0, "penalty": -1.0, "drop": float("nan")}[
                self.options.truncated
            ]
            return
        text = self.decode(tree.response_ids(index))
        self.grader.submit(len(self._leaves), tree.prompt.task, text, tree.prompt.answer)
        self._leaves.append((tree, index))
        self._open[tree.index] += 1

    def _grade(self, graded, finished: list[Tree]) -> None:
        tree, node = self._leaves[graded.key]
        self.stats.gradings += 1
        if graded.reward is None:
            self.stats.invalid_gradings += 1
        else:
            tree.nodes[node].reward = graded.reward
        self._close_one(tree, finished)

    def _close_one(self, tree: Tree, finished: list[Tree]) -> None:
        self._open[tree.index] -= 1
        if self._open[tree.index]:
            return
        if tree.index not in self._dropped:
            leave_out_unrewarded(tree)
        if tree.index in self._dropped or not any(n.reward == n.reward for n in tree.nodes):
            self.stats.dropped_prompts += 1
            return
        self.stats.trees += 1
        finished.append(tree)


def grow(
    prompts: Sequence[Prompt],
    engine: Engine,
    shape: Shape,
    grader: Grader,
    decode: Callable[[list[int]], str],
    options: RolloutOptions,
) -> tuple[Forest, RolloutStats]:
    """Grow every prompt's tree. The forest's trees stand in the order of `prompts`.

    Raises ValueError if a prompt cannot fit the engine's context, RuntimeError if every tree was
    dropped or most gradings failed.
    """
    rollout = Rollout(prompts, engine, shape, grader, decode, options)
    trees = sorted(rollout, key=lambda tree: tree.index)
    if not trees:
        raise RuntimeError(f"all {len(prompts)} prompts were dropped: no sample of theirs survived")
    return assemble(trees, options.temperature), rollout.stats


def is_leaf(node: Node) -> bool:
    """Whether a node's response has ended, so that it earns a reward."""
    return node.finish in (STOP, LENGTH)


def leave_out_unrewarded(tree: Tree) -> None:
    """Take nodes without any reward below them out of values and training (never as zeros)."""
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


def assemble(trees: Sequence[Tree], temperature: float) -> Forest:
    """Flatten trees into one Forest."""
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
        rollout_logprobs=torch.tensor([x for n in nodes for x in n.logprobs]),
        cu_tokens=sizes.cumsum(0),
        parent=torch.tensor(parent, dtype=torch.int32),
        rewards=torch.tensor([n.reward for n in nodes], dtype=torch.float32),
        in_value=torch.tensor([n.in_value for n in nodes]),
        trained=torch.tensor([n.trained for n in nodes]),
        finish=torch.tensor([n.finish for n in nodes], dtype=torch.int8),
        weight=torch.tensor([n.weight for n in nodes], dtype=torch.int32),
        prompt=torch.tensor(
            [i for i, tree in enumerate(trees) for _ in tree.nodes], dtype=torch.int32
        ),
        born=torch.tensor([n.born for n in nodes], dtype=torch.int32),
        prompts=tuple(tree.prompt for tree in trees),
        temperature=temperature,
    )


def path_seed(seed: int, iteration: int, prompt: int, path: Sequence[int]) -> int:
    """A 62-bit seed that depends on the run, the iteration, the prompt and the path only."""
    words = np.array([seed, iteration, prompt, len(path), *path], dtype=np.int64)
    return int.from_bytes(hashlib.blake2b(words.tobytes(), digest_size=8).digest(), "big") >> 2
