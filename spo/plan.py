"""`--dry-run`: what a recipe would download, hold in memory and generate."""

from __future__ import annotations

from pathlib import Path

from spo.config.policy import PolicyConfig
from spo.config.recipe import Recipe, evaluation_sets
from spo.config.shape import Cost
from spo.fit import size_of
from spo.tasks import check_data, sources_of, task_of
from spo.tasks.sources import state

BYTES = {"float32": 4, "bfloat16": 2}
STATES = {"local": "local", "cached": "in the hub's cache", "download": "would be downloaded"}


def describe(recipe: Recipe, card: float | None = None) -> str:
    """A page of text: sources, memory, disk of the weights, tokens of an iteration.

    `card` is the memory to fit into, in bytes; by default that of the device, if it is here.

    It asks no server, and reads the first rows of data files that are here. Raises ValueError if a
    source neither exists nor can be on the hub, and for rows that training would refuse.
    """
    cost = cost_of_iteration(recipe)
    train, count = recipe.train, parameters(recipe.policy)
    # Replacements begin below the limit, at most one for each prompt at a time.
    refilled = train.refill + cost.sampled + cost.probed if train.refill else 0
    evaluated = sum(
        one.eval.problems * (1 + one.eval.sampled * one.eval.samples)
        for one in evaluation_sets(recipe).values()
    )
    steps = train.epochs * min(train.minibatches, train.prompts)
    sections = {
        "sources": [
            f"policy  {recipe.policy.path}: {_policy_state(recipe)}",
            *_data(recipe),
        ],
        "memory": _memory(recipe, count, card),
        "disk": _disk(recipe, count),
        "an iteration, at most": [
            f"{train.prompts} prompts, {cost.graded:,} responses to grade",
            f"{cost.sampled:,} sampled tokens to train on",
            f"{cost.probed:,} tokens of probes" if cost.probed else None,
            f"{refilled:,} tokens of replacements, train.refill={train.refill:,} and the last wave"
            if train.refill
            else None,
            _replayed(recipe),
            _steps(steps),
        ],
        "the run": [
            f"{train.iterations:,} iterations, {_steps(train.iterations * steps)}",
            f"at most {train.iterations * (cost.sampled + cost.probed + refilled):,} tokens",
            f"and {evaluations(recipe)} evaluations of at most "
            f"{evaluated * recipe.sampling.max_new_tokens:,} tokens",
        ],
    }
    lines = [f"{recipe.name}: {recipe.shape_kind} on {recipe.task}"]
    for title, entries in sections.items():
        lines += ["", title, *(f"  {entry}" for entry in entries if entry)]
    return "\n".join(lines)


def cost_of_iteration(recipe: Recipe) -> Cost:
    """Upper bounds on one rollout.

    They assume that no response ends early and, for chains, that every token is a boundary that the
    partition may take. `engine.align_segments` may add half a cache block per segment.
    """
    one, prompts = recipe.shape.cost(recipe.sampling.max_new_tokens), recipe.train.prompts
    return Cost(one.sampled * prompts, one.graded * prompts, one.probed * prompts)


def _steps(count: int) -> str:
    return f"{count:,} optimiser step{'s' if count != 1 else ''}"


def evaluations(recipe: Recipe) -> int:
    """Number of evaluations of a full-length run: at its start, at its end and in between."""
    iterations, every = recipe.train.iterations, recipe.eval.every
    return 2 + (iterations - 1) // every if every else 2


def _replayed(recipe: Recipe) -> str | None:
    train = recipe.train
    if not train.replay_nodes:
        return None
    if train.replay_samples is not None:
        return f"{train.replay_samples:,} nodes trained"
    waiting = train.prompts * train.replay_age
    return f"{waiting * train.replay_nodes:,} nodes trained, those of earlier iterations included"


