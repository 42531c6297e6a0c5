"""Model classes of transformers that vLLM in this process runs, kept apart from the trainer's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def build_apart(build: Callable[[Any], Any], settings: Any) -> Any:
    """The engine that `build` makes of its settings, with classes of its own for its model.

    vLLM's Transformers backend gives the model's class in transformers another `__init__` and
    `__call__` (0.32). The trainer's models of this class then fail, whether made before or after.
    """
    base: Any = importlib.import_module("vllm.model_executor.models.transformers.base")
    found: dict[type, tuple[tuple[type, ...], dict[str, Any]]] = {}
    decorate = base.support_torch_compile

    def remember(**options) -> Callable[[type], type]:
        def of_class(cls: type) -> type:
            found[cls] = (cls.__bases__, dict(vars(cls)))
            return decorate(**options)(cls)

        return of_class

    base.support_torch_compile = remember
    try:
        engine = build(settings)
    finally:
        base.support_torch_compile = decorate
        own = {cls: _restore(cls, *was) for cls, was in found.items()}

    def adopt(model: Any) -> None:
        for module in model.modules():
            if type(module) in own:
                module.__class__ = own[type(module)]

    if own:
        engine.apply_model(adopt)
    return engine


def _restore(cls: type, bases: tuple[type, ...], was: dict[str, Any]) -> type:
    """Make a class what it was; returns a subclass with what it had been given."""
    given = {name: x for name, x in vars(cls).items() if name not in was or was[name] is not x}
    more = tuple(base for base in cls.__bases__ if base not in bases)
    cls.__bases__ = bases
    for name in given:
        if name in was:
            setattr(cls, name, was[name])
        else:
            delattr(cls, name)
    return type(cls.__name__, (cls, *more), given)
