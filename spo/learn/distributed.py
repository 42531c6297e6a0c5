"""Training on several processes started by torchrun: DDP or FSDP2.

Every rank grows its share of the prompts. The forests are then gathered on every rank, so that
credit, replay and packing see the whole batch and their figures are global. Only the packs of a
step are distributed. A checkpoint is the same as that of one process.
"""

from __future__ import annotations

import atexit
import os
import time
from dataclasses import dataclass
from datetime import timedelta
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

PATIENCE = timedelta(hours=12)  # ranks wait for rank 0's evaluations and for long rollouts


@dataclass(frozen=True)
class Ranks:
    """This process, and the number of processes of the run."""

    rank: int = 0
    world: int = 1
    sharded: bool = False  # FSDP2

    @property
    def main(self) -> bool:
        """Whether this rank writes the files and evaluates."""
        return self.rank == 0


def join(parallel: str, device: str) -> Ranks:
    """The ranks that torchrun's environment describes; without it, one process.

    Raises ValueError if `parallel` is fsdp and there is only one process.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        if parallel == "fsdp":
            raise ValueError("train.parallel=fsdp: expected several processes; start with torchrun")
        return Ranks()
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        atexit.register(_leave)
    return Ranks(dist.get_rank(), world, parallel == "fsdp")


def _leave() -> None:
    """Take the process group apart before the interpreter is.

    A thread of gloo that drops the last tensor of a collective asks for the interpreter's lock.
    While the interpreter ends, that aborts the process ("terminate called without an active
    exception").
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(0.1)  # for threads of groups that a device mesh still refers to


def gather(ranks: Ranks, item: Any) -> list[Any]:
    """The items of all ranks, in order, on every rank."""
    if ranks.world == 1:
        return [item]
    items = [None] * ranks.world
    dist.all_gather_object(items, item)
    return items


def shard(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, device: str) -> None:
    """Shard a model over the ranks with FSDP2, block by block, and its optimiser's state with it.

    `run_inside` runs any function as a forward pass: the head needs the gathered weights too.
    """
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    whole = list(model.parameters())
    for block in _blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    run = MethodType(lambda self, function, *args: function(self, *args), model)
    vars(model)["run_inside"] = run
    register_fsdp_forward_method(model, "run_inside")
    if optimizer is None:
        return
    pairs: dict[Tensor, Any] = dict(zip(whole, model.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [pairs[p] for p in group["params"]]
    for p in [p for p in optimizer.state if p in pairs]:
        state = optimizer.state.pop(p)
        optimizer.state[pairs[p]] = {
            key: distribute_tensor(value, mesh, pairs[p].placements)
            if isinstance(value, Tensor) and value.shape == p.shape
            else value
            for key, value in state.items()
        }


def _blocks(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The repeated layers, which the model says must not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [m for m in model.modules() if type(m).__name__ in names]


def begin_batch(model: torch.nn.Module, ranks: Ranks, *, last: bool) -> None:
    """Call before a micro-batch: the head and embeddings are gathered and reduced once per step."""
    if ranks.sharded:
        assert isinstance(model, FSDPModule)
        model.set_reshard_after_backward(last, recurse=False)
        model.set_requires_gradient_sync(last, recurse=False)


def loss_scale(ranks: Ranks) -> float:
    """Factor on every loss: FSDP2 averages gradients over the ranks, which here must add up."""
    return float(ranks.world) if ranks.sharded else 1.0


def add_gradients(model: torch.nn.Module, ranks: Ranks) -> None:
    """DDP: the sum of all ranks' gradients, on every rank. FSDP2 has added them already."""
    if ranks.world == 1 or ranks.sharded:
        return
    waiting = [
        dist.all_reduce(p.grad, async_op=True) for p in model.parameters() if p.grad is not None
    ]
    for work in waiting:
        if work is not None:
            work.wait()


def add_figures(figures: dict[str, float], ranks: Ranks) -> dict[str, float]:
    """Figures over all ranks: sums, or the maximum for a key that ends in _max."""
    every = gather(ranks, figures)
    return {key: (max if key.endswith("_max") else sum)(f[key] for f in every) for key in figures}


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor as a whole, on every rank; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Give `target` the weights of `source`, both whole or sharded alike."""
    for model in (source, target):
        if isinstance(model, FSDPModule):
            model.reshard()  # as for `Whole`
    target.load_state_dict(source.state_dict())


class Whole:
    """A model, its weights and its optimiser's state, if it has one, as one process saves them.

    All ranks make it if the model is sharded.

    Attributes:
        weights: parameters and saved buffers by name; tied ones once.
    """

    def __init__(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer | None):
        sharded = isinstance(model, FSDPModule)
        if isinstance(model, FSDPModule):
            model.reshard()  # a forward without a backward leaves the root's weights gathered

        def whole(value: Any) -> Any:
            return full(value).cpu() if sharded and isinstance(value, Tensor) else value

        kept = model.state_dict()
        tensors: dict[str, Tensor] = dict(model.named_parameters())
        tensors |= {name: kept[name] for name, _ in model.named_buffers() if name in kept}
        saved = optimizer.state_dict() if optimizer is not None else {"state": {}}
        self.model = model
        self.weights: dict[str, Tensor] = {n: whole(t.detach()) for n, t in tensors.items()}
        self.optimizer: dict[str, Any] = saved | {
            "state": {
                i: {k: whole(v) for k, v in state.items()} for i, state in saved["state"].items()
            }
        }
