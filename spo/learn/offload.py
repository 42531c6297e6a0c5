"""Weights that wait in the host's memory until they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def park(model: torch.nn.Module) -> None:
    """Move a model's parameters from a GPU to pinned memory of the host."""
    for p in model.parameters():
        p.data = p.data.cpu().pin_memory()


@contextmanager
def on_device(model: torch.nn.Module, device: str) -> Iterator[None]:
    """Let a parked model's parameters be copies on `device`; those that are there stay.

    The copies are dropped afterwards: nothing may write to them.
    """
    kind = torch.device(device).type
    parked = [(p, p.data) for p in model.parameters() if p.device.type != kind]
    for p, home in parked:
        p.data = home.to(device, non_blocking=True)
    try:
        yield
    finally:
        for p, home in parked:
            p.data = home
