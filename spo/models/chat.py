"""Prompts as the policy's tokenizer writes them: plain templates, and chats in its own template."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import takewhile
from typing import Any

from spo.config.data import PROBLEM, DataConfig

MARK = "spo-mark"  # stands for a response
OWN = "the problems' messages"  # in errors, in place of a setting


Messages = Sequence[Mapping[str, Any]]


def prompt_writer(data: DataConfig, tokenizer: Any) -> Callable[[str, Messages | None], str]:
    """(problem, its own chat or None) -> the text of its prompt, special tokens spelled out.

    Raises ValueError with one sentence if the settings do not fit the tokenizer's chat template, as
    the function does for a problem that does not fit the settings.
    """
    write = _renderer(data, tokenizer) if data.chat else None
    write_own = cache(lambda: _renderer(data, tokenizer, OWN))  # made if there is such a problem

    def written(problem: str, messages: Messages | None = None) -> str:
        if messages is not None:
            return write_own()(_with_system(data, messages), True)
        if write is not None:
            return write(
                [m | {"content": m["content"].replace(PROBLEM, problem)} for m in data.chat], True
            )
        for name in ("thinking", "chat_options"):
            if getattr(data, name) not in (None, {}):
                raise ValueError(
                    f"data.{name}: expected data.system or data.messages beside it, found neither"
                )
        return data.template.replace(PROBLEM, problem)

    return written


def _with_system(data: DataConfig, messages: Messages) -> list[dict[str, Any]]:
    """A problem's own chat, with the recipe's system text. Raises ValueError if they conflict."""
    for name, given in (("template", data.template != PROBLEM), ("messages", data.messages)):
        if given:
            raise ValueError(f"data.{name}: expected none, as the problems are chat messages")
    turns = [dict(message) for message in messages]
    if data.system is None:
        return turns
    if any(turn.get("role") == "system" for turn in turns):
        raise ValueError("data.system: expected none, as the problems' messages have a system text")
    return [{"role": "system", "content": data.system}, *turns]


def warn_about_prompt(
    data: DataConfig, tokenizer: Any, prompt_ids: Sequence[int], chat: bool
) -> None:
    """Warn of a prompt without the start token or the chat that the model was trained with.

    Args:
        chat: the problem is chat messages.
    """
    chat = chat or bool(data.chat)
    if getattr(tokenizer, "chat_template", None) and not chat:
        if not set(prompt_ids) & set(tokenizer.added_tokens_decoder):
            warnings.warn(
                "data.template: the model has a chat template, and prompts hold none of its "
                "special tokens: set data.system or data.messages, if a chat is meant",
                stacklevel=2,
            )
    bare, whole = (tokenizer("1", add_special_tokens=add)["input_ids"] for add in (False, True))
    start = list(takewhile(lambda token: token not in bare, whole)) if bare else []
    if start and list(prompt_ids[: len(start)]) != start:
        text = tokenizer.decode(start)
        where = "the chat template does not" if chat else "data.template can"
        warnings.warn(
            f"prompts do not begin with {text!r}, which the tokenizer puts in front of a text; "
            f"{where} write it",
            stacklevel=2,
        )


def warn_about_turn_end(
    data: DataConfig,
    tokenizer: Any,
    stop_token_ids: Sequence[int],
    messages: Messages | None = None,
) -> None:
    """Warn if the chat template ends a response with a token that does not stop one.

    Args:
        messages: the chat of a problem that has its own, in place of the recipe's.
    """
    turns = data.chat if messages is None else _with_system(data, messages)
    write = _renderer(data, tokenizer, "" if messages is None else OWN)
    try:
        text = write([*turns, {"role": "assistant", "content": MARK}], False)
    except ValueError:  # a template that writes no such turn says nothing of its end
        return
    _, found, rest = text.rpartition(MARK)
    tokens = {str(t): i for i, t in tokenizer.added_tokens_decoder.items() if str(t) in rest}
    if not found or not tokens:
        return
    first = min(tokens, key=lambda text: (rest.index(text), -len(text)))
    if tokens[first] not in stop_token_ids:
        warnings.warn(
            f"the chat template ends a response with {first!r} ({tokens[first]}), which is none of "
            f"the ids {list(stop_token_ids)} that end one: add it to sampling.stop_token_ids",
            stacklevel=2,
        )


def _renderer(
    data: DataConfig, tokenizer: Any, where: str = ""
) -> Callable[[list[dict[str, Any]], bool], str]:
    """(messages, whether a response follows) -> text, by the tokenizer's chat template.

    `where` says in errors what the messages are, by default the setting that has them.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        advice = "" if where else "; write the prompt in data.template"
        raise ValueError(
            f"{where or 'data.system or data.messages'}: expected a tokenizer with a chat "
            f"template, found none{advice}"
        )
    where = where or ("data.messages" if data.system is None else "data.system")
    options = dict(data.chat_options)
    if data.thinking is not None:
        options["enable_thinking"] = data.thinking
    for name in options:
        if not re.search(rf"\b{re.escape(name)}\b", str(template)):
            setting = "data.thinking" if name not in data.chat_options else "data.chat_options"
            raise ValueError(f"{setting}: the chat template has no variable {name}")
    fixed = {"tokenize": False, "strftime_now": data.date.strftime}  # in place of today

    def render(messages: list[dict[str, Any]], open_turn: bool) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages, **options | fixed | {"add_generation_prompt": open_turn}
            )
        except Exception as error:  # of whatever the template does
            reason = " ".join(str(error).split())[:200]
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise ValueError(
                f"{where}: the chat template refuses the roles {roles} ({reason})"
            ) from error

    return render
