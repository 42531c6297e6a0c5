"""Makes the engine of a recipe."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from spo.config.recipe import Recipe
from spo.engines.protocol import Engine

ENGINES = ("vllm", "hf")


def engine_of(recipe: Recipe) -> Engine:
    """The recipe's engine with the weights of its start policy."""
    require_device(recipe.policy.device)
    engine = recipe.engine
    own: dict[str, Any] = {
        "response_len": recipe.sampling.max_new_tokens,
        "sleep_mode": engine.sleep_mode,
        "trust_remote_code": recipe.policy.trust_remote_code,
    }
    if engine.name == "vllm":
        own = {"memory_fraction": engine.memory_fraction, "sleep_mode": engine.sleep_mode}
        own["options"] = engine.options
    return make_engine(
        engine.name,
        recipe.policy.source,
        addresses=engine.addresses,
        dtype=getattr(torch, engine.dtype),
        device=recipe.policy.device,
        max_num_seqs=engine.max_num_seqs,
        max_model_len=engine.max_model_len,
        **own,
    )


def require_device(name: str) -> None:
    """Raise ValueError unless PyTorch can use the device `name` on this machine."""
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"policy.device: expected a device that is here, found {name}: there is no CUDA device"
        )


def make_engine(name: str, model: str, *, addresses: Sequence[str] = (), **options) -> Engine:
    """Make the engine `name` for the model folder `model`.

    With `addresses` it is a pool of the vLLM servers there, which have their own model, device and
    memory; the tokenizer of `model` finds stop texts in what they sample. Of `options` they use the
    dtype, which is checked, and limits below their own. Under torchrun every rank takes its share
    of the servers.

    Raises ValueError for an unknown name, a server that does not answer, or if vLLM is asked for
    but not installed.
    """
    if addresses:
        if name != "vllm":
            raise ValueError(f"engine.addresses: expected engine.name=vllm, found {name}")
        from spo.engines.pool import EnginePool
        from spo.engines.remote import RemoteEngine

        taken = ("dtype", "max_num_seqs", "max_model_len")
        limits: dict[str, Any] = {key: options.get(key) for key in taken}
        share = _share(addresses)
        return EnginePool([RemoteEngine(address, model=model, **limits) for address in share])
    if name == "hf":
        from spo.engines.hf import HFEngine

        return HFEngine(model, **options)
    if name == "vllm":
        from spo.engines.vllm import VLLMEngine

        return VLLMEngine(model, **options)
    raise ValueError(f"engine.name: expected one of {', '.join(ENGINES)}, found {name!r}")


def _share(addresses: Sequence[str]) -> Sequence[str]:
    """This rank's servers: only one trainer process pauses and updates a server."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if len(addresses) < world:
        raise ValueError(
            f"engine.addresses: expected one per rank, {world} in all, found {len(addresses)}"
        )
    return addresses[rank::world]
