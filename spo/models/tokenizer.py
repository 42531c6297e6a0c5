"""The policy's tokenizer."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spo.config.policy import PolicyConfig


def load_tokenizer(config: PolicyConfig) -> Any:
    """The policy's tokenizer. Raises ValueError with one sentence if it cannot be loaded.

    A tokenizer.json is read unchanged: AutoTokenizer silently replaces its pre-tokenizer for some
    model types (transformers 5.19: qwen2).
    """
    try:
        tokenizer = load_pretrained(PreTrainedTokenizerFast, config)
    except ValueError:
        tokenizer = load_pretrained(AutoTokenizer, config)  # no tokenizer.json
    if len(tokenizer) <= len(tokenizer.all_special_ids) or tokenizer.eos_token_id is None:
        raise ValueError(f"policy.path: {config.path} holds no tokenizer with an end token")
    return tokenizer


def load_pretrained(auto: Any, config: PolicyConfig, path: str | None = None, **options) -> Any:
    """`auto.from_pretrained` of `path`, by default of the policy's source.

    Args:
        auto: a class of transformers.

    Raises ValueError with one sentence if it cannot be loaded.
    """
    name = path or config.source
    try:
        return auto.from_pretrained(name, trust_remote_code=config.trust_remote_code, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"policy.path: {name} cannot be loaded ({reason})") from error
