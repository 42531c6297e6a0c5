"""Settings that ask whether the rewards of a prompt's responses differ."""

from __future__ import annotations

from collections.abc import Sequence

from spo.config.data import DataConfig
from spo.config.train import TrainConfig


def check_variance(
    shape: str, graded: int, compare: Sequence[str], data: DataConfig, train: TrainConfig
) -> None:
    """Raise ValueError if `graded`, the number of a prompt's responses, is 1 and they are compared,
    or if prompts are in flight before it is known which ones are wanted.

    Args:
        compare: what compares responses, besides the settings of `data` and `train`.
    """
    choices = {"train.refill": train.refill, "data.difficulty": data.difficulty}
    chosen = [name for name, value in choices.items() if value is not None]
    if graded == 1 and (names := [*compare, *chosen]):
        raise ValueError(
            f"{shape}: expected several responses to a prompt with {names[0]}, which compares "
            "them, found one"
        )
    if chosen and train.stream_depth:
        raise ValueError(
            f"{chosen[0]}: expected train.stream_depth=0, as a stream's prompts are in flight "
            f"before the rewards choose among them, found {train.stream_depth}"
        )
