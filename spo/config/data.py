"""`data`: where a task's problems come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from spo.config.ranges import PositiveInt


@dataclass(frozen=True)
class DataConfig:
    """Where a task's problems come from, and how they become prompts."""

    train: str | None = None
    """File, folder or hub data set (owner/name, owner/name@revision, owner/name/folder) of the
    training problems; by default the task's own."""
    test: str | None = None
    """The same for the test problems."""
    template: str = "{problem}"
    """The prompt, with `{problem}` for the problem. Write out special tokens and the turns of a
    chat; other braces are kept."""
    max_prompt_tokens: PositiveInt | None = None
    """Training problems with longer prompts are left out."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the task: numbers of countdown, people of knights_knaves."""

    def __post_init__(self) -> None:
        if self.template.count("{problem}") != 1:
            raise ValueError(f"data.template: expected {{problem}} once, found {self.template!r}")
