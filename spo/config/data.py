"""`data`: where a task's problems come from."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any

from spo.config.ranges import PositiveInt

PROBLEM = "{problem}"  # stands for the problem; other braces are kept


@dataclass(frozen=True)
class DataConfig:
    """Where a task's problems come from, and how they become prompts."""

    train: str | None = None
    """File, folder or hub data set (owner/name, owner/name@revision, owner/name/folder) of the
    training problems; by default the task's own."""
    test: str | None = None
    """The same for the test problems."""
    template: str = PROBLEM
    """A prompt of plain text, with `{problem}` for the problem. Special tokens are those that it
    spells out, the first one (such as <bos>) included; other braces are kept."""
    system: str | None = None
    """A chat in the tokenizer's own chat template: this system text, then the problem as the user's
    turn."""
    messages: tuple[dict[str, str], ...] = ()
    """The same with turns of your own, each with `role` and `content`; one holds `{problem}`."""
    thinking: bool | None = None
    """Chat: what the template's switch `enable_thinking` says; by default the template decides."""
    chat_options: dict[str, Any] = field(default_factory=dict)
    """Chat: other variables of the template, such as `reasoning_effort: low`."""
    date: datetime.date = datetime.date(2025, 1, 1)
    """Chat: today, for templates that say so: a resumed run has the same prompts on another day."""
    max_prompt_tokens: PositiveInt | None = None
    """Training problems with longer prompts are left out."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the task: numbers of countdown, people of knights_knaves."""

    def __post_init__(self) -> None:
        if self.template.count(PROBLEM) != 1:
            raise ValueError(f"data.template: expected {{problem}} once, found {self.template!r}")
        for name in ("thinking", "chat_options"):
            if getattr(self, name) not in (None, {}) and not self.chat:
                raise ValueError(
                    f"data.{name}: expected data.system or data.messages beside it, found neither"
                )
        if self.template != PROBLEM and self.chat:
            raise ValueError(
                "data.template: expected none beside data.system or data.messages, which use the "
                f"tokenizer's chat template, found {self.template!r}"
            )
        if self.messages:
            self._check_messages()

    def _check_messages(self) -> None:
        if self.system is not None:
            raise ValueError("data.system: expected none beside data.messages; write it there")
        for message in self.messages:
            if set(message) != {"role", "content"}:
                raise ValueError(f"data.messages: expected role and content, found {message}")
        if sum(message["content"].count(PROBLEM) for message in self.messages) != 1:
            raise ValueError("data.messages: expected {problem} in one of them, once")
        if self.messages[-1]["role"] == "assistant":
            raise ValueError("data.messages: expected the last one to be the user's")

    @property
    def chat(self) -> tuple[dict[str, str], ...]:
        """The messages of a prompt, with `{problem}` for the problem; () for plain text."""
        if self.system is None:
            return self.messages
        turns = {"system": self.system, "user": PROBLEM}
        return tuple({"role": role, "content": text} for role, text in turns.items())
