"""The recipe of a run: frozen dataclasses, a docstring per field. YAML in, dotted overrides on top;
an unknown key or a wrong type is one sentence that names it.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

if TYPE_CHECKING:
    from pydantic import ValidationError

STRICT = {"extra": "forbid"}


@dataclass(frozen=True)
class PolicyConfig:
    """The policy that is trained."""

    __pydantic_config__ = STRICT

    path: str = "embedded"
    """Folder with config.json, safetensors weights and tokenizer.json, or a hub id. `embedded` is
    the small policy that ships with the package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained weights and of the optimiser's state."""
    autocast: bool = False
    """Run the forward in bfloat16 over float32 weights."""
    device: str = "cpu"
    """Where the trainer and the engine run: cpu or cuda."""
    packing: Literal["tree", "rows"] = "tree"
    """tree: every unique token once. rows: one row per node with its whole prefix, for models
    whose layers cannot be packed."""
    attention: Literal["auto", "dense", "grouped", "flex", "varlen"] = "auto"
    """Attention over a pack. auto: grouped on the CPU, flex on CUDA. varlen needs flash-attn."""
    trust_remote_code: bool = False
    """Run code that comes with the model folder. Leave it off for models you did not write."""


@dataclass(frozen=True)
class EngineConfig:
    """The rollout engine."""

    __pydantic_config__ = STRICT

    name: Literal["vllm", "hf"] = "vllm"
    """vllm, or hf: the embedded engine, which needs transformers alone."""
    addresses: tuple[str, ...] = ()
    """vllm: servers that sample instead of this process, http://host:port each, started as
    docs/rollout.md says."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the engine's weights and cache."""
    max_num_seqs: int = 128
    """Sequences that run at once."""
    max_model_len: int | None = None
    """Longest prompt + response, in tokens; the model's own limit by default."""
    memory_fraction: float = 0.5
    """vllm on a GPU: share of the card for weights and cache; the trainer needs the rest."""
    sleep_mode: bool = False
    """vllm on a GPU: give the engine's memory to the trainer while it trains."""
    align_segments: bool = False
    """Move the segments of trees to lengths at which a branch recomputes one token only, by at most
    half a cache block (vllm; hf shares prefixes of any length)."""


@dataclass(frozen=True)
class SamplingConfig:
    """How training samples are drawn."""

    __pydantic_config__ = STRICT

    temperature: float = 1.0
    """Temperature of sampling and of every logprob in the loss."""
    top_p: float = 1.0
    """Must stay 1: a truncated distribution biases the ratio by the mass it drops."""
    top_k: int = 0
    """Must stay 0 (off), for the same reason."""
    max_new_tokens: int = 64
    """Longest response, in tokens."""
    stages: tuple[tuple[float, int], ...] = ()
    """Shorter limits at first, for a context that grows: (share of the run, tokens) pairs; until
    that share of `train.iterations` or `train.max_generated_tokens` is done, responses end there.
    """
    truncated: Literal["zero", "drop", "penalty"] = "zero"
    """What a response cut by the limit earns: 0, nothing (left out; of a chain the segment that was
    cut, as probes value the others), or -1."""


@dataclass(frozen=True)
class ShapeConfig:
    """What grows under each prompt."""

    __pydantic_config__ = STRICT

    kind: Literal["star", "tree", "chain"] = "tree"
    """star: independent responses. tree: branches at fixed lengths. chain: responses cut into
    segments, each boundary probed."""
    group_size: int = 8
    """star and chain: responses per prompt."""
    widths: tuple[int, ...] = (6, 6, 6)
    """tree: children per node, level by level."""
    segment_tokens: tuple[int, ...] = (30, 30)
    """tree: length of the segments of every level but the last. chain with partition fixed: one
    number."""
    num_probes: int = 9
    """chain: completions that estimate the value of a boundary."""
    partition: Literal["cutpoint", "fixed", "steps", "sentences"] = "cutpoint"
    """chain: where to cut: before every `interval`-th low-probability token, every
    `segment_tokens[0]` tokens, after line breaks (VinePPO), or after those and sentences outside of
    LaTeX math (VinePPO on MATH)."""
    prob_threshold: float = 0.9
    """chain: a token is a cutpoint if its sampling probability is below this."""
    interval: int = 5
    """chain: cutpoints per segment."""
    max_steps: int = 25
    """chain with partition steps or sentences: most segments per response."""
    rescore: bool = False
    """chain: take the probabilities from the trainer's forward instead of the sampler."""


