"""A recipe's engine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from spo.config.recipe import Recipe
from spo.engines.protocol import Engine

ENGINES = ("vllm", "hf")


def engine_of(recipe: Recipe) -> Engine:
    """The recipe's engine on the recipe's start policy."""
    require_device(recipe.policy.device)
    engine = recipe.engine
    card = {"memory_fraction": engine.memory_fraction, "sleep_mode": engine.sleep_mode}
    return make_engine(
        engine.name,
        recipe.policy.source,
        addresses=engine.addresses,
        dtype=getattr(torch, engine.dtype),
        device=recipe.policy.device,
        max_num_seqs=engine.max_num_seqs,
        max_model_len=engine.max_model_len,
        **(card if engine.name == "vllm" else {}),
    )


def require_device(name: str) -> None:
    """Raise ValueError unless PyTorch can compute on a device of that name here."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"policy.device: {name}, but PyTorch finds no CUDA device here")


def make_engine(name: str, model: str, *, addresses: Sequence[str] = (), **options) -> Engine:
    """Build the engine called `name` for the model folder `model`.

    With `addresses` it is the pool of the vLLM servers there. They bring their own model, device
    and memory; of `options` they take the dtype (checked) and limits below their own. Under
    torchrun every rank takes its share of them.
    Raises ValueError for an unknown name, a server that does not answer, or where vLLM is asked for
    and not installed.
    """
    if addresses:
        if name != "vllm":
            raise ValueError(f"engine.addresses: servers run vllm, found engine.name={name}")
        from spo.engines.pool import EnginePool
        from spo.engines.remote import RemoteEngine

        taken = ("dtype", "max_num_seqs", "max_model_len")
        limits: dict[str, Any] = {key: options.get(key) for key in taken}
        return EnginePool([RemoteEngine(address, **limits) for address in _share(addresses)])
    if name == "hf":
        from spo.engines.hf import HFEngine

        return HFEngine(model, **options)
    if name == "vllm":
        from spo.engines.vllm import VLLMEngine

        return VLLMEngine(model, **options)
    raise ValueError(f"engine.name: expected one of {', '.join(ENGINES)}, found {name!r}")


def _share(addresses: Sequence[str]) -> Sequence[str]:
    """This rank's servers: each is paused and loaded by one trainer process alone."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if len(addresses) < world:
        raise ValueError(
            f"engine.addresses: expected one per rank, {world} in all, found {len(addresses)}"
        )
    return addresses[rank::world]
