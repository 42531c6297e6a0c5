"""Other people's ways to the same loss, each behind one signature: Problem -> what it computes.

A rival gives logprobs (N,), which the callers turn into a loss in PyTorch, or the masked policy
loss itself. It starts from logits or from hidden states and a head. The fair form of a rival drops
the rows that the mask excludes before it starts, which is what a user of that library would write
by hand. A rival that cannot run here raises ImportError when it is loaded, with the reason.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

RHO, CLIP = 0.9, 0.2


@dataclass(frozen=True)
class Problem:
    """Tokens whose loss is wanted, as logits (N, V) or as hidden states (N, D) and a head (V, D).

    `pad` rows stand behind the N rows of `inputs[0]`: Liger's Triton loss demands one.
    """

    inputs: tuple[Tensor, ...]  # (logits,) or (hidden, weight); the gradients are theirs
    ids: Tensor  # (N,) int64
    old: Tensor  # (N,) fp32, logprobs of the sampling policy
    advantages: Tensor  # (N,) fp32, positive
    pad: int = 0

    @property
    def mask(self) -> Tensor:
        return self.old < math.log(RHO)

    @property
    def logits(self) -> Tensor:
        return self.inputs[0] if len(self.inputs) == 1 else self.inputs[0] @ self.inputs[1].T

    def compact(self) -> Problem:
        """The rows that the mask keeps; gradients flow back to all rows."""
        rows = self.mask.nonzero()[:, 0]
        padded = torch.cat([rows, rows[: self.pad]]) if self.pad else rows
        return replace(
            self,
            inputs=(self.inputs[0][padded], *self.inputs[1:]),
            ids=self.ids[rows],
            old=self.old[rows],
            advantages=self.advantages[rows],
        )


@dataclass(frozen=True)
class Rival:
    """One implementation and what it needs."""

    name: str
    load: Callable[[], Callable[[Problem], Tensor]]  # imports it
    level: str  # logits or head
    gives: str = "logprobs"  # or loss
    package: str = "torch"
    device: str = ""  # "cuda" or "cpu" if it runs there only
    sees_mask: bool = False  # saves work on dropped rows even if they are not removed by hand
    pad: int = 0


def eager_logprobs(p: Problem) -> Tensor:
    """The way of the paper's code: log_softmax over the whole vocabulary for every row."""
    return torch.log_softmax(p.logits.float(), -1).gather(-1, p.ids[:, None])[:, 0]


def policy_loss(logprobs: Tensor, p: Problem) -> Tensor:
    """The clipped loss over the tokens that the mask keeps, masked after the fact."""
    ratio = torch.exp(logprobs - p.old)
    mask = p.mask.float()
    term = torch.min(ratio * p.advantages, ratio.clamp(1 - CLIP, 1 + CLIP) * p.advantages)
    return -(term * mask).sum() / mask.sum()


def weighted_sum(logprobs: Tensor, p: Problem) -> Tensor:
    """A loss that only hands gradients to the logprobs of the kept tokens."""
    return (logprobs * p.advantages * p.mask).sum()


def import_part(name: str) -> ModuleType:
    """Import a module without running the `__init__` of the packages above it.

    verl's and TRL's pull in Ray and datasets, which a kernel does not need.
    """
    path, package = None, ""
    for part in name.split(".")[:-1]:
        package = f"{package}.{part}" if package else part
        if package not in sys.modules:
            spec = PathFinder.find_spec(package, path)
            if spec is None:
                raise ModuleNotFoundError(f"No module named {package!r}", name=package)
            module = ModuleType(package)
            module.__path__ = list(spec.submodule_search_locations or ())
            sys.modules[package] = module
        path = sys.modules[package].__path__
    return importlib.import_module(name)


def _compiled() -> Callable[[Problem], Tensor]:
    @torch.compile(dynamic=False)
    def logprobs(inputs: tuple[Tensor, ...], ids: Tensor) -> Tensor:
        logits = inputs[0] if len(inputs) == 1 else inputs[0] @ inputs[1].T
        return torch.log_softmax(logits.float(), -1).gather(-1, ids[:, None])[:, 0]

    return lambda p: logprobs(p.inputs, p.ids)


def _torch_linear_cross_entropy() -> Callable[[Problem], Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):
        options["options"] = torch.nn.LinearCrossEntropyOptions()
    return lambda p: -F.linear_cross_entropy(*p.inputs, p.ids, reduction="none", **options)