@dataclass(frozen=True)
class AdvantageConfig:
    """How values become advantages."""

    __pydantic_config__ = STRICT

    estimator: Literal["values", "gae", "correct", "pairs"] = "values"
    """values: differences of Monte-Carlo values. On stars also gae: a critic's, per token (PPO);
    correct: 1 on right responses (RestEM); pairs: right against wrong responses (DPO)."""
    baseline: Literal["parent", "loo"] = "parent"
    """parent: V(node) - V(parent). loo: minus the mean of the other siblings (trees and stars)."""
    scale: Literal["none", "std"] = "none"
    """std: divide by the siblings' population standard deviation + 1e-8 (trees and stars)."""
    root_value: Literal["group", "mc", "none"] = "group"
    """chain: value of the prompt: mean reward of its responses, probes, or none (the first segment
    then gets advantage 0)."""
    node_weight: Literal["token", "path"] = "token"
    """token: every token weighs the same, so the last level of a tree outweighs the first. path: a
    node's advantage is divided by the numbers of siblings along its path (trees and stars)."""
    whiten: Literal["off", "batch"] = "off"
    """batch: shift and scale the trained nodes' advantages (gae: the tokens') to mean 0 and
    deviation 1."""
    gamma: float = 1.0
    """gae: discount per token."""
    lam: float = 1.0
    """gae: weight of longer estimates; 1 takes the response's reward as it is."""
    max_correct: int = 4
    """correct: most right responses per prompt that train."""


@dataclass(frozen=True)
class LossConfig:
    """The policy loss."""

    __pydantic_config__ = STRICT

    kind: Literal["policy", "nll", "dpo"] = "policy"
    """policy: masked PPO. nll: negative log-likelihood of the right responses. dpo: preference of
    the right over the wrong ones; the start policy is its reference."""
    prob_threshold: float | None = 0.9
    """Train only tokens whose sampling probability is below this; null switches the mask off."""
    clip_eps_low: float = 0.2
    """The ratio is clipped at 1 - this."""
    clip_eps_high: float = 0.2
    """The ratio is clipped at 1 + this."""
    log_ratio_clamp: float = 10.0
    """Bound on the log ratio before it is exponentiated."""
    policy_norm: Literal["tokens", "constant"] = "tokens"
    """What the sum over tokens is divided by. tokens: the number of those that train in the step.
    constant: prompts of the step * sampling.max_new_tokens, so that what a response counts for
    depends on no length, and the step can be a multiple of the policy gradient."""
    kl_coef: float = 0.0
    """Weight of the KL term towards the start policy; 0 loads no reference model."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Per-token estimator of the KL term."""
    kl_scope: Literal["masked", "all"] = "masked"
    """Tokens that the KL term covers: those of the mask, or every trained token."""
    beta: float = 0.1
    """dpo: how strongly the policy is held to the reference."""
    dpo_positive: float = 0.0
    """dpo: above 0 it is DPO-Positive, and this the weight of its penalty."""


@dataclass(frozen=True)
class CriticConfig:
    """PPO's critic; it starts from the policy's weights."""

    __pydantic_config__ = STRICT

    learning_rate: float = 1e-5
    """Peak learning rate of its AdamW; it rises and decays with the policy's."""
    value_clip: float = 0.2
    """A value is trained no further than this from where it was at the rollout."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    __pydantic_config__ = STRICT

    iterations: int = 100
    """Rollouts, each followed by training."""
    max_generated_tokens: int | None = None
    """Stop after the iteration in which this many tokens have been generated."""
    prompts: int = 16
    """Prompts per iteration."""
    stream_depth: int = 0
    """Admit prompts of this many iterations ahead whenever the engine has empty places, so that it
    stays full while the last responses of this one run. Tokens are then up to this many weight
    versions old, and two runs with one seed need not be equal."""
    epochs: int = 1
    """Passes over an iteration's nodes."""
    restart: bool = False
    """Train every iteration from the start policy anew, while its rollouts come from the policy
    that the last iteration made (RestEM)."""
    minibatches: int = 4
    """Optimiser steps per epoch; prompts are dealt out among them."""
    tokens_per_batch: int = 8192
    """Most packed tokens of one forward."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: ddp keeps whole weights on every rank, fsdp shards them (FSDP2)."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    warmup_share: float = 0.03
    """Share of the optimiser steps over which the rate rises linearly."""
    decay: Literal["linear", "constant"] = "linear"
    """What the rate does after the warm-up."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    replay_nodes: int = 0
    """Most nodes per prompt that train in an iteration, older ones included; 0 trains every node
    at once and keeps none."""
    replay_samples: int | None = None
    """Most nodes that train in an iteration, of all prompts together; the others stay in the
    buffer."""
    replay_age: int = 8
    """Nodes of this many iterations ago are dropped from the buffer."""
    max_skipped: int = 3
    """Stop after this many steps in a row whose loss or gradient is not finite."""
    probe_tolerance: float = 0.05
    """Largest difference between the trainer's and the engine's logprobs of a fixed prompt after a
    weight update; above it the run stops."""
    checkpoint_every: int = 1
    """Iterations between checkpoints."""
    seed: int = 0
    """Of prompts, sampling and the order of training."""


