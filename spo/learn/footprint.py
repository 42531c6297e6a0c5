"""What a run holds in the memory of the policy's device, and its peak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spo.config.recipe import Recipe
from spo.learn.optimizer import BLOCK, state_bytes
from spo.learn.trace import Pack, Traced
from spo_kernels.head import MEMORY_BUDGET

BYTES = {"float32": 4, "bfloat16": 2}
NF4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # bytes per weight: blocks of 64 with an 8-bit scale each
PROMPT = 512  # tokens of a prompt where the recipe has no limit
VLLM_CACHE = 1 << 30  # bytes, on a CPU
HOST = 100 << 20  # bytes that loading and PyTorch's CPU kernels keep beside tensors, as measured
FINISHED = 16  # slots of the embedded engine for finished sequences, at first


@dataclass(frozen=True)
class Footprint:
    """Bytes on the policy's device."""

    held: dict[str, float]  # all the time, by what it is
    stages: dict[str, float]  # on top, while something is done; one at a time

    @property
    def stage(self) -> str:
        """What is done at the peak."""
        return max(self.stages, key=lambda name: self.stages[name])

    @property
    def peak(self) -> float:
        return sum(self.held.values()) + self.stages[self.stage]


def footprint(
    recipe: Recipe,
    config: Any,  # of the policy
    counts: Callable[..., Traced],  # `trace` of that configuration
    *,
    card: float | None = None,  # bytes of the GPU, of which vLLM takes its share; None: unknown
    pack: Pack | None = None,  # the largest batch; by default that of the recipe's limits
) -> Footprint:
    """Count a run's memory: from the model's configuration, without its weights.

    held = weights + optimiser's state + reference + critic + engine
    peak = held + the largest of: the rollout with an engine that sleeps otherwise; forward and
    backward of one batch with the gradients; the optimiser's step with the gradients; the forward
    of a reference that waits on the host.

    The batch is `largest_batch`; spo/learn/trace.py counts what it takes. A critic is counted as
    the policy's twin, because its batches have the same tokens. Raises ValueError if the model
    cannot be counted.
    """
    train, policy = recipe.train, recipe.policy
    reference = bool(recipe.loss.kl_coef or recipe.credit.reference)
    longest = longest_path(recipe, config)
    total = tokens_of_step(recipe, longest)
    pack = pack or largest_batch(recipe, longest, total)
    parked = "reference" in train.offload
    counted = counts(policy, pack, accumulates=total > pack.tokens, scores=reference and parked)
    weights, trained = weight_bytes(counted, recipe), counted.count(trained=True)
    state = 0.0 if "optimizer" in train.offload else trained * _state(recipe)
    own = counted.count() - _adapters(counted, recipe)
    engine, asleep = _engine(recipe, config, own, longest, card)
    critic = recipe.credit.critic is not None
    held = {
        f"weights, {policy.dtype}" + (", under adapters" if policy.lora else ""): weights,
        "optimiser": state,
        "reference": weights if reference and not (parked or policy.lora) else 0,
        "critic and its optimiser": weights + state if critic else 0,
        "engine": engine,
        "buffers of PyTorch": 0 if policy.device.startswith("cuda") else HOST,
    }
    backward = counted.backward + _unpacked(counted, recipe)
    gradients = trained * _trained_bytes(recipe)
    stages = {
        "the rollout": asleep,
        "forward and backward, with the gradients": backward,
        "the optimiser's step, with the gradients": (
            gradients + _step_buffers(counted, recipe) + _head_buffers(recipe, config, pack)
        ),
    }
    if reference and parked:
        stages["the reference's forward"] = weights + counted.forward
    return Footprint({name: size for name, size in held.items() if size}, stages)


def longest_path(recipe: Recipe, config: Any) -> int:
    """Most tokens of a prompt with its response."""
    asked = recipe.data.max_prompt_tokens or PROMPT
    limits = (
        recipe.sampling.max_new_tokens + asked,
        recipe.engine.max_model_len,
        getattr(config.get_text_config(decoder=True), "max_position_embeddings", None),
    )
    return min(limit for limit in limits if limit)


