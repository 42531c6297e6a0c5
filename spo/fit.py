"""Whether a run's memory fits a card, and which settings would make it fit (`--dry-run`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

from spo.config.lora import LoraConfig
from spo.config.recipe import Recipe, check_recipe
from spo.learn.footprint import Footprint, footprint
from spo.learn.trace import trace

GIB = 1 << 30
RESERVE = 0.06  # share of a card for CUDA itself, and for gaps between tensors
SMALLEST = 1024  # tokens of a batch
CARDS = {  # GiB
    "a10": 24, "a100": 80, "b200": 180, "h100": 80, "h200": 141, "l4": 24, "l40s": 48,
    "rtx3090": 24, "rtx4090": 24, "rtx5090": 32,
}  # fmt: skip


def card_bytes(name: str) -> float:
    """Bytes of a card by its size in GB (as its maker counts them, GiB) or by its name.

    Raises ValueError with one sentence for another text.
    """
    try:
        size = float(CARDS.get(name.lower().replace(" ", "").replace("-", ""), name))
    except ValueError:
        size = 0.0
    if not 0 < size < 1e6:
        raise ValueError(
            f"--card: expected a size in GB such as 24, or one of {', '.join(CARDS)}, found {name}"
        )
    return size * GIB


def room(recipe: Recipe) -> float | None:
    """Bytes of the device that the recipe names: all of a GPU, what is free on a host; None: there
    is no such device."""
    import torch

    from spo.models.memory import free_bytes

    device = torch.device(recipe.policy.device)
    if device.type == "cpu":
        return free_bytes(device)
    return torch.cuda.mem_get_info(device)[1] if torch.cuda.is_available() else None


def memory_lines(
    recipe: Recipe, auto: Any, config: Any, *, vocabulary: int | None, card: float | None
) -> list[str]:
    """Parts, peak and advice. `card` is in bytes; None takes `room`.

    Raises ValueError with one sentence if the model's memory cannot be counted.
    """
    card = room(recipe) if card is None else card
    count = counter(auto, config, vocabulary, card)
    found = count(recipe)
    return [
        *(f"{size_of(size)}  {name}" for name, size in found.held.items()),
        *(f"{size_of(size)}  more in {name}" for name, size in found.stages.items() if size),
        f"{size_of(found.peak)}  at the peak, in {found.stage}",
        *([] if card is None else _advice(recipe, found, count, card)),
    ]


def counter(
    auto: Any, config: Any, vocabulary: int | None, card: float | None
) -> Callable[[Recipe], Footprint]:
    """`footprint` of recipes that train one policy; a batch that was counted is not again."""
    counts = cache(partial(trace, auto, config, vocabulary=vocabulary))
    return lambda recipe: footprint(recipe, config, counts, card=card)


def fits(found: Footprint, card: float) -> bool:
    """Whether a run's peak fits a card of so many bytes, with a reserve."""
    return found.peak <= (1 - RESERVE) * card


def size_of(count: float) -> str:
    """Bytes, in GiB or for a small model in MiB."""
    return f"{count / GIB:9.2f} GiB" if count >= GIB / 10 else f"{count / (1 << 20):9.2f} MiB"


def _advice(
    recipe: Recipe, found: Footprint, count: Callable[[Recipe], Footprint], card: float
) -> list[str]:
    size = f"{card / GIB:.3g} GiB, {RESERVE:.0%} of them in reserve"
    if fits(found, card):
        return [f"fits {size}"]
    lines = [f"does not fit {size}; one setting after the other, with the peak:"]
    for setting, change in _changes():
        while not fits(found, card) and (changed := change(recipe)) is not None:
            after = count(changed)
            if after.peak > 0.99 * found.peak:
                break
            recipe, found = changed, after
            lines.append(f"{size_of(found.peak)}  {setting(recipe)}")
    lines.append(
        "fits with these"
        if fits(found, card)
        else "does not fit with all of these: docs/memory.md says what is left"
    )
    return lines


Change = Callable[[Recipe], Recipe | None]


def _changes() -> Iterator[tuple[Callable[[Recipe], str], Change]]:
    """What is tried, in order: how a setting is written, and the recipe with it; None: that is set
    already, or does not go with the recipe."""

    def fixed(group: str, text: str, **values: Any) -> tuple[Callable[[Recipe], str], Change]:
        return lambda _: text, lambda recipe: _with(recipe, group, **values)

    yield fixed("engine", "engine.sleep_mode=true", sleep_mode=True)
    yield fixed("policy", "policy.gradient_checkpointing=true", gradient_checkpointing=True)
    yield fixed("policy", "policy.dtype=bfloat16", dtype="bfloat16")
    yield fixed("train", "train.optimizer=adamw_8bit", optimizer="adamw_8bit")
    yield (
        lambda _: "policy.lora={rank: 16}",
        lambda r: None if r.policy.lora else _with(r, "policy", lora=LoraConfig()),
    )
    yield (
        lambda _: "policy.lora.quantize=nf4",
        lambda r: r.policy.lora
        and _with(r, "policy", lora=dataclasses.replace(r.policy.lora, quantize="nf4")),
    )
    yield fixed("train", "train.offload=[optimizer]", offload=("optimizer",))
    yield (
        lambda r: f"train.tokens_per_batch={r.train.tokens_per_batch}",
        lambda r: (
            _with(r, "train", tokens_per_batch=r.train.tokens_per_batch // 2)
            if r.train.tokens_per_batch >= 2 * SMALLEST
            else None
        ),
    )


def _with(recipe: Recipe, group: str, **values: Any) -> Recipe | None:
    before = getattr(recipe, group)
    if all(getattr(before, key) == value for key, value in values.items()):
        return None
    try:
        changed = dataclasses.replace(recipe, **{group: dataclasses.replace(before, **values)})
        check_recipe(changed)
    except ValueError:  # it does not go with another setting
        return None
    return changed
