"""Trees that run through a given stretch of a response: how a method judges that stretch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import torch

from spo.credit.values import Values
from spo.engines.protocol import Engine
from spo.grow.assemble import assemble, is_leaf
from spo.grow.rollout import path_seed
from spo.grow.shapes import Growth, Shape, Tree
from spo.models.tokenizer import response_text
from spo.records import LENGTH, STOP, Completion, Prompt, Request, Sampling
from spo.tasks import get_task


@dataclass(frozen=True)
class Target:
    """Tokens start:end of a response to a prompt."""

    prompt: Prompt
    response: Completion
    start: int
    end: int


@dataclass(frozen=True)
class Estimates:
    """What a method said of one target, again and again, and what that took."""

    advantages: np.ndarray  # (E,)
    generated: float  # tokens per tree, probes and all
    trained: float  # tokens per tree that get an advantage


class Sampler:
    """The policy on its engine at temperature 1, and the task's grader, in this process."""

    def __init__(self, engine: Engine, tokenizer, max_new_tokens: int):
        self.engine, self.tokenizer, self.max_new_tokens = engine, tokenizer, max_new_tokens
        self.stop = (tokenizer.eos_token_id,)
        self.generated = 0
        self._keys = count()
        self._verdicts: dict[tuple[Prompt, str], float] = {}

    def submit(self, prefix: Sequence[int], n: int, room: int, seed: int) -> int:
        key = next(self._keys)
        depth_first = -len(prefix)  # while the prefix is in the cache
        self.engine.submit(
            Request(
                key,
                tuple(prefix),
                n,
                room,
                Sampling(seed, stop_token_ids=self.stop),
                priority=depth_first,
            )
        )
        return key

    def poll(self) -> list[Completion]:
        done = self.engine.poll()
        self.generated += sum(len(sample.token_ids) for sample in done)
        return done

    def samples(self, prompt: Prompt, begin: Sequence[int], n: int, seed: int) -> list[Completion]:
        """`n` continuations of a response that begins with the tokens `begin`."""
        self.submit((*prompt.prompt_ids, *begin), n, self.max_new_tokens - len(begin), seed)
        done: list[Completion] = []
        while len(done) < n:
            done += self.poll()
        return sorted(done, key=lambda sample: sample.index)

    def reward(self, prompt: Prompt, response_ids: Sequence[int], finish: int) -> float:
        if finish == LENGTH:
            return 0.0
        text = response_text(self.tokenizer, response_ids, self.stop)
        key = (prompt.prompt_ids, text)
        if key not in self._verdicts:
            self._verdicts[key] = float(get_task(prompt.task).grade(text, prompt.answer))
        return self._verdicts[key]

    def value(self, target: Target, end: int, probes: int, seed: int) -> tuple[float, float]:
        """V of the state before token `end` of the response, and the variance of that figure."""
        ids = target.response.token_ids[:end]
        if end == len(target.response.token_ids):
            return self.reward(target.prompt, ids, target.response.finish), 0.0
        rewards = [
            self.reward(target.prompt, (*ids, *sample.token_ids), sample.finish)
            for sample in self.samples(target.prompt, ids, probes, seed)
        ]
        mean = sum(rewards) / probes
        return mean, mean * (1 - mean) / probes


@dataclass(frozen=True)
class _Flight:
    """A request under way: samples first, first + 1, … of a sibling group."""

    tree: Tree
    growth: Growth
    first: int
    given: Completion | None = None  # tokens that its only sample begins with


