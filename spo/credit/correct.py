"""Only right responses train: RestEM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from spo.config.credit import Models, Rule
from spo.config.ranges import PositiveInt
from spo.config.shape import ShapeConfig
from spo.credit.nodes import figures, of_tokens, rank_in_group, responses
from spo.credit.values import Values
from spo.records import Credit, Forest


@dataclass(frozen=True)
class Correct(Rule):
    """1 on the tokens of each prompt's first `max_correct` right responses, in sampling order.

    With `train.restart` it is RestEM.
    """

    loss: ClassVar[str] = "likelihood"

    max_correct: PositiveInt = 4
    """Maximum number of right responses per prompt that train."""

    def check(self, shape: ShapeConfig) -> None:
        shape.require_whole_responses("credit.type=correct")

    def assign(self, forest: Forest, models: Models | None = None) -> Credit:
        right, _ = responses(forest)
        kept = torch.zeros(forest.num_nodes)
        kept[right[rank_in_group(forest.prompt[right]) < self.max_correct]] = 1.0
        reported = figures(forest, Values().values(forest), kept[forest.trained])
        return Credit(of_tokens(forest, kept), reported)
