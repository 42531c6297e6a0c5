"""Heads whose tensors are DTensors: weights of FSDP2, and weights that share the vocabulary.

A weight (V, D) is read in one of two ways.

- Gathered: every process multiplies with the whole weight, and the gradient of the weight is the
  mean over the mesh, as FSDP2 and DDP have it.
- Vocabulary-parallel: every process multiplies with its rows of the weight (vocab_parallel.py). No
  process holds the whole weight or whole logits.

If all processes of the mesh have the same hidden states and tokens, both give the same loss and the
same gradients: the mean of equal gradients is each of them. If they differ, as in data-parallel
training, only the first has a meaning. So the processes compare fingerprints of their arguments,
and neither the weight nor its mesh needs a mark. This needs one small reduction.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from spo_kernels import vocab_parallel

HEAD = ("hidden", "weight", "bias")
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def call(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A public function with DTensors among its arguments.

    Raises ValueError for placements that it cannot take, with what to do.
    """
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    for name, value in given.items():
        if isinstance(value, DTensor) and name not in HEAD:
            given[name] = _whole_logits(value) if name == "logits" else _replicated(name, value)
    if "logits" in given:
        return function(**given)
    weight, replicated = given["weight"], isinstance(given["hidden"], DTensor)
    if replicated:
        given["hidden"] = _replicated_states(given["hidden"], weight)
    dim = _vocab_dim(weight, given["bias"])
    if dim is not None and agree(given, weight, strict=replicated):
        group, vocab = weight.device_mesh.get_group(dim), weight.shape[0]
        given |= {k: x.to_local() for k, x in given.items() if isinstance(x, DTensor)}
        share = vocab_parallel.Share(group, vocab, given["weight"].shape[0])
        return vocab_parallel.FUNCTIONS[function.__name__](share, given)
    for name in ("weight", "bias"):
        if isinstance(given[name], DTensor):
            given[name] = gathered(name, given[name])
    return function(**given)


vars(call)["_torchdynamo_disable"] = True  # torch.compile leaves its graph for this call


def gathered(name: str, leaf: DTensor) -> Tensor:
    """The whole tensor. Its gradient becomes the mean over the mesh, placed as the tensor is.

    With `full_tensor()` alone every process would keep its part of its own gradient.
    """
    if any(p.is_partial() for p in leaf.placements):
        raise ValueError(
            f"{name}: expected a DTensor without partial sums, found {leaf.placements}; "
            "redistribute it first"
        )
    whole = leaf.full_tensor(grad_placements=[Partial()] * leaf.device_mesh.ndim)
    return _Mean.apply(whole, leaf.device_mesh.size())


class _Mean(torch.autograd.Function):
    """Divides the gradient by the number of processes: not every backend has averages."""

    @staticmethod
    def forward(ctx, whole, size):
        ctx.size = size
        return whole.view_as(whole)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] / ctx.size, None


def _vocab_dim(weight: Any, bias: Any) -> int | None:
    """The dimension of the mesh that shares the vocabulary; None unless there is exactly one, and
    the weight is replicated on the others."""
    if not isinstance(weight, DTensor):
        return None
    dims = [i for i, p in enumerate(weight.placements) if not p.is_replicate()]
    if len(dims) != 1 or weight.placements[dims[0]] != Shard(0):
        return None
    alike = isinstance(bias, DTensor) and bias.device_mesh == weight.device_mesh
    if bias is not None and not (alike and bias.placements == weight.placements):
        return None
    return dims[0] if weight.device_mesh.size(dims[0]) > 1 else None


def agree(given: dict[str, Any], weight: DTensor, strict: bool) -> bool:
    """Whether all processes of the weight's mesh have the same arguments; all learn the same.

    `strict`: the hidden states are a replicated DTensor, so they are not compared, and it is an
    error if the tokens differ.
    """
    mesh, hidden = weight.device_mesh, given["hidden"]
    tensors = {k: x for k, x in given.items() if isinstance(x, Tensor) and k not in HEAD}
    options = [(k, x) for k, x in given.items() if not isinstance(x, Tensor)]
    grads = [torch.is_grad_enabled(), *(given[k].requires_grad for k in ("hidden", "weight"))]
    shapes = [(k, tuple(x.shape), x.dtype) for k, x in (("hidden", hidden), *tensors.items())]
    code = zlib.crc32(repr((options, grads, shapes)).encode())
    mark = torch.full((), code, dtype=torch.int64, device=hidden.device)
    for x in (*tensors.values(), *(() if strict else (hidden,))):
        mark = mark * 1_000_003 + fingerprint(x)
    extremes = torch.stack([mark, -mark])
    for dim in range(mesh.ndim):
        dist.all_reduce(extremes, dist.ReduceOp.MAX, mesh.get_group(dim))
    same = bool(extremes[0] == -extremes[1])
    if strict and not same:
        raise ValueError(
            "token_ids and the other arguments: expected the same in all processes of the mesh on "
            f"which hidden is replicated, found others there; the mesh is {mesh}"
        )
    return same


def fingerprint(tensor: Tensor) -> Tensor:  # () int64
    """A number that other bits, or the same in another order of rows, would change."""
    bits = tensor.detach().contiguous().view(BITS[tensor.element_size()])
    lines = bits.reshape(-1, tensor.shape[-1] if tensor.ndim > 1 else 1)
    sums = (lines.sum(dim, dtype=torch.int64) for dim in (1, 0))  # reads twice, makes no copy
    factors = 2_654_435_761  # odd, so that no bit is lost modulo 2^64
    marks = ((s * (torch.arange(s.numel(), device=s.device) * 2 + 1) * factors).sum() for s in sums)
    return sum(marks, torch.zeros((), dtype=torch.int64, device=tensor.device))


def _replicated(name: str, value: DTensor) -> Tensor:
    if all(p.is_replicate() for p in value.placements):
        return value.to_local()
    raise ValueError(
        f"{name}: expected a tensor or a replicated DTensor, found {value.placements}; use "
        f"{name}.to_local() with hidden states of the same tokens, or {name}.full_tensor()"
    )


def _replicated_states(hidden: DTensor, weight: Any) -> Tensor:
    found = hidden.placements
    same = not isinstance(weight, DTensor) or weight.device_mesh == hidden.device_mesh
    if same and all(p.is_replicate() for p in found):
        return hidden.to_local()
    raise ValueError(
        "hidden: expected a tensor, or a DTensor that is replicated on the weight's mesh, found "
        f"{found} on {hidden.device_mesh}; use hidden.to_local() if processes have other tokens, "
        "else hidden.redistribute(placements=[Replicate()])"
    )


def _whole_logits(logits: DTensor) -> Tensor:
    found = logits.placements
    if all(p.is_replicate() for p in found):
        return logits.to_local(grad_placements=[Replicate()] * len(found))
    if any(p.is_shard(logits.ndim - 1) for p in found):
        raise ValueError(
            f"logits: expected the whole vocabulary in every process, found {found}; "
            "linear_masked_ppo_loss and linear_token_logprobs take hidden states and a weight that "
            "is sharded over the vocabulary, policy_objective takes logprobs"
        )
    raise ValueError(
        f"logits: expected a tensor or a replicated DTensor, found {found}; use logits.to_local() "
        "with the tokens of this process"
    )
