"""The policy's tokenizer: what ends a response, which ids it knows, how it decodes."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from spo.config.policy import PolicyConfig
from spo.config.recipe import Recipe
from spo.models.files import from_pretrained
from spo.models.same_ids import warn_of_other_ids
from spo.records import Sampling


def load_tokenizer(config: PolicyConfig) -> Any:
    """The policy's tokenizer. Raises ValueError with one sentence if it cannot be loaded.

    A tokenizer.json is read unchanged. AutoTokenizer replaces parts of it for some model types
    (transformers 5.19: qwen2); it warns where that gives other ids.
    """
    try:
        tokenizer = load_pretrained(PreTrainedTokenizerFast, config)
    except ValueError:
        tokenizer = load_pretrained(AutoTokenizer, config)  # no tokenizer.json
    else:
        warn_of_other_ids(config.source, config.trust_remote_code)
    if len(tokenizer) <= len(tokenizer.all_special_ids) or tokenizer.eos_token_id is None:
        raise ValueError(f"policy.path: {config.path} holds no tokenizer with an end token")
    return tokenizer


def load_pretrained(auto: Any, config: PolicyConfig, path: str | None = None, **options) -> Any:
    """`auto.from_pretrained` of `path`, by default of the policy's source.

    Args:
        auto: a class of transformers.

    Raises ValueError with one sentence if it cannot be loaded.
    """
    trusted = {"trust_remote_code": config.trust_remote_code}
    return from_pretrained(auto, path or config.source, **trusted, **options)


def vocab_size(tokenizer: Any) -> int:
    """One more than the largest id that the tokenizer knows; `len(tokenizer)` ignores holes."""
    return max(tokenizer.get_vocab().values()) + 1


def model_vocab_size(config: PolicyConfig) -> int:
    """Number of logits of the policy, padding included, as its config.json says."""
    return load_pretrained(AutoConfig, config).get_text_config().vocab_size


def stop_token_ids(config: PolicyConfig, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end a response: the tokenizer's end token and those of generation_config.json.

    A folder without generation_config.json may name them in config.json. Ids that the model has no
    logit for are left out. Raises ValueError with one sentence if a file cannot be read.
    """
    found = [tokenizer.eos_token_id]
    settings = _settings(config, "generation_config.json")
    if settings is None:
        settings = _settings(config, "config.json") or {}
        settings = (settings.get("text_config") or {}) | settings
    named = settings.get("eos_token_id")
    found += named if isinstance(named, list) else [] if named is None else [named]
    if any(type(token) is not int for token in found):
        raise ValueError(
            f"policy.path: expected eos_token_id of {config.path} to be an id or a list of ids, "
            f"found {named!r}"
        )
    size = model_vocab_size(config)
    return tuple(dict.fromkeys(token for token in found if 0 <= token < size))


def sampling_of(recipe: Recipe, tokenizer: Any) -> Sampling:
    """How a recipe's samples are drawn, with seed 0: temperature, what ends them, which ids exist.

    Raises ValueError if `sampling.stop_token_ids` holds an id that the model has no logit for.
    """
    settings, size = recipe.sampling, model_vocab_size(recipe.policy)
    for token in settings.stop_token_ids:
        if token >= size:
            raise ValueError(
                f"sampling.stop_token_ids: expected ids below {size}, the number of the model's "
                f"tokens, found {token}"
            )
    stops = (*stop_token_ids(recipe.policy, tokenizer), *settings.stop_token_ids)
    known = vocab_size(tokenizer)
    return Sampling(
        seed=0,
        temperature=settings.temperature,
        stop_token_ids=tuple(dict.fromkeys(stops)),
        stop=settings.stop,
        vocab_size=known if known < size else None,
    )


def exact_text(tokenizer: Any, token_ids: Sequence[int]) -> str:
    """The text of tokens, special ones and spaces included, exactly as the tokens spell it."""
    return tokenizer.decode(
        token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def response_text(tokenizer: Any, token_ids: Sequence[int], stops: Container[int]) -> str:
    """The text of a response, for graders and readers, without its stop token and pad tokens."""
    ids = list(token_ids)
    if ids and ids[-1] in stops:
        ids.pop()
    return exact_text(tokenizer, [token for token in ids if token != tokenizer.pad_token_id])


def _settings(config: PolicyConfig, name: str) -> dict[str, Any] | None:
    """A JSON file of the policy's folder or hub repository; None if it has none."""
    path = name
    try:
        path = cached_file(
            config.source,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if path is None else dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"policy.path: {path} is no JSON object to read ({reason})") from error
