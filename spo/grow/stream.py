"""Prompts to forests: one forest per iteration; prompts of later ones may be in flight already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

from spo.engines.protocol import Engine
from spo.grow.assemble import assemble
from spo.grow.rollout import Rollout, RolloutOptions, RolloutStats
from spo.grow.shapes import Shape, Tree
from spo.records import Forest, Prompt
from spo.tasks.grading import Grader


class Stream:
    """Forests of `size` prompts each, one per iteration; iterate over it to receive them.

    With `depth` > 0 the prompts of the next `depth` iterations are admitted, one by one, whenever
    the engine has a free slot while the last leaves of this iteration run. When the caller loads
    new weights, they go on with these, so tokens of a forest are up to `depth` versions old; the
    stats hold their ages. An iteration still consists of its own prompts: taking whatever ends
    first would favour short responses. A resumed run grows the trees that were in flight again,
    with the weights of its checkpoint.
    """

    def __init__(self, prompts: Iterable[Prompt], size: int, rollout: Rollout, depth: int = 0):
        if size < 1 or depth < 0:
            raise ValueError(f"expected size >= 1 and stream_depth >= 0, found {size} and {depth}")
        self.rollout, self.size, self.depth = rollout, size, depth
        self.iteration = rollout.options.iteration
        self._prompts = iter(prompts)
        self._admitted: dict[int, list[Tree]] = {}  # iteration -> its trees
        self._next = self.iteration  # the iteration that admits the next prompt
        self._ended: set[int] = set()  # serials

    def __iter__(self) -> Iterator[tuple[Forest, RolloutStats]]:
        return self

    def trees(self) -> Iterator[Tree]:
        """The trees of this iteration, each as soon as it is complete; without dropped ones."""
        while self._next <= self.iteration and self._admit():
            pass
        missing = {tree.serial: tree for tree in self._admitted.get(self.iteration, ())}
        while missing:
            for serial in sorted(missing.keys() & self._ended):
                tree = missing.pop(serial)
                if not tree.dropped:
                    yield tree
            if not missing:
                break
            while (
                self.rollout.engine.room > 0
                and self._next <= self.iteration + self.depth
                and self._admit()
            ):
                pass
            self._ended |= {tree.serial for tree in self.rollout.step()}

    def __next__(self) -> tuple[Forest, RolloutStats]:
        """The next iteration's forest, with trees in the order of the prompts, and its stats.

        A forest has no tree if every prompt was dropped. Raises StopIteration if no prompt is left.
        """
        trees = sorted(self.trees(), key=lambda tree: tree.index)
        self._ended |= {tree.serial for tree in self.rollout.settle()}
        admitted = self._admitted.pop(self.iteration, [])
        if not admitted:
            raise StopIteration
        self._ended -= {tree.serial for tree in admitted}
        self.iteration += 1
        self._next = max(self._next, self.iteration)
        stats = self.rollout.take_stats()
        stats.trees, stats.too_long = len(trees), sum(tree.too_long for tree in admitted)
        stats.dropped_prompts = len(admitted) - stats.trees - stats.too_long
        dropped = [node for tree in admitted if tree.dropped for node in tree.nodes[1:]]
        stats.dropped_tokens = sum(len(node.token_ids) for node in dropped)
        version = self.rollout.engine.version
        ages = [(version - n.born, len(n.token_ids)) for t in trees for n in t.nodes[1:]]
        if ages:
            stats.max_age = max(age for age, _ in ages)
            stats.mean_age = sum(age * size for age, size in ages) / sum(size for _, size in ages)
        options = self.rollout.options
        return assemble(trees, options.sampling.temperature, options.origin), stats

    def _admit(self) -> bool:
        """Start the next prompt; False if there is none."""
        prompt = next(self._prompts, None)
        if prompt is None:
            return False
        trees = self._admitted.setdefault(self._next, [])
        tree = self.rollout.admit(prompt, len(trees), self._next)
        trees.append(tree)
        if tree.open == 0:  # nothing grows
            self._ended.add(tree.serial)
        self._next += len(trees) == self.size
        return True


def grow(
    prompts: Sequence[Prompt],
    engine: Engine,
    shape: Shape,
    grader: Grader,
    decode: Callable[[list[int]], str],
    options: RolloutOptions,
) -> tuple[Forest, RolloutStats]:
    """Grow a tree for every prompt; the forest's trees are in the order of `prompts`.

    Prompts that do not fit the engine's context are left out. Raises ValueError if none fits,
    RuntimeError if every tree was dropped or more than half the gradings failed.
    """
    if not prompts:
        raise ValueError("prompts: expected at least one, found none")
    rollout = Rollout(engine, shape, grader, decode, options)
    fitting = require_fitting(prompts, rollout, len(prompts))
    forest, stats = next(Stream(fitting, len(prompts), rollout))
    if not forest.prompts:
        raise RuntimeError(
            f"all {stats.dropped_prompts} prompts were dropped: no response of theirs has a reward"
        )
    return forest, stats


def require_fitting(prompts: Iterable[Prompt], rollout: Rollout, most: int) -> Iterator[Prompt]:
    """The same prompts. Raises ValueError if none of the first `most` fits the context."""
    prompts, first = iter(prompts), []
    for prompt in islice(prompts, most):
        first.append(prompt)
        if rollout.fits(prompt):
            break
    else:
        if first:
            raise ValueError(f"all of the first {len(first)} prompts are {rollout.too_long}")
    return chain(first, prompts)