def parameters(policy: PolicyConfig, *, adapters: bool = False) -> int | None:
    """Number of weights, or of those of its adapters, from the model's config; None if that is not
    on this machine."""
    import torch

    from spo.learn import lora
    from spo.models.load import policy_class

    if not _is_here(policy):
        return None
    trusted = {"trust_remote_code": policy.trust_remote_code, "local_files_only": True}
    auto, config = policy_class(policy.source, **trusted)
    with torch.device("meta"):
        model = auto.from_config(config, trust_remote_code=policy.trust_remote_code)
        if adapters:
            lora.attach(model, policy, seed=0)
            return sum(p.numel() for _, p in lora.adapter(model))
    return sum(p.numel() for p in model.parameters())


def _policy_state(recipe: Recipe) -> str:
    """Where the policy is; what is on this machine must hold what the recipe needs of it."""
    from spo.models.chat import prompt_writer
    from spo.models.files import require_weights
    from spo.models.tokenizer import load_tokenizer

    policy = recipe.policy
    if not _is_here(policy):
        return STATES["download"]
    require_weights(policy.source)
    prompt_writer(recipe.data, load_tokenizer(policy))
    if policy.path == "embedded":
        return "ships with the package"
    return STATES["local" if Path(policy.path).exists() else "cached"]


def _is_here(policy: PolicyConfig) -> bool:
    """Whether the policy need not be downloaded. Raises ValueError for a folder without a model."""
    from huggingface_hub import try_to_load_from_cache

    from spo.models.files import require_folder

    require_folder(policy.source)
    if Path(policy.source).is_dir():
        return True
    return isinstance(try_to_load_from_cache(policy.source, "config.json"), str)


def _data(recipe: Recipe) -> list[str]:
    lines = []
    sets = {"train": recipe} | evaluation_sets(recipe)
    for name, one in sets.items():
        split = "train" if name == "train" else "test"
        check_data(one, split)
        found = [f"{s}: {STATES[state(s)]}" for s in sources_of(one, task_of(one), split)]
        lines += [f"{name:7s} {where}" for where in found or ["generated"]]
    return lines


def _memory(recipe: Recipe, count: int | None, card: float | None) -> list[str]:
    from spo.fit import memory_lines
    from spo.models.load import policy_class
    from spo.models.tokenizer import load_tokenizer, vocab_size

    if count is None:
        return ["unknown until the policy's config.json is here"]
    policy = recipe.policy
    trusted = {"trust_remote_code": policy.trust_remote_code, "local_files_only": True}
    auto, config = policy_class(policy.source, **trusted)
    known = vocab_size(load_tokenizer(policy))
    try:
        lines = memory_lines(recipe, auto, config, vocabulary=known, card=card)
    except ValueError as error:
        lines = [f"unknown: {error}"]
    return [f"{count:,} weights", *lines]


def _disk(recipe: Recipe, count: int | None) -> list[str]:
    """What the run keeps, without the nodes of a replay buffer."""
    policy, train = recipe.policy, recipe.train
    kept = f"{train.keep_checkpoints} checkpoint{'s' * (train.keep_checkpoints > 1)}"
    if count is None:
        return [f"unknown until the policy's config.json is here: {kept}, and one being written"]
    whole = count * BYTES[policy.dtype]
    if policy.lora:
        stored = (parameters(policy, adapters=True) or 0) * BYTES["float32"]
        one = 3 * stored  # with AdamW's two moments
    else:
        stored = count * _stored(policy)
        one = stored + 2 * whole
        one += whole if stored < whole else 0  # the bits that the policy's folder lacks
    one += 3 * whole if recipe.credit.critic else 0
    one += whole if train.reference_every else 0
    best = 3 * stored if train.keep_best else 0
    most = one * (train.keep_checkpoints + 1) + best
    return [
        f"{size_of(one)}  a checkpoint",
        *([f"{size_of(best)}  best policies, three at most for a moment"] if best else []),
        f"{size_of(most)}  in all, at most: {kept}, and one being written",
    ]


def _stored(policy: PolicyConfig) -> int:
    """Bytes of most weights in the policy's folder; where it is not whole, those of training."""
    from spo.learn.policy_folder import stored_dtypes
    from spo.models.files import start_folder

    _, usual = stored_dtypes(start_folder(policy.source))
    return usual.itemsize if usual is not None else BYTES[policy.dtype]
