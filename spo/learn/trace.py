"""The peak memory of one batch's forward and backward, counted without making its tensors.

The policy's own layers run on fake tensors, which have a shape and a type and no memory. What
autograd keeps, what the backward makes and when each goes is so counted as PyTorch does it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, PreTrainedModel

from spo.config.policy import PolicyConfig
from spo.learn.attention import PREFIX, Layout, attending
from spo.learn.flex import padded_length
from spo.learn.lora import attach
from spo.learn.recompute import checkpoint_layers
from spo.models.load import body, set_attention
from spo_kernels.head import MEMORY_BUDGET

COUNTED = "spo_counted"  # an attention that makes what a GPU's kernels make


@dataclass(frozen=True)
class Pack:
    """The largest batch of a run."""

    tokens: int
    longest: int  # tokens of its longest path
    rows: int  # of the head
    logits: int = MEMORY_BUDGET  # bytes of them that exist at a time


@dataclass(frozen=True)
class Traced:
    """A policy, counted."""

    weights: dict[str, int]  # number of weights by name, adapters included
    trained: frozenset[str]  # names of those that train
    matrices: frozenset[str]  # names of those that `policy.lora.quantize` holds in 4 bits
    backward: int  # bytes at the peak of forward and backward, gradients included
    forward: int  # of a forward that keeps nothing, as a reference's; 0 if that was not asked

    def count(self, trained: bool = False) -> int:
        """Number of weights; of those that train."""
        return sum(n for name, n in self.weights.items() if not trained or name in self.trained)


def trace(
    auto: Any,  # one of transformers' auto classes
    config: Any,  # of the model
    policy: PolicyConfig,
    pack: Pack,
    *,
    vocabulary: int | None = None,  # ids of the tokenizer; None: those of the head
    accumulates: bool = False,  # an earlier batch of the step has left its gradients
    scores: bool = False,  # count a forward without gradients, too
) -> Traced:
    """Count the policy's forward and backward over a batch.

    Raises ValueError with one sentence if fake tensors cannot run the model.
    """
    device = torch.device(policy.device).type
    tokens = padded_length(pack.tokens) if device == "cuda" else pack.tokens
    chains = -(-tokens // pack.longest)
    size = -(-tokens // chains)
    ends = torch.arange(1, chains + 1, dtype=torch.int32) * size
    layout = Layout(ends.repeat_interleave(size), torch.arange(size).repeat(chains), "grouped")
    layout.plan("grouped")
    options = {"dtype": getattr(torch, policy.dtype), "trust_remote_code": policy.trust_remote_code}
    try:
        with torch.device("meta"):
            model = auto.from_config(config, **options).eval()
            matrices = _matrices(model)
            if policy.lora is not None:
                attach(model, policy, seed=0)
        with FakeTensorMode(allow_non_fake_inputs=True), attending(layout):
            _fill(model)
            return _traced(model, policy, layout, pack, matrices, vocabulary, accumulates, scores)
    except Exception as error:  # of the model's own code
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"policy.path: its memory cannot be counted ({reason})") from error


def _matrices(model: PreTrainedModel) -> frozenset[str]:
    """Names of the layers that bitsandbytes would hold in 4 bits: all linear ones but the head."""
    head = model.get_output_embeddings()
    return frozenset(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )


def _fill(model: PreTrainedModel) -> None:
    """Give a model on the meta device weights that stand for some on the CPU, in place."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, x in own.items():
                if x is not None and id(x) not in made:  # tied weights are one
                    made[id(x)] = torch.empty(x.shape, dtype=x.dtype)
                    if isinstance(x, torch.nn.Parameter):
                        made[id(x)] = torch.nn.Parameter(made[id(x)], x.requires_grad)
                if x is not None:
                    own[name] = made[id(x)]  # pyright: ignore[reportArgumentType]


