"""Dynamic sampling, as in DAPO: trees of zero variance are replaced by those of other prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from spo.grow.curriculum import varies
from spo.grow.stats import RolloutStats
from spo.records import Forest, concat, select

Grown = tuple[Forest, list[RolloutStats]]
"""What all ranks have grown: one forest, and the cost on each rank."""


def join(gathered: Sequence[Any]) -> Grown | None:
    """What all ranks have grown, from what each has; None if one has nothing."""
    if None in gathered:
        return None
    forests, costs = zip(*gathered, strict=True)
    return concat(forests), list(costs)


def refill(
    first: Grown, more: Callable[[int], Grown | None], size: int, limit: int | None
) -> tuple[Forest, Grown, dict[str, int]]:
    """Grow waves of other prompts until `size` trees vary, and leave out what they replace.

    A wave has exactly as many prompts as trees are missing, and all its trees are awaited. So those
    that vary are the first `size` of the prompts' order, whichever end first.

    Args:
        first: the iteration's own trees. Prompts that were dropped or do not fit are missing.
        more: grows a wave of so many prompts on all ranks; None if no prompt is left.
        limit: no wave begins once the waves have generated this number of tokens; None replaces
            nothing, and there are no figures.

    Returns the forest of up to `size` trees (those that vary, then the first of the others, as far
    as places are left), all that was grown, and figures: `refilled`, the trees of the forest that
    come from the waves, and `refill_tokens`, the tokens that the waves generated.
    """
    if limit is None:
        return first[0], first, {}
    forests, costs = [first[0]], [*first[1]]
    missing, tokens = size - int(varies(first[0]).sum()), 0
    while missing and tokens < limit and (wave := more(missing)):
        forests.append(wave[0])
        costs += wave[1]
        missing -= int(varies(wave[0]).sum())
        generated = sum(cost.generated_tokens for cost in wave[1])
        tokens += generated
        if not generated:  # no prompt fits, which costs nothing and so might never end
            break
    grown = concat(forests)
    varied = varies(grown)
    others = ~varied & ((~varied).cumsum(0) <= missing)
    refilled = int((varied | others)[len(first[0].prompts) :].sum())
    forest = concat([select(grown, varied), select(grown, others)])
    return forest, (grown, costs), {"refilled": refilled, "refill_tokens": tokens}
