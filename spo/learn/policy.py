"""Loading the policy, and the check that it trains on what it is."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spo.config.policy import PolicyConfig
from spo.engines.attention_calls import attention_calls
from spo.learn.attention import PREFIX
from spo.learn.lora import keep_differentiable, quantization
from spo.learn.model import (
    find_router_coefficient,
    hidden_states,
    row_logprobs,
    scored_batch,
    to_device,
)
from spo.learn.recompute import checkpoint_layers, compile_layers
from spo.models.check import (
    LONGEST,
    SHORT,
    SHORT_TYPES,
    agree,
    counts_tokens,
    in_dtype,
    narrow_windows,
    own_logprobs,
    probe_ids,
    traits,
)
from spo.models.head import find_head
from spo.models.load import attention, body, load_causal, longest, set_attention, windows
from spo.models.tokenizer import load_tokenizer, vocab_size
from spo.records import Batch

NOT_CAUSAL = "reads tokens that come later: it is no causal model"
SCORED = 8  # rows of a branch that the check compares


def load_policy(
    config: PolicyConfig, path: str | None = None, *, limit: int | None = None
) -> PreTrainedModel:
    """A causal model that trains on packed batches, or on rows if `policy.packing` is rows.

    Args:
        path: a checkpoint's model folder; by default the recipe's start policy.
        limit: longest sequence of the run, in tokens; by default the model's own.

    Raises ValueError with one sentence if it cannot be loaded, or if what would train differs from
    the model's own logprobs.
    """
    quantized = {} if config.lora is None else quantization(config.lora)
    model = load_model(config, path, limit=limit, **quantized)
    if quantized:
        keep_differentiable(model)
    try:
        known = vocab_size(load_tokenizer(config))
    except ValueError:  # a folder without a tokenizer: token ids are all that there is
        known = None
    with in_dtype(model, torch.float32) as done:
        head = find_head(model, known)
        check_policy(model, config, head.vocab_size, limit)
        find_router_coefficient(model)
    if done and next(model.parameters()).dtype in SHORT_TYPES:
        check_policy(model, config, head.vocab_size, limit)  # as it will run, too
    model.train(config.dropout)
    if config.dropout and config.packing == "tree":
        ids = probe_ids(model, head.vocab_size)[:SHORT]
        with torch.no_grad():  # raises if it drops out attention, which packs cannot
            hidden_states(model, to_device(_chains([ids], [1]), next(model.parameters()).device))
    return model


def load_model(
    config: PolicyConfig, path: str | None = None, *, limit: int | None = None, **options
) -> PreTrainedModel:
    """The model of `load_policy` before its checks, or with `auto` that of another auto class."""
    model = load_causal(
        path or config.source,
        dtype=getattr(torch, config.dtype),
        device=config.device,
        trust_remote_code=config.trust_remote_code,
        limit=limit,
        **options,
    )
    if config.packing == "tree":
        set_attention(model, PREFIX + attention_backend(config))
    else:
        set_attention(model, complete_attention(model))
    if config.compile:
        compile_layers(model)
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    return model


def attention_backend(config: PolicyConfig) -> str:
    """The backend of `policy.attention`: by default grouped on the CPU, flex elsewhere."""
    own = "grouped" if torch.device(config.device).type == "cpu" else "flex"
    if config.attention in ("grouped", "flex") and config.attention != own:
        where = "the CPU" if own == "grouped" else "a GPU"
        raise ValueError(
            f"policy.attention={config.attention} does not train on {where}: leave it out there"
        )
    return own if config.attention == "auto" else config.attention


def complete_attention(model: PreTrainedModel) -> str:
    """The model's own attention; eager where its default leaves out a soft cap."""
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        return "eager"
    return vars(model)["own_attention"]


def check_policy(
    model: PreTrainedModel,
    config: PolicyConfig,
    known: int | None = None,
    limit: int | None = None,
) -> None:
    """Raise ValueError if the trainer's logprobs are not those of the model's own forward.

    A pack of two trees is scored: a prompt with a short and a long branch, past the windows of the
    model's attention where its context reaches so far, and a short neighbour. That fails if layers
    mix tokens elsewhere than in the attention interface (recurrent layers, convolutions), if masks
    or positions are the model's own, or if anything lies between hidden states and logits that the
    trainer leaves out. Windows too long for that are made narrow and checked a second time.

    Args:
        known: ids from here on are left out of every logprob.
        limit: longest sequence of the run, in tokens; by default the model's own.
    """
    reason = _reason(model, config.packing, known, limit)
    if reason is None:
        return
    if reason is NOT_CAUSAL:
        raise ValueError(f"policy.path: {config.path} {reason}")
    advice = "no other policy.attention or policy.packing trains it"
    before = attention(model)
    for setting, other in (
        ("policy.attention=dense", PREFIX + "dense"),
        ("policy.packing=rows", ""),
    ):
        if config.packing == "tree" and before != other:
            set_attention(model, other or complete_attention(model))
            if _reason(model, "tree" if other else "rows", known, limit) is None:
                advice = f"{setting} trains it"
                break
    if not advice.startswith("no") and not _sampled_by_hf(model):
        advice += ", with engine.name=vllm: engine.name=hf cannot run it"
    set_attention(model, before)
    raise ValueError(f"policy.path: {config.path} {reason}; {advice}")


