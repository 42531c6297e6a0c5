"""AdamW over weights in bfloat16, with moments of 8 bits, or with its state on the host.

A step is always made in fp32. What is kept of it between two steps, per weight:

    policy.dtype   train.master_weights   weight   moments   low bits   with adamw_8bit
    float32        fp32                   4        8         0          6.03 in place of 12
    bfloat16       fp32                   2        8         2          6.03 in place of 12
    bfloat16       stochastic, none       2        4         0          4.03 in place of 6

in bytes, without the gradients, which have the type of the weights.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from spo.config.recipe import Recipe
from spo.extras import missing

BLOCK = 256  # moments that share a scale
SMALLEST = 4096  # weights of a tensor whose moments have 8 bits, as in bitsandbytes
UPPER = -(1 << 16)  # mask of the bits of an fp32 number that a bf16 number has


def make_optimizer(
    model: torch.nn.Module, recipe: Recipe, learning_rate: float
) -> torch.optim.AdamW:
    """The optimiser of a policy or a critic, as `train` describes it.

    Raises ImportError with one sentence if adamw_8bit lacks its package.
    """
    train = recipe.train
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "weight_decay": train.weight_decay,
        "betas": (0.9, 0.95),
    }
    eight_bit, offload = train.optimizer == "adamw_8bit", "optimizer" in train.offload
    short = recipe.policy.dtype == "bfloat16"
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not (eight_bit or offload or short):
        return torch.optim.AdamW(trained, **settings)
    return MixedPrecisionAdamW(
        trained,
        master_weights=train.master_weights,
        eight_bit=eight_bit,
        offload=offload,
        seed=train.seed,
        **settings,
    )


def state_bytes(recipe: Recipe) -> float:
    """Bytes of the optimiser's state per weight."""
    short = recipe.policy.dtype == "bfloat16"
    masters = recipe.train.master_weights == "fp32"
    moment = 2 if short and not masters else 4
    if recipe.train.optimizer == "adamw_8bit":
        moment = 1 + 4 / BLOCK
    return 2 * moment + (2 if short and masters else 0)