def tokens_of_step(recipe: Recipe, longest: int) -> int:
    """Most tokens of an optimiser step: all that its prompts sample, and the prompts."""
    train = recipe.train
    prompts = -(-train.prompts // train.minibatches)
    one = recipe.shape.cost(recipe.sampling.max_new_tokens).sampled
    return prompts * (one + max(longest - recipe.sampling.max_new_tokens, 0))


def largest_batch(recipe: Recipe, longest: int, total: int) -> Pack:
    """As many tokens as a batch may have, a path that is longer than it, or the whole step.

    Every token is taken to be trained: how many the mask drops is not known before.
    """
    tokens = max(min(recipe.train.tokens_per_batch, total), min(longest, total))
    return Pack(tokens, min(longest, tokens), tokens)


def weight_bytes(counted: Traced, recipe: Recipe) -> float:
    """Of the policy, its adapters included."""
    policy, size = recipe.policy, 0.0
    for name, count in counted.weights.items():
        each: float = BYTES[policy.dtype]
        if policy.lora is not None and name in counted.trained:
            each = 4
        elif policy.lora is not None and policy.lora.quantize == "nf4" and name in counted.matrices:
            each = NF4
        size += count * each
    return size


def _adapters(counted: Traced, recipe: Recipe) -> int:
    return counted.count(trained=True) if recipe.policy.lora else 0


def _trained_bytes(recipe: Recipe) -> int:
    """Of a trained weight and of its gradient: adapters are in fp32."""
    return 4 if recipe.policy.lora else BYTES[recipe.policy.dtype]


def _state(recipe: Recipe) -> float:
    """Bytes of the optimiser's state per trained weight."""
    if recipe.policy.lora is None:
        return state_bytes(recipe)
    return 2 * (1 + 4 / BLOCK) if recipe.train.optimizer == "adamw_8bit" else 8


def _unpacked(counted: Traced, recipe: Recipe) -> float:
    """The largest layer that is held in 4 bits, as its product needs it."""
    if recipe.policy.lora is None or recipe.policy.lora.quantize == "none":
        return 0
    largest = max(n for name, n in counted.weights.items() if name in counted.matrices)
    return largest * BYTES[recipe.policy.dtype]


def _step_buffers(counted: Traced, recipe: Recipe) -> float:
    """What the step of the largest tensor makes, in fp32; on a GPU PyTorch's own AdamW makes the
    roots of all second moments at once."""
    train, short = recipe.train, _trained_bytes(recipe) == 2
    largest = max(n for name, n in counted.weights.items() if name in counted.trained)
    eight_bit, masters = train.optimizer == "adamw_8bit", train.master_weights == "fp32"
    if not (eight_bit or "optimizer" in train.offload or short):
        on_gpu = recipe.policy.device.startswith("cuda")
        size = counted.count(trained=True) if on_gpu else 2 * largest
        return size * _trained_bytes(recipe)
    moved = eight_bit or (short and not masters) or "optimizer" in train.offload
    return 4 * largest * (2 + 2 * short + 2 * moved)


def _head_buffers(recipe: Recipe, config: Any, pack: Pack) -> float:
    """On a CPU the head keeps its logits, and where it trains its gradient, for the next batch."""
    if recipe.policy.device.startswith("cuda"):
        return 0
    text = config.get_text_config(decoder=True)
    kept = min(MEMORY_BUDGET, 4 * pack.rows * text.vocab_size)
    if recipe.policy.lora is None:
        kept += text.vocab_size * text.hidden_size * BYTES[recipe.policy.dtype]
    return kept


def _engine(
    recipe: Recipe, config: Any, weights: int, longest: int, card: float | None
) -> tuple[float, float]:
    """Bytes of the engine's weights and cache, all slots at their longest: those that it holds all
    the time, and those that it holds during a rollout."""
    engine = recipe.engine
    if engine.addresses:
        return 0, 0
    size, on_gpu = BYTES[engine.dtype], recipe.policy.device.startswith("cuda")
    own: float = size * weights
    if engine.name == "vllm" and on_gpu and card is not None:
        own, cache = 0, card * engine.memory_fraction
    elif engine.name == "vllm" and not on_gpu:
        cache = VLLM_CACHE
    else:
        cache = size * _slots(recipe, config, longest)
    if not engine.sleep_mode:
        return own + cache, 0
    return (own, cache) if engine.name == "hf" else (0, own + cache)


def _slots(recipe: Recipe, config: Any, longest: int) -> int:
    """Numbers in the engine's cache."""
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    token = 2 * text.num_hidden_layers * (getattr(text, "num_key_value_heads", 0) or heads) * width
    slots = recipe.engine.max_num_seqs + FINISHED * (recipe.engine.name == "hf")
    return slots * longest * token
