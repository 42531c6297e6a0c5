"""A ladder: one trunk in segments, responses that leave it at every rung. A shape from outside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from spo import ShapeConfig
from spo.config.shape import Cost, Growing
from spo.grow.shapes import Growth, Tree, sampled
from spo.records import LENGTH, SEGMENT, STOP, Completion


@dataclass(frozen=True)
class Ladder(ShapeConfig):
    """`rungs` segments of `step` tokens, and `width` responses from the start of each."""

    rungs: Annotated[int, Ge(1)] = 2
    step: Annotated[int, Ge(1)] = 8
    width: Annotated[int, Ge(1)] = 2

    def make(self, growing: Growing) -> LadderShape:
        return LadderShape(self, growing.max_new_tokens)

    def cost(self, max_new_tokens: int) -> Cost:
        if self.rungs * self.step >= max_new_tokens:
            raise ValueError(f"shape: {self.rungs} rungs of {self.step} tokens leave nothing")
        starts = [rung * self.step for rung in range(self.rungs + 1)]
        responses = sum(self.width * (max_new_tokens - start) for start in starts)
        return Cost(self.rungs * self.step + responses, self.width * len(starts))


@dataclass(frozen=True)
class LadderShape:
    config: Ladder
    max_new_tokens: int

    @property
    def max_level(self) -> int:
        return self.config.rungs

    def start(self, tree: Tree) -> list[Growth]:
        return self._rung(0, 0)

    def extend(self, tree: Tree, growth: Growth, sample: Completion) -> list[Growth]:
        trunk = growth.path[-1] == 0
        ended = sample.finish == STOP
        finish = STOP if ended else SEGMENT if trunk else LENGTH
        node = tree.add(sampled(growth.parent, sample, finish, trained=True, in_value=True))
        return self._rung(node, growth.level + 1) if trunk and not ended else []

    def _rung(self, node: int, level: int) -> list[Growth]:
        left = self.max_new_tokens - level * self.config.step
        grown = [Growth(node, self.config.width, left, (level, 1), level)]
        if level < self.config.rungs:
            grown.append(Growth(node, 1, self.config.step, (level, 0), level))
        return grown