def _traced(
    model: PreTrainedModel,
    policy: PolicyConfig,
    layout: Layout,
    pack: Pack,
    matrices: frozenset[str],
    vocabulary: int | None,
    accumulates: bool,
    scores: bool,
) -> Traced:
    set_attention(model, COUNTED if policy.device.startswith("cuda") else PREFIX + "grouped")
    if policy.gradient_checkpointing:
        checkpoint_layers(model)
    named = dict(model.named_parameters())
    grads = []
    if accumulates:
        for p in model.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        grads = [p.grad for p in model.parameters() if p.grad is not None]
    with _Storages([*model.parameters(), *model.buffers(), *grads]) as storages:
        _step(model, policy, layout, pack, vocabulary)
    backward = sum(grad.nbytes for grad in grads) + storages.peak
    with torch.no_grad(), _Storages([*model.parameters(), *model.buffers()]) as storages:
        if scores:
            _step(model, policy, layout, pack, vocabulary)
    return Traced(
        weights={name: p.numel() for name, p in named.items()},
        trained=frozenset(name for name, p in named.items() if p.requires_grad),
        matrices=frozenset(
            name
            for name in named
            if name.endswith("weight")
            and name.removesuffix(".weight") in matrices
            or name.endswith(".base_layer.weight")
        ),
        backward=backward,
        forward=storages.peak,
    )


def _step(
    model: PreTrainedModel, policy: PolicyConfig, layout: Layout, pack: Pack, vocabulary: int | None
) -> None:
    ids, positions = torch.zeros(2, 1, layout.tokens, dtype=torch.int64).unbind()
    with torch.autocast("cpu", torch.bfloat16, enabled=policy.autocast):
        out = body(model)(input_ids=ids, position_ids=positions, use_cache=False)
        states = out.last_hidden_state[0].clone()  # those of the tokens, without padding
        del out
        head: Any = model.get_output_embeddings()
        weight = getattr(head, "base_layer", head).weight
        if vocabulary is not None and vocabulary < len(weight):
            weight = weight[:vocabulary]
        kept: list[Tensor] = []
        on_gpu = policy.device.startswith("cuda")
        loss = _Head.apply(states, weight, pack, kept, on_gpu)
    del states
    if loss.requires_grad:
        loss.backward()


class _Head(torch.autograd.Function):
    """The buffers of `spo_kernels.linear_masked_ppo_loss`: logits of a chunk, three gradients."""

    @staticmethod
    def forward(ctx, hidden, weight, pack, kept, on_gpu):
        rows, (vocab, width) = pack.rows, weight.shape
        chunks = max(1, -(-rows * vocab * 4 // pack.logits))
        size = -(-rows // chunks)
        logits = hidden.new_empty(size, vocab, dtype=torch.float32)
        if not on_gpu:
            kept.append(logits)  # reused by later calls
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dlogits = dhidden = dweight = dx = None
        if (needs_hidden or needs_weight) and on_gpu and weight.dtype != torch.float32:
            dlogits = torch.empty_like(logits, dtype=weight.dtype)  # a CPU's lies over the logits
        if needs_hidden:
            dx = hidden.new_empty(rows, width, dtype=weight.dtype if on_gpu else torch.float32)
        if needs_weight:
            dtype = weight.dtype if chunks == 1 else torch.float32
            dweight = torch.empty_like(weight, dtype=dtype)
        del logits, dlogits
        if needs_hidden:
            dhidden = torch.zeros_like(hidden)
        del dx
        if dweight is not None:
            dweight = dweight.to(weight.dtype)
        ctx.formed = dhidden, dweight
        return hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx, *grads):
        dhidden, dweight = ctx.formed
        del ctx.formed
        return dhidden, dweight, None, None, None


class _Counted(torch.autograd.Function):
    """What FlexAttention and flash-attn keep, and the gradients that they make."""

    @staticmethod
    def forward(ctx, query, key, value):
        out = torch.empty_like(query[..., : value.shape[3]])  # laid out as the query is
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, lse)
        return out

    @staticmethod
    def backward(ctx, *grads):
        query, key, value, _, _ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _counted(module, query, key, value, attention_mask, **options):
    out: Any = _Counted.apply(query.to(value.dtype), key.to(value.dtype), value)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(COUNTED, _counted)


class _Storages(TorchDispatchMode):
    """Bytes of the storages that are made within it, at their highest."""

    def __init__(self, held: Iterable[Tensor]):
        """`held`: tensors of before."""
        super().__init__()
        self.peak = self._now = 0
        self._seen = weakref.WeakSet(x.untyped_storage() for x in held)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        if storage in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(storage)
        self._now += size
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self._now -= size