class MixedPrecisionAdamW(torch.optim.AdamW):
    """PyTorch's AdamW in fp32, one tensor at a time, over weights and moments of fewer bits.

    Its state is that of AdamW and, with fp32 masters over bf16 weights, `low_bits`: the bits of a
    master that its weight does not have. So the weight is the master, rounded to nearest, and both
    together cost what fp32 weights cost.

    Args:
        master_weights: see `TrainConfig.master_weights`; weights in fp32 are their own masters.
        eight_bit: keep the moments of large tensors as codes of 8 bits, with a scale per block.
        offload: keep the state of weights on a GPU in the host's pinned memory.
        seed: of stochastic rounding, which depends on nothing else but the step and the tensor.
    """

    def __init__(
        self,
        params: Any,
        *,
        master_weights: str = "fp32",
        eight_bit: bool = False,
        offload: bool = False,
        seed: int = 0,
        **settings: Any,
    ):
        super().__init__(params, **settings)
        self.master_weights, self.offload, self.seed = master_weights, offload, seed
        self.eight_bit = eight_bit
        if eight_bit:
            try:
                import bitsandbytes  # noqa: F401
            except ImportError as error:
                raise ImportError(missing(error) or str(error), name=error.name) from error

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of every weight that has a gradient."""
        index = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p] = self._fresh(p)
                    self._update(p, group, index)
                index += 1
        if self.offload and torch.cuda.is_available():
            torch.cuda.synchronize()  # the state has arrived when someone reads it

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a state, also one of `torch.optim.AdamW`, in the types that this one keeps."""
        super().load_state_dict(state_dict | {"state": {}})  # it casts all to the weights' type
        params = [p for group in self.param_groups for p in group["params"]]
        for index, saved in state_dict["state"].items():
            held = self.state[params[index]] = self._fresh(params[index])
            for key, value in saved.items():
                held[key].copy_(value)

    def _fresh(self, p: Tensor) -> dict[str, Tensor]:
        """The state before the first step."""
        masters = self.master_weights == "fp32"
        device = "cpu" if self.offload else p.device
        pinned = self.offload and p.is_cuda

        def zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
            contiguous: Any = {"memory_format": torch.contiguous_format}  # as blocks are
            tensor = torch.zeros_like(like, dtype=dtype, device=device, **contiguous)
            return tensor.pin_memory() if pinned else tensor

        state = {"step": torch.tensor(0.0)}
        for key in ("exp_avg", "exp_avg_sq"):
            if self.eight_bit and p.numel() >= SMALLEST:
                state[key] = zeros(p, torch.uint8)
                blocks = p.new_empty(-(-p.numel() // BLOCK))
                state[f"{key}_scale"] = zeros(blocks, torch.float32)
            else:
                state[key] = zeros(p, torch.float32 if masters else p.dtype)
        if masters and p.dtype == torch.bfloat16:
            # 16-bit integers, in a type that gloo and NCCL carry
            state["low_bits"] = zeros(p, torch.bfloat16)
        return state

    def _update(self, p: Tensor, group: dict[str, Any], index: int) -> None:
        """AdamW's step of one tensor, or of this rank's shard of it."""
        assert p.grad is not None
        weight, held = _local(p), {key: _local(x) for key, x in self.state[p].items()}
        state = {  # on the device of the weight
            key: x if key == "step" else x.to(weight.device, non_blocking=True)
            for key, x in held.items()
        }
        master = _join(weight, state.get("low_bits"))
        moments = {key: _load(state, key) for key in ("exp_avg", "exp_avg_sq")}
        adamw(
            [master],
            [_local(p.grad).float()],
            [moments["exp_avg"]],
            [moments["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for key, moment in moments.items():
            _store(state, key, moment)
        if master is not weight:
            noise = self._noise(master, int(state["step"]), index)
            bits = master.view(torch.int32)
            rounded = (bits + noise) & UPPER
            weight.copy_(rounded.view(torch.float32))
            if "low_bits" in state:
                state["low_bits"].view(torch.int16).copy_(bits - rounded)
        for key, x in held.items():
            if x is not state[key]:
                x.copy_(state[key], non_blocking=True)

    def _noise(self, master: Tensor, step: int, index: int) -> Tensor | int:
        """What is added to the masters before their low bits are cut off."""
        if self.master_weights != "stochastic":
            return 1 << 15  # to nearest; ties go up, so that the remainder fits into 16 bits
        number = (self.seed * 1_000_003 + step) * 1_000_003 + index
        generator = torch.Generator(master.device).manual_seed(number)
        options: dict[str, Any] = {"dtype": torch.int32, "device": master.device}
        return torch.randint(1 << 16, master.shape, generator=generator, **options)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _join(weight: Tensor, low_bits: Tensor | None) -> Tensor:
    """The weights in fp32, with the bits that the optimiser keeps of them; fp32 as they are."""
    master = weight.float()
    if low_bits is not None:
        master.view(torch.int32).add_(low_bits.view(torch.int16))
    return master


def _load(state: dict[str, Tensor], key: str) -> Tensor:
    """A moment in fp32; the state's own tensor if it is that."""
    kept = state[key]
    if kept.dtype != torch.uint8:
        return kept.float()
    from bitsandbytes.functional import dequantize_blockwise

    options: dict[str, Any] = {"absmax": state[f"{key}_scale"], "blocksize": BLOCK}
    return dequantize_blockwise(kept, code=_code(key == "exp_avg", kept.device), **options)


def _store(state: dict[str, Tensor], key: str, moment: Tensor) -> None:
    """Keep a moment in the state's type."""
    kept = state[key]
    if kept.dtype != torch.uint8:
        if kept is not moment:
            kept.copy_(moment)
        return
    from bitsandbytes.functional import quantize_blockwise

    options: dict[str, Any] = {"absmax": state[f"{key}_scale"], "blocksize": BLOCK, "out": kept}
    quantize_blockwise(moment, code=_code(key == "exp_avg", kept.device), **options)


@cache
def _code(signed: bool, device: torch.device) -> Tensor:
    """(256,) fp32, the numbers that 8 bits stand for; more of them near 0 (arXiv:2110.02861)."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=signed).to(device)