def _sampled_by_hf(model: PreTrainedModel) -> bool:
    """Whether the embedded engine can run the model's layers, as far as one forward shows."""
    try:
        attention_calls(model, 2 * SHORT)
    except Exception:  # of the model's own code, too
        return False
    return True


def _reason(
    model: PreTrainedModel, packing: str, known: int | None, limit: int | None
) -> str | None:
    """Why the model would not train as it is set up; None: it would."""
    reason = _difference(model, known)
    if reason is not None or packing != "tree":
        return reason
    if counts_tokens(model):
        return "counts the tokens of its input in place of their positions"
    if not _packs(model):
        return "has attention of its own, outside transformers' attention interface"
    reach = min((x for x in (limit, longest(model)) if x is not None), default=sys.maxsize)
    unseen = [size for size in windows(model) if LONGEST < size < reach]
    if unseen:
        with narrow_windows(model):
            reason = _difference(model, known)
    if reason is not None:
        shorter = f"engine.max_model_len={unseen[0]} keeps a run within it"
        reason = f"attends within {unseen[0]} tokens in a way that packs leave out; {shorter}"
    return reason


def _difference(model: PreTrainedModel, known: int | None) -> str | None:
    """How the trainer's logprobs differ from the model's own; None: they agree."""
    ids = probe_ids(model, known)
    prompt, short, long = ids[: SHORT // 2], ids[1:SHORT], ids[SHORT // 2 :]
    paths = [prompt + short, prompt + long, short]
    scored = [len(short), min(SCORED, len(long)), len(short) - 1]
    dtype = next(model.parameters()).dtype
    try:
        own = [own_logprobs(model, path, n, known) for path, n in zip(paths, scored, strict=True)]
        beginning = own_logprobs(model, paths[0] + long[:1], scored[0] + 1, known)[:-1]
    except Exception as error:  # of the model's own code
        return f"does not run on token ids alone in {dtype} ({_first_line(error)})"
    if not agree(beginning, own[0], dtype):
        return NOT_CAUSAL
    packed = _packs(model)
    batch = _tree(prompt, paths, scored) if packed else _chains(paths, scored)
    first: Any = body(model).get_input_embeddings()
    try:
        with torch.no_grad():
            found = row_logprobs(model, to_device(batch, own[0].device), 1.0)
        # A backward of a few tokens: the one of the whole pack would need a step's memory.
        alone = to_device(_chains([short], [SHORT // 2]), own[0].device)
        torch.autograd.grad(row_logprobs(model, alone, 1.0).sum(), first.weight)
    except Exception as error:
        return f"cannot be {'packed' if packed else 'trained in rows'} ({_first_line(error)})"
    if agree(found, torch.cat(own), dtype):
        return None
    gaps = [float((a - b).abs().max()) for a, b in zip(found.split(scored), own, strict=True)]
    name = ("short", "long", "second")[gaps.index(max(gaps))]
    return (
        f"would train on logprobs that are {max(gaps):.2g} nats from its own, in the {name} of "
        f"three sequences; {traits(model)}"
    )


def _packs(model: PreTrainedModel) -> bool:
    return attention(model).startswith(PREFIX)


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _tree(prompt: list[int], paths: list[list[int]], scored: list[int]) -> Batch:
    """The first two paths as one tree under `prompt`, the third as a tree of its own."""
    start = len(prompt)
    first, second = len(paths[0]), len(paths[0]) + len(paths[1]) - start
    size = second + len(paths[2])
    until = [second] * start + [first] * (first - start) + [second] * (second - first)
    ends = [list(range(first)), [*range(start), *range(first, second)], [*range(second, size)]]
    ids = paths[0] + paths[1][start:] + paths[2]
    positions = [*range(first), *range(start, len(paths[1])), *range(len(paths[2]))]
    return _batch(ids, positions, until + [size] * len(paths[2]), ends, scored)


def _chains(paths: list[list[int]], scored: list[int]) -> Batch:
    """Every path as a row."""
    ids, positions, until, ends = [], [], [], []
    for path in paths:
        ends.append(list(range(len(ids), len(ids) + len(path))))
        ids += path
        positions += range(len(path))
        until += [len(ids)] * len(path)
    return _batch(ids, positions, until, ends, scored)


def _batch(
    ids: list[int],
    positions: list[int],
    until: list[int],
    ends: list[list[int]],  # places of each path's tokens in the pack
    scored: list[int],
) -> Batch:
    index = [place for path, n in zip(ends, scored, strict=True) for place in path[-n - 1 : -1]]
    target = [ids[p] for path, n in zip(ends, scored, strict=True) for p in path[-n:]]
    as_tensor: dict[str, Tensor] = {
        "token_ids": torch.tensor(ids),
        "position_ids": torch.tensor(positions),
        "visible_until": torch.tensor(until, dtype=torch.int32),
        "hidden_index": torch.tensor(index),
    }
    return scored_batch(torch.tensor(target), **as_tensor)
