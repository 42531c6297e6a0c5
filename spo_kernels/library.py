"""Registration of the ops with PyTorch: schema, kernel, fake and autograd under `spo_kernels::`.

`torch.library.custom_op` would do the same, but it wraps every kernel: the first call imports the
compiler stack, which takes seconds, and every call takes some tens of microseconds more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

LIBRARY = torch.library.Library("spo_kernels", "DEF")


class Op:
    """An op that `define` registered; calling it goes through PyTorch's dispatcher."""

    def __init__(self, schema: str, kernel: Callable[..., Any]):
        self.kernel = kernel
        name = schema.partition("(")[0]
        LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
        self.qualified_name = f"spo_kernels::{name}"
        self.overload = getattr(torch.ops.spo_kernels, name).default

    def __call__(self, *arguments: Any) -> Any:
        return self.overload(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes and dtypes of the results, for torch.compile."""
        return torch.library.register_fake(self.qualified_name, function, lib=LIBRARY)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None]
    ) -> None:
        """As `torch.library.register_autograd`."""
        torch.library.register_autograd(
            self.qualified_name, backward, setup_context=setup_context, lib=LIBRARY
        )


def define(schema: str) -> Callable[[Callable[..., Any]], Op]:
    """Register the decorated function as the op `spo_kernels::<schema>` on every device."""
    return lambda kernel: Op(schema, kernel)
