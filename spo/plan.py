"""What a recipe would fetch, hold in memory and generate, without fetching or training anything."""

from __future__ import annotations

from pathlib import Path

from spo.config.recipe import Config, PolicyConfig
from spo.grow.shapes import TreeShape
from spo.tasks import get_task, options_of
from spo.tasks.datafiles import state

BYTES = {"float32": 4, "bfloat16": 2}
GIB = 1 << 30
STATES = {"local": "local", "cached": "in the hub's cache", "download": "would be downloaded"}


def describe(config: Config) -> str:
    """A page of text: sources, memory of the parameters, tokens of an iteration.

    Asks no server. Raises ValueError where a source neither exists nor can be on the hub.
    """
    counts = tokens_per_iteration(config)
    train, evals = config.train, config.eval
    steps = train.epochs * min(train.minibatches, train.prompts)
    sections = {
        "sources": [
            f"policy  {config.policy.path}: {_policy_state(config.policy)}",
            *_data(config),
        ],
        "memory": _memory(config),
        "an iteration, at most": [
            f"{train.prompts} prompts, {counts['graded']:,} responses to grade",
            f"{counts['sampled']:,} tokens sampled to be trained on",
            f"{counts['probed']:,} tokens of probes" if counts["probed"] else None,
            _replayed(config),
            f"{steps} optimiser steps",
        ],
        "the run": [
            f"{train.iterations:,} iterations, {train.iterations * steps:,} optimiser steps",
            f"at most {train.iterations * (counts['sampled'] + counts['probed']):,} tokens",
            f"and {evaluations(config)} evaluations of at most "
            f"{evals.problems * (1 + evals.sampled) * config.sampling.max_new_tokens:,} tokens",
        ],
    }
    lines = [f"{config.name}: {config.shape.kind} on {config.task}"]
    for title, entries in sections.items():
        lines += ["", title, *(f"  {entry}" for entry in entries if entry)]
    return "\n".join(lines)


def tokens_per_iteration(config: Config) -> dict[str, int]:
    """Upper bounds on one rollout: `sampled` and `probed` tokens, `graded` responses.

    They assume that no response ends early and, for chains, that every token is a boundary that
    the partition may take. `engine.align_segments` may add half a cache block per segment.
    """
    shape, prompts, longest = config.shape, config.train.prompts, config.sampling.max_new_tokens
    if shape.kind == "tree":
        TreeShape(shape.widths, shape.segment_tokens, longest)  # says what is wrong with them
        nodes, tokens = prompts, 0
        lengths = [*shape.segment_tokens, longest - sum(shape.segment_tokens)]
        for width, length in zip(shape.widths, lengths, strict=True):
            nodes *= width
            tokens += nodes * length
        return {"sampled": tokens, "probed": 0, "graded": nodes}
    responses = prompts * shape.group_size
    probes = probed = 0
    if shape.kind == "chain":
        starts = boundaries(config)
        probes = responses * len(starts) * shape.num_probes
        probed = responses * shape.num_probes * sum(longest - start for start in starts)
        if config.advantage.root_value == "mc":
            probes += prompts * shape.num_probes
            probed += prompts * shape.num_probes * longest
    return {"sampled": responses * longest, "probed": probed, "graded": responses + probes}


def evaluations(config: Config) -> int:
    """How often a run of full length evaluates: at its start, at its end and in between."""
    iterations, every = config.train.iterations, config.eval.every
    return 2 + (iterations - 1) // every if every else 2


def _replayed(config: Config) -> str | None:
    train = config.train
    if not train.replay_nodes:
        return None
    if train.replay_samples is not None:
        return f"{train.replay_samples:,} nodes trained"
    waiting = train.prompts * train.replay_age
    return f"{waiting * train.replay_nodes:,} nodes trained, those that wait from before included"


def boundaries(config: Config) -> range:
    """Where a chain's response of full length is probed, if it is cut as often as can be."""
    shape, longest = config.shape, config.sampling.max_new_tokens
    if shape.partition == "fixed":
        if len(shape.segment_tokens) != 1 or shape.segment_tokens[0] < 1:
            raise ValueError(
                "shape.segment_tokens: partition fixed takes one positive length, "
                f"found {shape.segment_tokens}"
            )
        return range(shape.segment_tokens[0], longest, shape.segment_tokens[0])
    if shape.partition in ("steps", "sentences"):
        return range(1, min(shape.max_steps, longest))
    return range(1, longest, shape.interval)


def parameters(policy: PolicyConfig) -> int | None:
    """Number of weights, from the model's config alone; None if that is not on this machine."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from spo.learn.model import model_folder

    folder = model_folder(policy.path)
    if _policy_state(policy) == STATES["download"]:
        return None
    options = {"trust_remote_code": policy.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"policy.path: {policy.path} holds no model config ({reason})") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **options)
    return sum(p.numel() for p in model.parameters())


def _policy_state(policy: PolicyConfig) -> str:
    from huggingface_hub import try_to_load_from_cache

    if policy.path == "embedded":
        return "ships with the package"
    if Path(policy.path).exists():
        return STATES["local"]
    if policy.path.startswith((".", "/", "~")) or policy.path.count("/") > 1:
        raise ValueError(f"policy.path: {policy.path} does not exist")
    cached = isinstance(try_to_load_from_cache(policy.path, "config.json"), str)
    return STATES["cached" if cached else "download"]


def _data(config: Config) -> list[str]:
    hub = getattr(get_task(config.task), "SOURCE", {})
    lines = []
    for split in ("train", "test"):
        source = options_of(config, split).get("source") or hub.get(split)
        where = f"{source}: {STATES[state(source)]}" if source else "generated"
        lines.append(f"{split:7s} {where}")
    return lines


def _memory(config: Config) -> list[str]:
    count = parameters(config.policy)
    trained, sampler = BYTES[config.policy.dtype], BYTES[config.engine.dtype]
    per_weight = {
        f"weights, {config.policy.dtype}": trained,
        "gradients": trained,
        "optimiser": 2 * trained,  # AdamW's two moments
        "reference": trained if config.loss.kl_coef or config.loss.kind == "dpo" else 0,
        "critic, its gradients and optimiser": (
            4 * trained if config.advantage.estimator == "gae" else 0
        ),
        f"engine's weights, {config.engine.dtype}": sampler,
    }
    per_weight = {name: size for name, size in per_weight.items() if size}
    if count is None:
        return [
            "unknown until the policy's config.json is here; bytes per weight:",
            *(f"{size:9d}  {name}" for name, size in per_weight.items()),
        ]
    return [
        f"{count:,} weights",
        *(f"{count * size / GIB:9.3f} GiB  {name}" for name, size in per_weight.items()),
        f"{count * sum(per_weight.values()) / GIB:9.3f} GiB  in all, "
        "without activations and the engine's cache",
    ]
