"""Per-token arguments of the loss and logprob ops: checks, flattening, conversion to one dtype.

The public functions take any leading shape (...); the kernels take N contiguous rows.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch._subclasses.fake_tensor import FakeTensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # position = value of `Dtype` in csrc/ops.h


def math_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that a reference computes in: fp64 for fp64 tensors, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_tensors(**tensors: object) -> None:
    """Raise TypeError for a value that is not a tensor."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, found {type(tensor).__name__}")


def check_optional_tensors(**tensors: object) -> None:
    """Raise TypeError for a value that is neither a tensor nor None."""
    check_tensors(**{name: tensor for name, tensor in tensors.items() if tensor is not None})


def check_floating(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless the tensor has a floating-point dtype that the ops support."""
    check_tensors(**{name: tensor})
    if tensor.dtype not in (*DTYPES, torch.float64):
        raise TypeError(
            f"{name}: expected float32, bfloat16, float16 or float64, found {tensor.dtype}"
        )
    if tensor.ndim == 0:
        raise ValueError(f"{name}: expected at least one dimension, found a single number")


def flat_ids(name: str, ids: Tensor, shape: Sequence[int]) -> Tensor:
    """Token ids as (N,)."""
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected int32 or int64, found {ids.dtype}")
    _check_shape(name, ids, shape)
    return ids.reshape(-1).contiguous().resolve_neg()


def flat_floats(name: str, values: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Per-token numbers of exactly the tokens' shape, detached, as (N,)."""
    _check_real(name, values)
    _check_shape(name, values, shape)
    return values.detach().reshape(-1).to(dtype).contiguous().resolve_neg()


def broadcast_floats(name: str, values: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """As `flat_floats`, but broadcast first; (B,) against (B, L) means one value per sequence."""
    _check_real(name, values)
    values = values.detach().resolve_neg()
    if values.shape == shape:
        return values.reshape(-1).to(dtype).contiguous()
    if values.ndim == 1 and len(shape) > 1:
        if values.shape[0] != shape[0]:
            raise ValueError(
                f"{name}: expected one value for each of the {shape[0]} sequences of token_ids "
                f"{tuple(shape)}, found shape {tuple(values.shape)}"
            )
        values = values.reshape(-1, *[1] * (len(shape) - 1))
    if values.ndim > len(shape) or any(
        size not in (1, want) for size, want in zip(values.shape[::-1], shape[::-1], strict=False)
    ):
        raise ValueError(
            f"{name}: expected a shape that broadcasts to that of token_ids {tuple(shape)}, "
            f"found {tuple(values.shape)}"
        )
    return values.expand(shape).reshape(-1).to(dtype).contiguous()


def flat_mask(name: str, mask: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """A mask as (N,) bool or integers, not 0 = trained; None trains all."""
    if mask is None:
        return None
    check_mask(name, mask)
    _check_shape(name, mask, shape)
    return mask.detach().reshape(-1).contiguous()


def check_mask(name: str, mask: Tensor) -> None:
    """Raise TypeError unless the mask holds bool or integers.

    Floats would be cut to 0 and 1: NaN too, and fractions that are meant as weights.
    """
    check_tensors(**{name: mask})
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"{name}: expected bool or integers, found {mask.dtype}; use `{name} != 0` as the "
            "mask, and give numbers that multiply a token's loss as `weights`"
        )


def flat_temperature(
    temperature: float | Tensor, shape: Sequence[int], dtype: torch.dtype
) -> Tensor | None:
    """A tensor of one temperature as (1,), of one per token as (N,); None for a number."""
    if isinstance(temperature, Tensor):
        if temperature.ndim > 0:
            return broadcast_floats("temperature", temperature, shape, dtype)
        return temperature.detach().reshape(1).to(dtype)
    if type(temperature) is not float and not isinstance(temperature, numbers.Real):
        raise TypeError(
            f"temperature: expected a number or a tensor, found {type(temperature).__name__}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive finite number, found {temperature}")
    return None


SCALES = (1e-18, 1e18)  # so that their ratio and a temperature's stay normal fp32 numbers


def check_scaling(logit_scale: float, logit_softcap: float | None) -> None:
    """Raise TypeError or ValueError unless the scale and the cap, if any, are positive numbers."""
    if logit_softcap is None and type(logit_scale) is float and logit_scale == 1:
        return
    values = {"logit_scale": logit_scale}
    if logit_softcap is not None:
        values["logit_softcap"] = logit_softcap
    for name, value in values.items():
        expected = "a positive finite number" + (" or None" if name == "logit_softcap" else "")
        if not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: expected {expected}, found {type(value).__name__}")
        if not SCALES[0] <= value <= SCALES[1]:
            low, high = SCALES
            raise ValueError(f"{name}: expected {expected}, {low:g} to {high:g}, found {value}")


def scaling(logit_scale: float, logit_softcap: float | None) -> tuple[float, float]:
    """(divisor, tanh_scale) by which kernels apply a logit scale s and a soft cap c.

    They divide the temperature T by the divisor, since s x / T = x / (T / s) and
    c tanh(s x / c) / T = tanh(k x) / (T / c). The tanh_scale is k = s / c; 0 without a cap.
    """
    if logit_softcap is None:
        return float(logit_scale), 0.0
    return float(logit_softcap), logit_scale / logit_softcap


def check_rows(
    ids: Tensor,
    temperature: Tensor,
    kept: Tensor,
    vocab: int,
    old_logprobs: Tensor | None = None,
) -> None:
    """Raise ValueError for a kept row with an id outside the vocabulary, a temperature that is not
    positive and finite, or an old logprob that is NaN.

    While a CUDA graph is captured the data cannot be read: kernels then return NaN instead.
    """
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    bad = ((ids < 0) | (ids >= vocab)) & kept
    cold = ~((temperature > 0) & (temperature < math.inf)) & kept
    unknown = kept & old_logprobs.isnan() if old_logprobs is not None else torch.zeros_like(kept)
    if not (bad | cold | unknown).any():  # the only wait for a GPU
        return
    if unknown.any():
        row = int(unknown.nonzero()[0, 0])
        raise ValueError(
            f"old_logprobs: expected no NaN where a token is kept, found NaN at row {row}"
        )
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"token_ids: expected ids in [0, {vocab}) where a token is kept, "
            f"found {int(ids[row])} at row {row}{_hint_for_shards()}"
        )
    row = int(cold.nonzero()[0, 0])
    found = float(temperature.expand(kept.shape)[row])
    raise ValueError(f"temperature: expected a positive finite number, found {found} at row {row}")


def _hint_for_shards() -> str:
    """Where several processes run, a vocabulary that is too small may be a part of one."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return ""
    return (
        "; if each process has logits of a part of the vocabulary, hand a DTensor weight to the "
        "linear_ functions, or logprobs to policy_objective"
    )


def is_captured(tensor: Tensor) -> bool:
    """Whether torch.compile or a CUDA graph records the work, to replay it on other data."""
    if torch.compiler.is_compiling():
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def has_no_data(tensor: Tensor) -> bool:
    """Whether it is a meta or a fake tensor."""
    return tensor.is_meta or (not torch.compiler.is_compiling() and isinstance(tensor, FakeTensor))


def is_unreadable(tensor: Tensor) -> bool:
    """Whether no shape and no error can depend on data: there is none, or torch.vmap hides it."""
    if torch.compiler.is_compiling() or has_no_data(tensor):
        return has_no_data(tensor)
    levels = _functorch.get_interpreter_stack()
    return levels is not None and any(x.key() == _functorch.TransformType.Vmap for x in levels)


def check_devices(like: Tensor, **tensors: Tensor | float | None) -> None:
    """Raise ValueError if a tensor is on another device than `like`."""
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device != like.device:
            raise ValueError(f"{name}: expected a tensor on {like.device}, found {tensor.device}")


def strided_rows(logits: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Logits (..., V) and the `RowLayout` of their rows; copied only if no layout fits them."""
    logits = logits.resolve_neg()
    if logits.ndim > 3:
        logits = logits.reshape(-1, *logits.shape[-2:])
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.ndim == 3:
        return logits, (max(logits.shape[1], 1), logits.stride(0), logits.stride(1))
    if logits.ndim == 2:
        return logits, (1, logits.stride(0), 0)
    return logits, (1, 0, 0)


def gradient_rows(dlogits: Tensor, logits: Tensor) -> dict[str, Any]:
    """The fields of a kernel's arguments for dlogits (..., V): of the logits' dtype, or half as
    wide as fp32 logits. Raises TypeError for another dtype, which no kernel writes."""
    halves = logits.dtype == torch.float32 and dlogits.dtype in (torch.bfloat16, torch.float16)
    if dlogits.dtype != logits.dtype and not halves:
        raise TypeError(f"dlogits: expected {logits.dtype}, found {dlogits.dtype}")
    rows, layout = strided_rows(dlogits)
    index = DTYPES.index(dlogits.dtype)
    return {"dlogits": rows, "dlogits_layout": layout, "dlogits_dtype": index}


def scaled(
    logits: Tensor,  # (N, V)
    temperature: Tensor,  # (N,) or (1,)
    logit_scale: float,
    logit_softcap: float | None,
) -> Tensor:  # (N, V) fp32, or fp64
    """The logits as they enter the softmax."""
    z = logits.to(math_dtype(logits))
    if logit_scale != 1:
        z = z * logit_scale
    if logit_softcap is not None:
        z = logit_softcap * torch.tanh(z / logit_softcap)
    return z / temperature.unsqueeze(1)


def logprobs_of(
    logits: Tensor,  # (N, V)
    ids: Tensor,  # (N,) int64
    temperature: Tensor,  # (N,) or (1,)
    entropy: bool,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> tuple[Tensor, Tensor | None]:  # (N,), (N,)
    """Logprob of each id and entropy of each row in differentiable PyTorch, -inf logits allowed."""
    z = scaled(logits, temperature, logit_scale, logit_softcap)
    logprobs = z.log_softmax(-1)
    chosen = logprobs.gather(1, ids.unsqueeze(1)).squeeze(1)
    if not entropy:
        return chosen, None
    impossible = logprobs == -torch.inf  # p log p is 0 there, in value and in gradient
    logprobs = logprobs.masked_fill(impossible, 0)
    return chosen, -(logprobs.exp() * logprobs).masked_fill(impossible, 0).sum(-1)


def _check_real(name: str, values: object) -> None:
    check_tensors(**{name: values})
    if isinstance(values, Tensor) and values.is_complex():
        raise TypeError(f"{name}: expected real numbers, found {values.dtype}")


def _check_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if tensor.shape != torch.Size(shape):
        raise ValueError(
            f"{name}: expected the tokens' shape {tuple(shape)}, found {tuple(tensor.shape)}"
        )
