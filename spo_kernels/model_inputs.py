"""Which keywords a causal model of transformers takes: its forwards swallow any other."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from typing import Any

import torch

from spo_kernels.head_weight import unwrapped

# TypedDicts of what models pass on to their layers, by module; releases differ in what they have.
PASSED_ON = {
    "transformers.utils": "TransformersKwargs",
    "transformers.modeling_flash_attention_utils": "FlashAttentionKwargs",
}


def check_inputs(
    caller: str,
    model: Any,  # a causal model, wrapped or not
    names: Iterable[str],  # the keywords that its body is to be called with
) -> None:
    """Raise TypeError for a keyword that the body's forward neither names nor passes on.

    A forward that names no parameters at all tells nothing, and passes. So does a model without a
    body, and any call while torch.compile traces it.
    """
    if torch.compiler.is_compiling():
        return
    body = unwrapped(getattr(unwrapped(model), "base_model", None))
    if body is None:
        return
    parameters = inspect.signature(body.forward).parameters.values()
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    if not known:
        return
    for module, kind in PASSED_ON.items():
        typed = getattr(sys.modules.get(module), kind, None)
        known |= set(getattr(typed, "__annotations__", {}))
    unknown = sorted(set(names) - known - {"return_dict"})  # transformers' decorators take it
    if unknown:
        raise TypeError(
            f"{caller}: expected inputs of {type(body).__name__} or options of its own, "
            f"found {', '.join(unknown)}"
        )
