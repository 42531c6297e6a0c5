"""SPO: a thin trainer for Segment Policy Optimization and its relatives, built on spo_kernels.

    import spo
    spo.train("spo-tree", ["engine.name=hf"])

Names are loaded at their first use, so importing this package is fast.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from spo.extras import missing

if TYPE_CHECKING:
    from spo.api import evaluate, rollout, train
    from spo.config.credit import Rule
    from spo.config.recipe import Recipe, load_recipe
    from spo.config.shape import ShapeConfig
    from spo.forest import Forest
    from spo.records import Credit
    from spo.run import Run

__all__ = [
    "Credit",
    "Forest",
    "Recipe",
    "Rule",
    "Run",
    "ShapeConfig",
    "evaluate",
    "load_recipe",
    "rollout",
    "train",
]

__version__ = "0.1.0"

# Where it is installed, transformers imports it, and it misses a package that nothing here needs.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_MODULES = {
    "Credit": "spo.records",
    "Forest": "spo.forest",
    "Recipe": "spo.config.recipe",
    "Rule": "spo.config.credit",
    "Run": "spo.run",
    "ShapeConfig": "spo.config.shape",
    "evaluate": "spo.api",
    "load_recipe": "spo.config.recipe",
    "rollout": "spo.api",
    "train": "spo.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'spo' has no attribute {name!r}")
    try:
        return getattr(import_module(_MODULES[name]), name)
    except ImportError as error:
        if sentence := missing(error):
            raise ImportError(f"spo.{name}: {sentence}", name=error.name) from error
        raise


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
