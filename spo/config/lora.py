"""`policy.lora`: adapters in place of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spo.config.ranges import Count

if TYPE_CHECKING:
    from spo.config.train import TrainConfig


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


def check_lora(lora: LoraConfig | None, train: TrainConfig) -> None:
    """Raise ValueError for settings that do not go with adapters."""
    if lora is None:
        return
    if train.parallel == "fsdp":
        raise ValueError(
            "train.parallel: expected ddp with policy.lora, whose weights do not train and so need "
            "no shards of gradients or optimiser, found fsdp"
        )
    if "reference" in train.offload:
        raise ValueError(
            "train.offload: expected no reference with policy.lora, whose reference is the policy "
            "itself without its adapters"
        )
    if train.reference_every:
        raise ValueError(
            "train.reference_every: expected 0 with policy.lora, whose reference is the model "
            f"without its adapters, found {train.reference_every}"
        )
