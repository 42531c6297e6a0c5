"""The policy and its reference; their forward pass over a packed forest."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spo.learn.attention import PREFIX, Layout, attending
from spo.learn.runs import tree_spans
from spo.models.check import SHORT, probe_ids
from spo.models.head import head_arguments, own_forward
from spo.models.load import attention, body, own_attention, text_config
from spo.records import Batch
from spo_kernels import linear_token_logprobs

T = TypeVar("T")


class Body(NamedTuple):
    """What a model's layers make of a batch."""

    states: Tensor  # (T, D), last hidden states
    router_loss: Tensor | None  # () fp32, coefficient included; None: the model has none


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states (T, D) of a packed batch; of its rows if the model was loaded for rows."""
    return forward(model, batch).states


def forward(model: PreTrainedModel, batch: Batch, *, router_loss: bool = False) -> Body:
    """The hidden states of a batch, and on request the auxiliary loss of its routers.

    That is the loss of the model's own forward, where its configuration asks for it
    (`output_router_logits`), times its coefficient.
    """
    inputs, real, attending_to = _inputs(model, batch)
    wanted = router_loss and getattr(text_config(model), "output_router_logits", False)
    if wanted:
        inputs["output_router_logits"] = True
    with attending_to:
        out = body(model)(**inputs, use_cache=False)
    states = out.last_hidden_state[real]
    return Body(states, _router_loss(model, out, real) if wanted else None)


def _inputs(
    model: PreTrainedModel, batch: Batch
) -> tuple[dict[str, Any], Tensor, AbstractContextManager]:
    """Arguments of the model's body, which rows of it are tokens (B, L) bool, its attention."""
    device = batch.token_ids.device
    if not attention(model).startswith(PREFIX):
        rows, real = _rows(batch)
        return {"input_ids": rows}, real, nullcontext()
    layout = Layout(batch.visible_until, batch.position_ids, attention(model).removeprefix(PREFIX))
    size = batch.token_ids.numel()
    ids, positions = (
        torch.nn.functional.pad(x, (0, layout.size - size))[None]
        for x in (batch.token_ids, batch.position_ids)
    )
    real = (torch.arange(layout.size, device=device) < size)[None]
    return {"input_ids": ids, "position_ids": positions}, real, attending(layout)


def _rows(batch: Batch) -> tuple[Tensor, Tensor]:
    """One row per tree of the pack, all of them chains; padded at the end, where no token reads."""
    sizes = [end - start for start, end in tree_spans(batch.visible_until)]
    if not torch.equal(batch.position_ids.cpu(), torch.cat([torch.arange(n) for n in sizes])):
        raise ValueError("policy.packing=rows: expected batches packed as rows, found trees")
    rows = torch.nn.utils.rnn.pad_sequence(list(batch.token_ids.split(sizes)), batch_first=True)
    real = (torch.arange(rows.shape[1]) < torch.tensor(sizes)[:, None]).to(rows.device)
    return rows, real


def _router_loss(model: PreTrainedModel, out: Any, real: Tensor) -> Tensor | None:
    """The auxiliary loss as the model's own forward makes it, of the real tokens only."""
    inputs: dict[str, Any] = {"output_router_logits": True, "attention_mask": real.long()}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1
    loss = getattr(own_forward(model, out, **inputs), "aux_loss", None)
    if not isinstance(loss, Tensor):
        return None
    coefficient = vars(model)["router_coefficient"]
    return coefficient * loss.to(out.last_hidden_state.device).float()


@torch.no_grad()
def find_router_coefficient(model: PreTrainedModel) -> None:
    """Measure the weight of the routers' loss in the model's own loss, if it asks for one.

    Raises ValueError if it asks for one and does not make it from token ids alone.
    """
    if not getattr(text_config(model), "output_router_logits", False):
        return
    ids = torch.tensor([probe_ids(model)[:SHORT]], device=next(model.parameters()).device)
    try:
        with own_attention(model):
            out = model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True)
        own = torch.nn.functional.cross_entropy(out.logits[0, :-1].float(), ids[0, 1:])
        found = float((out.loss - own) / out.aux_loss)
    except Exception as error:  # of the model's own code
        raise ValueError(
            "policy.path: expected a loss of the model's routers, as its output_router_logits asks "
            f"for, found none ({type(error).__name__}); set it to false in config.json"
        ) from error
    vars(model)["router_coefficient"] = found


def inside(model: PreTrainedModel, function: Callable[..., T], *arguments: Any) -> T:
    """`function(model, *arguments)`, with the weights gathered if the model is sharded."""
    run = getattr(model, "run_inside", None)  # see spo.learn.distributed.shard
    return function(model, *arguments) if run is None else run(function, *arguments)


@torch.no_grad()
def score(model: PreTrainedModel, batch: Batch, temperature: float) -> Batch:
    """The batch with `ref_logprobs` from `model`, the reference."""
    return dataclasses.replace(batch, ref_logprobs=row_logprobs(model, batch, temperature))


def row_logprobs(model: PreTrainedModel, batch: Batch, temperature: float) -> Tensor:
    """(N,) fp32, logprobs of the batch's rows, without the dropout that a recipe may ask for."""
    training = model.training
    model.eval()
    try:
        return inside(model, _row_logprobs, batch, temperature)
    finally:
        model.train(training)


def _row_logprobs(model: PreTrainedModel, batch: Batch, temperature: float) -> Tensor:
    logprobs = linear_token_logprobs(
        **head_arguments(model, hidden_states(model, batch), batch.hidden_index),
        token_ids=batch.targets,
        temperature=temperature,
    )
    assert isinstance(logprobs, Tensor)  # without the entropy
    return logprobs


@torch.no_grad()
def sequence_logprobs(
    model: PreTrainedModel, prefix_ids: list[int], token_ids: list[int], temperature: float
) -> list[float]:
    """Logprobs of `token_ids` after `prefix_ids`, as the trainer computes them."""
    ids = torch.tensor(prefix_ids + token_ids)
    size = ids.numel()
    batch = scored_batch(
        token_ids=ids,
        position_ids=torch.arange(size),
        visible_until=torch.full((size,), size, dtype=torch.int32),
        hidden_index=torch.arange(len(prefix_ids) - 1, size - 1),
        targets=ids[len(prefix_ids) :],
    )
    batch = to_device(batch, next(model.parameters()).device)
    return row_logprobs(model, batch, temperature).tolist()


def scored_batch(targets: Tensor, **tensors: Tensor) -> Batch:
    """A batch whose rows are only scored."""
    size = targets.numel()
    return Batch(
        targets=targets,
        old_logprobs=torch.zeros(size),
        advantages=torch.zeros(size),
        loss_mask=torch.ones(size, dtype=torch.bool),
        policy_norm=1.0,
        kl_norm=1.0,
        share=1.0,
        **tensors,
    )


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on `device`."""
    moved = {
        f.name: value.to(device)
        for f in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, f.name), Tensor)
    }
    return dataclasses.replace(batch, **moved)