def _liger_chunked() -> Callable[[Problem], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    def loss(p: Problem) -> Tensor:
        # Sequences of one token: advantages are per sequence. All in one chunk: it tiles inside.
        grpo = LigerFusedLinearGRPOLoss(
            beta=0.0,
            compiled=False,  # compiles only the loss of (N,) logprobs, which costs nothing
            use_ref_model=False,
            chunk_size=len(p.ids),
            epsilon_low=CLIP,
            epsilon_high=CLIP,
            loss_type="dapo",  # the sum over the mask's tokens over their number
        )
        hidden, weight = p.inputs
        per_token = (p.ids[:, None], p.mask.float()[:, None], p.advantages)
        return grpo(hidden[:, None], weight, *per_token, old_per_token_logps=p.old[:, None])[0]

    return loss


def _liger_triton() -> Callable[[Problem], Tensor]:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def loss(p: Problem) -> Tensor:
        # One sequence, so one advantage: 1, and the positive advantages are multiplied in.
        mask = p.mask
        per_token = triton_grpo_loss(
            p.inputs[0][None],  # (1, N + 1, V)
            p.old[None],
            None,
            p.ids[None],
            torch.ones_like(p.advantages[:1]),
            completion_mask=mask.float()[None],
            temperature=1.0,
            beta=0.0,
            eps_low=CLIP,
            eps_high=CLIP,
            inplace=False,  # the logits are needed for the next call
            reduce=False,
        )[0][0]
        return (per_token * p.advantages * mask).sum() / mask.sum()

    return loss


def _trl_fused() -> Callable[[Problem], Tensor]:
    fused = import_part("trl.kernels").selective_log_softmax_and_entropy
    return lambda p: fused(p.logits, p.ids)[0]


def _trl_rows() -> Callable[[Problem], Tensor]:
    selective_log_softmax = import_part("trl.trainer.utils").selective_log_softmax
    return lambda p: selective_log_softmax(p.logits, p.ids)


def _trl_chunked() -> Callable[[Problem], Tensor]:
    utils = import_part("trl.trainer.utils")  # its backward imports it
    function, width = utils._ChunkedLogProbFunction, utils._CHUNKED_LOGPROB_CHUNK_SIZE
    return lambda p: function.apply(*p.inputs, None, p.ids, 1.0, width, None, 1.0, ())[0]


def _verl_rows() -> Callable[[Problem], Tensor]:
    logprobs_from_logits = import_part("verl.utils.torch_functional").logprobs_from_logits
    return lambda p: logprobs_from_logits(p.logits, p.ids, inplace_backward=False)


def _verl_torch() -> Callable[[Problem], Tensor]:
    head = import_part("verl.utils.experimental.torch_functional").FusedLinearForPPO()
    return lambda p: head(*p.inputs, p.ids)[0]


def _verl_triton() -> Callable[[Problem], Tensor]:
    module = import_part("verl.utils.kernel.linear_cross_entropy")
    return lambda p: module.linear_cross_entropy(*p.inputs, p.ids, 1.0, "none")[0]


def _cut_cross_entropy() -> Callable[[Problem], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    def logprobs(p: Problem) -> Tensor:
        labels = p.ids.masked_fill(~p.mask, -100)
        return -linear_cross_entropy(*p.inputs, labels, reduction="none")

    return logprobs


EAGER = Rival("PyTorch eager", lambda: eager_logprobs, "any")
COMPILED = Rival("torch.compile", _compiled, "any")
RIVALS = (
    EAGER,
    COMPILED,
    Rival("TRL selective_log_softmax", _trl_fused, "logits", package="trl", device="cuda"),
    Rival("TRL selective_log_softmax", _trl_rows, "logits", package="trl", device="cpu"),
    Rival("verl logprobs_from_logits", _verl_rows, "logits", package="verl"),
    Rival(
        "Liger Triton GRPO",
        _liger_triton,
        "logits",
        gives="loss",
        package="liger-kernel",
        device="cuda",
        sees_mask=True,
        pad=1,
    ),
    Rival("torch linear_cross_entropy", _torch_linear_cross_entropy, "head"),
    Rival("Liger chunked GRPO", _liger_chunked, "head", gives="loss", package="liger-kernel"),
    Rival("TRL chunked logprobs", _trl_chunked, "head", package="trl"),
    Rival("verl FusedLinearForPPO", _verl_torch, "head", package="verl"),
    Rival("verl Triton head", _verl_triton, "head", package="verl", device="cuda"),
    Rival(
        "CCE",
        _cut_cross_entropy,
        "head",
        package="cut-cross-entropy",
        device="cuda",
        sees_mask=True,
    ),
)
