"""Prompts to forests: one forest per iteration; prompts of later ones may be in flight already."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice

from spo.engines.protocol import Engine
from spo.grow.assemble import assemble
from spo.grow.rollout import Rollout, RolloutOptions
from spo.grow.shapes import Shape, Tree
from spo.grow.stats import RolloutStats
from spo.records import Forest, Prompt
from spo.tasks.grading import Grader


class Stream:
    """This rank's trees of `size` prompts per iteration; iterate over it to receive the forests.

    Of every `size` prompts of the order, over all ranks, this rank grows prompts[rank::world]. With
    `depth` > 0 the prompts of the next `depth` iterations are admitted, one by one, whenever the
    engine has a free slot while the last leaves of this iteration run. When the caller loads
    new weights, they go on with these, so tokens of a forest are up to `depth` versions old; the
    stats hold their ages. An iteration still consists of its own prompts: taking whatever ends
    first would favour short responses. A resumed run grows the trees that were in flight again,
    with the weights of its checkpoint.
    """

    def __init__(
        self,
        prompts: Iterable[Prompt],  # of all ranks, in their order
        size: int,
        rollout: Rollout,
        depth: int = 0,
        rank: int = 0,
        world: int = 1,
    ):
        if size < world or depth < 0:
            raise ValueError(
                f"expected size >= {world} and stream_depth >= 0, found {size} and {depth}"
            )
        self.rollout, self.depth = rollout, depth
        self.iteration = rollout.options.iteration
        self._order, self._share = iter(prompts), slice(rank, None, world)
        self._size = len(range(size)[self._share])  # trees per iteration
        self._prompts = self._dealt(size)
        self._admitted: dict[int, list[Tree]] = {}  # iteration -> its trees
        self._next = self.iteration  # the iteration that admits the next prompt
        self._ended: set[int] = set()  # serials
        self._waves: list[RolloutStats] = []  # of the iteration that was returned last

    def __iter__(self) -> Iterator[tuple[Forest, RolloutStats]]:
        return self

    def trees(self) -> Iterator[Tree]:
        """The trees of this iteration, each as soon as it is complete; without dropped ones."""
        while self._next <= self.iteration and self._admit():
            pass
        yield from self._complete(
            self._admitted.get(self.iteration, ()), self.iteration + self.depth
        )

    def __next__(self) -> tuple[Forest, RolloutStats]:
        """The next iteration's forest, with trees in the order of the prompts, and its stats.

        A forest has no tree if every prompt was dropped. Raises StopIteration if no prompt is left.
        """
        for _ in self.trees():
            pass
        admitted = self._admitted.pop(self.iteration, [])
        if not admitted:
            raise StopIteration
        self.iteration += 1
        self._next = max(self._next, self.iteration)
        self._waves = []
        return self._take(admitted)

    def more(self, count: int) -> tuple[Forest, RolloutStats] | None:
        """This rank's trees of `count` more prompts, as `next` would give them, perhaps of none.

        They belong to the iteration that was returned last: their seeds go on from its trees. None
        if no prompt is left. All ranks must ask for as many.
        """
        wave = list(islice(self._order, count))
        if not wave:
            return None
        before = sum(stats.prompts for stats in self._waves)
        mine = enumerate(wave[self._share], before)
        trees = [self._start(prompt, index, self.iteration - 1) for index, prompt in mine]
        for _ in self._complete(trees, self.iteration - 1):
            pass
        return self._take(trees)

    def _dealt(self, size: int) -> Iterator[Prompt]:
        """This rank's prompts, `size` of the order at a time."""
        while wave := list(islice(self._order, size)):
            yield from wave[self._share]

    def _admit(self) -> bool:
        """Start the next prompt; False if there is none."""
        prompt = next(self._prompts, None)
        if prompt is None:
            return False
        trees = self._admitted.setdefault(self._next, [])
        trees.append(self._start(prompt, len(trees), self._next))
        self._next += len(trees) == self._size
        return True

    def _start(self, prompt: Prompt, index: int, iteration: int) -> Tree:
        tree = self.rollout.admit(prompt, index, iteration)
        if tree.open == 0:  # nothing grows
            self._ended.add(tree.serial)
        return tree

    def _complete(self, trees: Sequence[Tree], last: int) -> Iterator[Tree]:
        """Each of the trees as soon as it is complete; without dropped ones.

        Meanwhile prompts of iterations up to `last` are admitted into free slots.
        """
        missing = {tree.serial: tree for tree in trees}
        while missing:
            for serial in sorted(missing.keys() & self._ended):
                tree = missing.pop(serial)
                if not tree.dropped:
                    yield tree
            if not missing:
                break
            while self.rollout.engine.room > 0 and self._next <= last and self._admit():
                pass
            self._ended |= {tree.serial for tree in self.rollout.step()}

    def _take(self, admitted: Sequence[Tree]) -> tuple[Forest, RolloutStats]:
        """The forest of these complete trees, without dropped ones, and the stats since the last.

        Raises RuntimeError if too many gradings of the iteration failed.
        """
        self._ended |= {tree.serial for tree in self.rollout.settle()}
        self._ended -= {tree.serial for tree in admitted}
        trees = [tree for tree in admitted if not tree.dropped]
        stats = self.rollout.take_stats(self._waves)
        self._waves.append(stats)
        stats.trees, stats.too_long = len(trees), sum(tree.too_long for tree in admitted)
        stats.dropped_prompts = len(admitted) - stats.trees - stats.too_long
        stats.generated_tokens = sum(len(n.token_ids) for t in admitted for n in t.nodes[1:])
        version = self.rollout.engine.version
        ages = [(version - n.born, len(n.token_ids)) for t in trees for n in t.nodes[1:]]
        if ages:
            stats.max_age = max(age for age, _ in ages)
            stats.mean_age = sum(age * size for age, size in ages) / sum(size for _, size in ages)
        options = self.rollout.options
        return assemble(trees, options.sampling.temperature, options.origin), stats


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