class _Grower:
    """Grows a tree for each target, all at once; the first response of each is given up to the end
    of its target.
    """

    def __init__(self, sampler: Sampler, shape: Shape, targets: Sequence[Target], seed: int):
        self.sampler, self.shape, self.targets, self.seed = sampler, shape, targets, seed
        self.trees = [Tree(index, target.prompt) for index, target in enumerate(targets)]
        self.generated = [0] * len(targets)
        self.holders: dict[int, int] = {}  # tree -> node that holds the target's first token
        self._flights: dict[int, _Flight] = {}
        self._left: dict[int, int] = {}

    def grow(self) -> None:
        for tree in self.trees:
            for growth in self.shape.start(tree):
                self._launch(tree, growth)
        while self._flights:
            for sample in self.sampler.poll():
                flight = self._flights[sample.key]
                self._left[sample.key] -= 1
                if self._left[sample.key] == 0:
                    del self._flights[sample.key], self._left[sample.key]
                self._receive(flight, sample)

    def _launch(self, tree: Tree, growth: Growth) -> None:
        target, response = self.targets[tree.index], tree.response_ids(growth.parent)
        seed = path_seed(self.seed, 0, tree.index, growth.path)
        on_way = not growth.probe and not any(growth.path) and len(response) < target.end
        if growth.n > on_way:
            others = _Flight(tree, growth, int(on_way))
            self._fly(others, response, growth.n - on_way, growth.max_new_tokens, seed + on_way)
        if not on_way:
            return
        span = slice(len(response), min(target.end, len(response) + growth.max_new_tokens))
        ids = target.response.token_ids[span]
        finish = STOP if ids[-1] in self.sampler.stop else LENGTH
        given = Completion(-1, 0, ids, target.response.logprobs[span], finish, 0, 0)
        room = growth.max_new_tokens - len(ids)
        if room and finish != STOP:
            self._fly(_Flight(tree, growth, 0, given), [*response, *ids], 1, room, seed)
        else:
            self._receive(_Flight(tree, growth, 0), given)

    def _fly(self, flight: _Flight, response: list[int], n: int, room: int, seed: int) -> None:
        prefix = (*flight.tree.prompt.prompt_ids, *response)
        key = self.sampler.submit(prefix, n, room, seed)
        self._flights[key], self._left[key] = flight, n

    def _receive(self, flight: _Flight, sample: Completion) -> None:
        tree, growth, given = flight.tree, flight.growth, flight.given
        if given is not None:
            sample = replace(
                sample,
                token_ids=given.token_ids + sample.token_ids,
                logprobs=given.logprobs + sample.logprobs,
            )
        sample = replace(sample, index=flight.first + sample.index)
        self.generated[tree.index] += len(sample.token_ids)
        known = len(tree.nodes)
        children = self.shape.extend(tree, growth, sample)
        for index in range(known, len(tree.nodes)):
            node = tree.nodes[index]
            if is_leaf(node):
                ids = tree.response_ids(index)
                node.reward = self.sampler.reward(tree.prompt, ids, node.finish)
        if sample.index == 0 and not growth.probe and not any(growth.path):
            self._note_holder(tree, growth.parent, sample.token_ids)
        for child in children:
            self._launch(tree, child)

    def _note_holder(self, tree: Tree, parent: int, token_ids: Sequence[int]) -> None:
        """If the sample has the target's first token, the node that has it: `token_ids` end at the
        newest trained node with that path, its holder is that node or above.
        """
        start, before = self.targets[tree.index].start, tree.response_ids(parent)
        if not len(before) <= start < len(before) + len(token_ids):
            return
        whole = [*before, *token_ids]
        ends = [i for i, n in enumerate(tree.nodes) if n.trained and tree.response_ids(i) == whole]
        node = ends[-1]
        while len(tree.response_ids(tree.nodes[node].parent)) > start:
            node = tree.nodes[node].parent
        self.holders[tree.index] = node


def estimate(
    sampler: Sampler,
    shape: Shape,
    rules: Sequence[Values],
    targets: Sequence[Target],
    repeats: int,
    seed: int,
) -> list[list[Estimates]]:
    """What each target gets from `repeats` independent trees through it, by each of the rules."""
    grower = _Grower(sampler, shape, [t for t in targets for _ in range(repeats)], seed)
    grower.grow()
    forest = assemble(grower.trees, 1.0)
    first = np.cumsum([0] + [len(tree.nodes) for tree in grower.trees[:-1]])
    nodes = [int(offset) + grower.holders[i] for i, offset in enumerate(first)]
    sizes = torch.where(forest.trained, forest.cu_tokens.diff() * forest.weight, 0)
    trained = torch.zeros(len(first), dtype=torch.int64).index_add_(0, forest.prompt, sizes)
    generated = torch.tensor(grower.generated)

    def per_target(figures: torch.Tensor) -> np.ndarray:
        return figures.double().numpy().reshape(len(targets), repeats)

    costs = [per_target(counts).mean(1) for counts in (generated, trained)]
    found = []
    for rule in rules:
        advantages = per_target(rule.advantages(forest, rule.values(forest))[nodes])
        found.append([Estimates(*row) for row in zip(advantages, *costs, strict=True)])
    return found
