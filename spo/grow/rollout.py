"""Trees that grow on one engine.

A child is submitted as soon as its parent's segment has finished. Nothing waits for siblings,
levels or other prompts. Grading runs beside the engine. A tree is kept or dropped as a whole.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from textwrap import indent

import numpy as np

from spo.engines.protocol import Engine
from spo.grow.assemble import is_leaf, leave_out_unrewarded
from spo.grow.shapes import Growth, Shape, Tree
from spo.grow.stats import RolloutStats
from spo.records import LENGTH, Completion, Origin, Prompt, Request, Sampling
from spo.reward import FailedReward, is_right, printable
from spo.signatures import Response
from spo.tasks.grading import AGAIN, Graded, Grader

BARRIERS = ("none", "group", "level")
SHOWN = 500  # characters of a response that failed
TAB = " " * 4
REASONS = 3  # of failed gradings that an error shows
MAX_INVALID_RATE = 0.5  # share of failed gradings in a rollout; above it the run stops


@dataclass(frozen=True)
class RolloutOptions:
    """How to sample; `sampling.seed` is that of the run, from which each sample's is made.

    `truncated` says what a response cut by the token limit earns: "zero", "penalty" (-1), "drop"
    (it is left out of its parent's value and of training) or "reward" (as others). `read` turns a
    prompt, response ids and whether they were cut into what the recipe's reward is asked about;
    None asks the task. `success` is the reward from which a response counts as right, 1, the others
    as 0. `told` holds what the run has warned of already. `barrier` exists for comparisons:
    "group" branches only when a whole sibling group has ended, "level" when all samples have.
    """

    sampling: Sampling
    iteration: int = 0
    truncated: str = "zero"
    read: Callable[[Prompt, list[int], bool], Response] | None = None
    success: float | None = None
    barrier: str = "none"
    max_retries: int = 1
    origin: Origin | None = None  # of the forests
    told: set[str] = field(default_factory=set, compare=False)

    def is_news(self, what: str) -> bool:
        """Whether the run has not warned of this yet; from now on it has."""
        known = what in self.told
        self.told.add(what)
        return not known


class Rollout:
    """Trees that grow on one engine; prompts may be admitted while others run.

    Args:
        decode: token ids of a response -> its text, for the grader only.
    """

    def __init__(
        self,
        engine: Engine,
        shape: Shape,
        grader: Grader,
        decode: Callable[[list[int]], str],
        options: RolloutOptions,
    ):
        if options.barrier not in BARRIERS:
            raise ValueError(f"barrier: expected one of {BARRIERS}, found {options.barrier!r}")
        self.engine, self.shape, self.grader = engine, shape, grader
        self.decode, self.options = decode, options
        self.stats = RolloutStats()
        self._before = engine.counters()
        self._flights: dict[int, tuple[Tree, Growth, int]] = {}  # key -> tree, group, first index
        self._left: dict[int, int] = {}  # key -> samples not finished yet
        self._held: dict[int, list[tuple[Tree, Growth]]] = {}
        self._retries: dict[tuple[int, tuple[int, ...], int], int] = {}
        self._leaves: dict[int, tuple[Tree, int]] = {}  # being graded, by the grader's key
        self._keys, self._serials = count(), count()

    def admit(self, prompt: Prompt, index: int, iteration: int) -> Tree:
        """Start the tree of `prompt`, the one with this `index` in its iteration.

        If a response may not fit the context, the tree is `too_long` and nothing grows.
        """
        start = time.perf_counter()
        tree = Tree(index, prompt, self.shape, iteration, next(self._serials))
        if not self.fits(prompt):
            tree.dropped = tree.too_long = True
            if self.options.is_news(self.too_long):
                warnings.warn(f"prompts are left out: they are {self.too_long}", stacklevel=2)
            return tree
        for growth in self.shape.start(tree):
            self._submit(tree, growth)
        self.stats.seconds += time.perf_counter() - start
        return tree

    def fits(self, prompt: Prompt) -> bool:
        """Whether every response to `prompt` fits the context."""
        return len(prompt.prompt_ids) + self.shape.max_new_tokens <= self.engine.max_model_len

    @property
    def too_long(self) -> str:
        """What is wrong with a prompt that does not fit."""
        new, limit = self.shape.max_new_tokens, self.engine.max_model_len
        if new >= limit:
            return (
                f"too long: max_new_tokens={new} leaves no token for a prompt in the context of "
                f"{limit}; lower sampling.max_new_tokens or raise engine.max_model_len"
            )
        return (
            f"longer than {limit - new} tokens and exceed the context of {limit} with "
            f"max_new_tokens={new}; raise engine.max_model_len, or leave it to the model with null"
        )

    def step(self) -> list[Tree]:
        """Run one engine step and take the finished gradings.

        Returns the trees that are complete with them, dropped ones included.
        """
        start = time.perf_counter()
        finished: list[Tree] = []
        for completion in self.engine.poll():
            self._receive(completion, finished)
        waiting = time.perf_counter()
        for graded in self.grader.poll(timeout_s=0.0 if self._flights else 0.1):
            self._grade(graded, finished)
        end = time.perf_counter()
        self.stats.idle_seconds += 0.0 if self._flights else end - waiting
        self.stats.seconds += end - start
        return finished

    def settle(self) -> list[Tree]:
        """Wait for all gradings, so that others may use the grader; the trees that are complete."""
        start, finished = time.perf_counter(), []
        while self._leaves:
            for graded in self.grader.poll(timeout_s=0.1):
                self._grade(graded, finished)
        elapsed = time.perf_counter() - start
        self.stats.idle_seconds += elapsed
        self.stats.seconds += elapsed
        return finished

    def take_stats(self, earlier: Sequence[RolloutStats] = ()) -> RolloutStats:
        """The stats since the last call.

        Raises RuntimeError if too many gradings failed, of these and of the `earlier` ones.
        """
        stats, self.stats = self.stats, RolloutStats()
        before, self._before = self._before, self.engine.counters()
        stats.engine = {k: v - before.get(k, 0) for k, v in self._before.items()}
        every = [*earlier, stats]
        invalid, total = sum(s.invalid_gradings for s in every), sum(s.gradings for s in every)
        untried = sum(s.untried_gradings for s in every)  # a policy's fault, not the grader's
        if total and (invalid - untried) / total > MAX_INVALID_RATE:
            reasons = sum((s.invalid_reasons for s in every), Counter()).most_common(REASONS)
            shown = "; ".join(f"{number} × {reason}" for reason, number in reasons)
            raise RuntimeError(
                f"{invalid} of {total} gradings failed, more than {MAX_INVALID_RATE:.0%}: {shown}"
            )
        return stats

    def _submit(self, tree: Tree, growth: Growth, index: int = 0, n: int | None = None) -> None:
        options = self.options
        n = growth.n if n is None else n
        key = next(self._keys)
        prefix = (*tree.prompt.prompt_ids, *tree.response_ids(growth.parent))
        seed = path_seed(options.sampling.seed, tree.iteration, tree.index, growth.path) + index
        self._flights[key] = (tree, growth, index)
        self._left[key] = n
        fresh = growth.parent == 0 and tree.open == 0  # nobody has computed the prompt yet
        again = (len(prefix) - 1) % self.engine.block_size + 1
        self.stats.prefill_bound += n * again + fresh * (len(prefix) - again)
        tree.open += n
        assert tree.shape is not None  # `admit` has set it
        priority = tree.serial * (tree.shape.max_level + 1) - growth.level  # depth first
        self.engine.submit(
            Request(
                key=key,
                prefix_ids=prefix,
                n=n,
                max_new_tokens=growth.max_new_tokens,
                sampling=replace(options.sampling, seed=seed),
                priority=priority,
                prompt_size=len(tree.prompt.prompt_ids),
            )
        )

    def _receive(self, completion: Completion, finished: list[Tree]) -> None:
        key = completion.key
        tree, growth, first = self._flights[key]
        sample = replace(completion, index=first + completion.index)
        self._left[key] -= 1
        if sample.error is not None:
            self._retry(tree, growth, sample)
        elif not tree.dropped:
            known = len(tree.nodes)
            assert tree.shape is not None  # `admit` has set it
            for child in tree.shape.extend(tree, growth, sample):
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
        tree.open += growth.n  # the tree is not complete while it is held
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
            tree.open -= growth.n
            self._submit(tree, growth)

    def _retry(self, tree: Tree, growth: Growth, sample: Completion) -> None:
        """Repeat a failed sample with its seed; its prompt is dropped after `max_retries`."""
        name = (tree.serial, growth.path, sample.index)
        self._retries[name] = self._retries.get(name, 0) + 1
        if self._retries[name] <= self.options.max_retries:
            self.stats.retried += 1
            self._submit(tree, growth, index=sample.index, n=1)
        else:
            tree.dropped = True

    def _reward(self, tree: Tree, index: int) -> None:
        """Reward a leaf that was cut, or send a finished one to the grader."""
        node, options = tree.nodes[index], self.options
        if not is_leaf(node):
            return
        cut = node.finish == LENGTH
        self.stats.truncated += cut
        if cut and options.truncated != "reward":
            node.reward = {"zero": 0.0, "penalty": -1.0, "drop": float("nan")}[options.truncated]
            return
        ids, key = tree.response_ids(index), next(self._keys)
        if options.read is None:
            text = tree.prompt.opening + self.decode(ids)
            self.grader.submit(key, tree.prompt.task, text, tree.prompt.answer)
        else:
            self.grader.submit_reward(key, options.read(tree.prompt, ids, cut))
        self._leaves[key] = (tree, index)
        tree.open += 1

    def _grade(self, graded: Graded, finished: list[Tree]) -> None:
        tree, node = self._leaves.pop(graded.key)
        self.stats.gradings += 1
        if graded.reward is None:
            self.stats.invalid_gradings += 1
            self.stats.untried_gradings += graded.reason == AGAIN
            self.stats.invalid_reasons[(graded.reason or "unknown")[:SHOWN]] += 1
            self._show(graded, tree, node)
        elif self.options.success is not None:
            self.stats.judged.append(graded.reward)
            tree.nodes[node].reward = float(is_right(graded.reward, self.options.success))
        else:
            tree.nodes[node].reward = graded.reward
        for index, part in enumerate(graded.parts):
            if part is not None:
                sums = self.stats.parts.setdefault(index, [0.0, 0])
                self.stats.parts[index] = [sums[0] + part, sums[1] + 1]
        self._close_one(tree, finished)

    def _show(self, graded: Graded, tree: Tree, node: int) -> None:
        """Warn, once in a run for each kind of failure, of a response that has no reward."""
        kind = (graded.reason or "").partition(":")[0]
        if not self.options.is_news(kind):
            return
        response = self.decode(tree.response_ids(node))
        text = printable(response[:SHOWN]) + ("…" if len(response) > SHOWN else "")
        below = f"the response:\n{indent(text, TAB)}" if response else "the response is empty"
        sentence = f"a response has no reward: {graded.reason}"
        if graded.trace:
            sentence = f"a response has no reward, as its function failed: {graded.reason}"
        shown = indent("\n".join(filter(None, (graded.trace.rstrip("\n"), below))), TAB)
        warnings.warn(FailedReward(f"{sentence}\n{shown}"), stacklevel=2)

    def _close_one(self, tree: Tree, finished: list[Tree]) -> None:
        tree.open -= 1
        if tree.open:
            return
        if not tree.dropped:
            tree.sort()
            leave_out_unrewarded(tree)
            tree.dropped = not any(n.reward == n.reward for n in tree.nodes)
        if tree.dropped:
            self.stats.dropped_prompts += 1
        else:
            self.stats.trees += 1
        finished.append(tree)


def path_seed(seed: int, iteration: int, prompt: int, path: Sequence[int]) -> int:
    """A 62-bit seed that depends only on the run, the iteration, the prompt and the path."""
    words = np.array([seed, iteration, prompt, len(path), *path], dtype=np.int64)
    return int.from_bytes(hashlib.blake2b(words.tobytes(), digest_size=8).digest(), "big") >> 2
