"""`policy.lora`: adapters in place of the weights."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from spo.config.ranges import Count


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685): W + alpha / rank * B @ A, where A and B train."""

    rank: Count = 16
    """Rank of an adapter. It holds rank * (inputs + outputs) weights of its layer, in fp32."""
    alpha: Count = 32
    """The update is scaled by alpha / rank."""
    targets: str | tuple[str, ...] = "all-linear"
    """Names of layers, such as [q_proj, v_proj], or a regular expression that matches whole names;
    all-linear: all but the head."""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: hold the weights under the adapters in 4 bits (QLoRA, arXiv 2305.14314), by
    bitsandbytes. Its 8 bits are left out: they round a token's input by what its neighbours are."""

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            try:
                re.compile(self.targets)
            except re.error as error:
                raise ValueError(
                    f"policy.lora.targets: expected a regular expression, found {self.targets!r} "
                    f"({error})"
                ) from error
