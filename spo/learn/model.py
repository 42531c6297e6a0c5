"""The policy and its reference; their forward pass over a packed forest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from spo.config.policy import PolicyConfig
from spo.learn.attention import PREFIX, make_layout, tree_spans
from spo.models.tokenizer import load_pretrained
from spo.records import Batch
from spo_kernels import linear_token_logprobs

T = TypeVar("T")
ALIGNMENT = 64  # bytes, as PyTorch allocates on the CPU


def load_policy(config: PolicyConfig, path: str | None = None) -> PreTrainedModel:
    """A causal model that trains on packed batches, or on rows if `policy.packing` is rows.

    Args:
        path: a checkpoint's model folder; by default the recipe's start policy.

    Raises ValueError with one sentence if it cannot be loaded or packed.
    """
    return load_model(AutoModelForCausalLM, config, path)


def load_model(auto, config: PolicyConfig, path: str | None = None, **options) -> PreTrainedModel:
    """`load_policy` for any of transformers' auto classes; `options` are passed to its config."""
    options |= {"dtype": getattr(torch, config.dtype), "use_safetensors": True}
    if config.packing == "tree":
        options["attn_implementation"] = PREFIX + attention_backend(config)
    model = load_pretrained(auto, config, path, **options).to(config.device).train()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % ALIGNMENT:  # a mapped file: products round otherwise there
            tensor.data = tensor.data.clone()
    if config.packing == "tree":
        check_packing(model, config.path)
    elif getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # the others ignore the soft cap
    return model


def attention_backend(config: PolicyConfig) -> str:
    """The backend of `policy.attention`: by default grouped on the CPU, flex elsewhere."""
    if config.attention != "auto":
        return config.attention
    return "grouped" if torch.device(config.device).type == "cpu" else "flex"


@torch.no_grad()
def check_packing(model: PreTrainedModel, name: str) -> None:
    """Raise ValueError if the model's layers do not keep the branches of a pack apart.

    A root with two leaves is forwarded twice, with different first leaves. The second leaf must not
    change, and must equal the same tokens as one sequence under the model's own attention. This
    holds if all layers mix tokens only through the attention interface. It fails for recurrent
    layers, convolutions, and masks or positions of the model's own.
    """
    advice = "policy.packing=rows trains it with one row per node"
    kinds = set(getattr(model.config, "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if kinds:
        raise ValueError(
            f"policy.path: {name} has {', '.join(sorted(kinds))} layers, which cannot keep the "
            f"branches of a pack apart; {advice}"
        )
    implementation = _implementation(model)
    device = next(model.parameters()).device
    leaves = []
    for first in (3, 4):
        pack = ([1, 2, first, first, 5], [0, 1, 2, 3, 2], [5, 5, 4, 4, 5])
        try:
            leaves.append(_pack_states(model, *(torch.tensor(x, device=device) for x in pack))[4])
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"policy.path: {name} cannot be packed ({reason}); {advice}"
            ) from error
    model.set_attn_implementation("eager")
    alone = model.base_model(torch.tensor([[1, 2, 5]], device=device), use_cache=False)
    model.set_attn_implementation(implementation)
    expected = alone.last_hidden_state[0, 2]
    eps = torch.finfo(expected.dtype).eps
    drift, error = (float((leaves[0] - x).norm() / expected.norm()) for x in (leaves[1], expected))
    if not (drift <= 4 * eps and error <= max(1e-3, 32 * eps)):
        raise ValueError(
            f"policy.path: {name} mixes tokens outside the attention interface and cannot be "
            f"packed; {advice}"
        )


def _implementation(model: PreTrainedModel) -> str:
    """The name of the model's attention in transformers' interface."""
    return model.config._attn_implementation or ""


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Last hidden states (T, D) of a packed batch; of its rows if the model was loaded for rows."""
    if not _implementation(model).startswith(PREFIX):
        return _row_states(model, batch)
    return _pack_states(model, batch.token_ids, batch.position_ids, batch.visible_until)


def _pack_states(
    model: PreTrainedModel, token_ids: Tensor, position_ids: Tensor, visible_until: Tensor
) -> Tensor:
    backend = _implementation(model).removeprefix(PREFIX)
    layout = make_layout(visible_until, position_ids, backend)
    size = token_ids.numel()
    ids, positions = (
        torch.nn.functional.pad(x, (0, layout.size - size))[None] for x in (token_ids, position_ids)
    )
    out = model.base_model(input_ids=ids, position_ids=positions, use_cache=False, layout=layout)
    return out.last_hidden_state[0, :size]


def _row_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """One row per tree of the pack, all of them chains; padded at the end, where no token reads."""
    sizes = [end - start for start, end in tree_spans(batch.visible_until)]
    if not torch.equal(batch.position_ids.cpu(), torch.cat([torch.arange(n) for n in sizes])):
        raise ValueError("policy.packing=rows: expected batches packed as rows, found trees")
    rows = torch.nn.utils.rnn.pad_sequence(list(batch.token_ids.split(sizes)), batch_first=True)
    real = (torch.arange(rows.shape[1]) < torch.tensor(sizes)[:, None]).to(rows.device)
    return model.base_model(input_ids=rows, use_cache=False).last_hidden_state[real]


def inside(model: PreTrainedModel, function: Callable[..., T], *arguments: Any) -> T:
    """`function(model, *arguments)`, with the weights gathered if the model is sharded."""
    run = getattr(model, "run_inside", None)  # see spo.learn.distributed.shard
    return function(model, *arguments) if run is None else run(function, *arguments)


@torch.no_grad()
def score(model: PreTrainedModel, batch: Batch, temperature: float) -> Batch:
    """The batch with `ref_logprobs` from `model`, the reference."""
    return dataclasses.replace(batch, ref_logprobs=row_logprobs(model, batch, temperature))


def row_logprobs(model: PreTrainedModel, batch: Batch, temperature: float) -> Tensor:
    """(N,) fp32, logprobs of the batch's rows."""
    return inside(model, _row_logprobs, batch, temperature)


def _row_logprobs(model: PreTrainedModel, batch: Batch, temperature: float) -> Tensor:
    head: Any = model.get_output_embeddings()
    logprobs = linear_token_logprobs(
        hidden_states(model, batch),
        head.weight,
        batch.targets,
        bias=head.bias,
        hidden_index=batch.hidden_index,
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
    batch = Batch(
        token_ids=ids,
        position_ids=torch.arange(size),
        visible_until=torch.full((size,), size, dtype=torch.int32),
        hidden_index=torch.arange(len(prefix_ids) - 1, size - 1),
        targets=ids[len(prefix_ids) :],
        old_logprobs=torch.zeros(len(token_ids)),
        advantages=torch.zeros(len(token_ids)),
        loss_mask=torch.ones(len(token_ids), dtype=torch.bool),
        policy_norm=1.0,
    )
    batch = to_device(batch, next(model.parameters()).device)
    return row_logprobs(model, batch, temperature).tolist()


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """The batch with every tensor on `device`."""
    moved = {
        f.name: value.to(device)
        for f in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, f.name), Tensor)
    }
    return dataclasses.replace(batch, **moved)
