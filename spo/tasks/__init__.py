"""Tasks: seeded problems, worked solutions and graders. One module each, found by name."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from spo.tasks import arithmetic, countdown, knights_knaves
from spo.tasks.problem import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spo.records import Prompt

__all__ = ["TASKS", "Problem", "get_task", "prompts"]

TASKS: dict[str, ModuleType] = {m.NAME: m for m in (arithmetic, countdown, knights_knaves)}


def get_task(name: str) -> ModuleType:
    """The module of a task. Raises ValueError if there is none of that name."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(sorted(TASKS))}, got {name!r}")
    return TASKS[name]


def prompts(
    task: str, split: str, seed: int, tokenizer: PreTrainedTokenizerBase, **options: int
) -> Iterator[Prompt]:
    """The task's problems, each tokenised once; `options` go to the task's `problems`.

    Raises ValueError on an unknown task or split, and on a text outside the vocabulary.
    """
    return _prompts(task, get_task(task).problems(split, seed, **options), tokenizer)


def _prompts(task, problems, tokenizer):
    from spo.records import Prompt  # imports torch, which the grading worker does without

    for problem in problems:
        ids = tokenizer(problem.text, add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise ValueError(
                f"the tokenizer's vocabulary does not cover the {task} problem {problem.text!r}"
            )
        yield Prompt(tuple(ids), problem.answer, task)