@dataclass(frozen=True)
class DataConfig:
    """Where a task's problems come from and how they are put to the policy."""

    __pydantic_config__ = STRICT

    train: str | None = None
    """File, folder or hub data set (owner/name, owner/name@revision, owner/name/folder) of the
    training problems; by default the task's own."""
    test: str | None = None
    """The same for the test problems."""
    template: str = "{problem}"
    """The prompt: `{problem}` stands for the problem; special tokens and the turns of a chat are
    written out, other braces are kept."""
    max_prompt_tokens: int | None = None
    """Training problems with longer prompts are left out."""
    options: dict[str, int] = field(default_factory=dict)
    """Of the task: numbers of countdown, people of knights_knaves."""


@dataclass(frozen=True)
class EvalConfig:
    """Pass@1 on the task's test split."""

    __pydantic_config__ = STRICT

    every: int = 10
    """Iterations between evaluations; 0 evaluates at the start and the end only."""
    problems: int = 200
    """Test problems."""
    sampled: bool = True
    """Also draw one sample per problem at the training temperature."""


@dataclass(frozen=True)
class Config:
    """One run."""

    __pydantic_config__ = STRICT

    name: str = "run"
    """Shown in reports and used as the default output folder, runs/<name>."""
    task: str = "arithmetic"
    """What is trained on: see `spo.tasks.TASKS`."""
    out: str | None = None
    """Folder for checkpoints, metrics and the report."""
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def out_dir(self) -> Path:
        return Path(self.out or f"runs/{self.name}")


def load_config(path: str | os.PathLike | None = None, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe and apply overrides such as `train.learning_rate=1e-5`.

    Raises ValueError with one sentence for a missing file, bad YAML, an unknown key, a wrong type,
    or settings that contradict each other.
    """
    from pydantic import TypeAdapter, ValidationError  # not needed to use a Config made in code

    from spo.config.checks import check

    tree: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ValueError(f"recipe {path}: cannot be read ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"recipe {path}: not UTF-8 text ({error.reason})") from error
        except yaml.YAMLError as error:
            where = " ".join(str(error).split())
            raise ValueError(f"recipe {path}: not valid YAML ({where})") from error
        if not isinstance(loaded or {}, dict):
            raise ValueError(f"recipe {path}: expected a mapping of settings")
        tree = loaded or {}
    for override in overrides:
        _override(tree, override)
    groups = {f.name for f in dataclasses.fields(Config) if f.default_factory is not MISSING}
    tree = {
        key: {} if value is None and key in groups else value  # a group with nothing in it
        for key, value in tree.items()
    }
    try:
        config = TypeAdapter(Config).validate_python(tree)
    except ValidationError as error:
        raise ValueError(_sentence(error)) from error
    check(config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved recipe as YAML that `load_config` reads back."""
    tree = json.loads(json.dumps(dataclasses.asdict(config)))  # tuples to lists, as YAML has them
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")


def _override(tree: dict[str, Any], text: str) -> None:
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise ValueError(f"override {text!r}: expected key=value, such as train.learning_rate=1e-5")
    *groups, key = name.lstrip("-").split(".")
    for group in groups:
        if tree.get(group) is None:
            tree[group] = {}
        tree = tree[group]
        if not isinstance(tree, dict):
            raise ValueError(f"override {text!r}: {group} is a value, not a group of settings")
    try:
        tree[key] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(f"override {text!r}: the value is not valid YAML") from error


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        group: Any = Config
        for part in first["loc"][:-1]:
            group = {f.name: f.default_factory for f in dataclasses.fields(group)}[part]
        known = ", ".join(f.name for f in dataclasses.fields(group))
        return f"recipe: unknown key {where}; known here: {known}"
    return f"recipe: {where}: {first['msg']}, found {first['input']!r}"
