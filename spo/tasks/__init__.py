"""Tasks: seeded problems, worked solutions and graders. One module each, found by name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from spo.tasks import aime24, arithmetic, countdown, gsm8k, knights_knaves, math, point24
from spo.tasks.answers import THINK
from spo.tasks.problem import Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spo.config.recipe import Recipe
    from spo.records import Prompt

__all__ = ["TASKS", "Problem", "get_task", "problems", "prompts", "prompts_of"]

PLACE = "{problem}"  # where a template takes the problem; other braces are its own
ALL_TOO_LONG = 20_000  # prompts in a row over the limit mean that none is under it

TASKS: dict[str, ModuleType] = {
    m.NAME: m for m in (aime24, arithmetic, countdown, gsm8k, knights_knaves, math, point24)
}


def get_task(name: str) -> ModuleType:
    """The module of a task. Raises ValueError if there is none of that name."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(sorted(TASKS))}, got {name!r}")
    return TASKS[name]


def problems(recipe: Recipe, split: str, seed: int) -> Iterator[Problem]:
    """The problems of a recipe, from its `data` sources where it names any.

    Raises ValueError on an unknown task or split, on options that the task does not have, and if
    the data cannot be read.
    """
    return get_task(recipe.task).problems(split, seed, **options_of(recipe, split))


def options_of(recipe: Recipe, split: str) -> dict[str, object]:
    """The keyword arguments of the task's `problems`. Raises ValueError for unknown ones."""
    task, data = get_task(recipe.task), recipe.data
    options: dict[str, object] = dict(data.options)
    source = data.train if split == "train" else data.test
    if source is not None:
        options["source"] = source
    known = list(inspect.signature(task.problems).parameters)[2:]
    for name in options:
        if name not in known:
            where = f"data.{split}" if name == "source" else f"data.options.{name}"
            raise ValueError(
                f"{where}: task {recipe.task} does not take {name}; "
                f"it takes {', '.join(known) or 'no options'}"
            )
    return options


def prompts_of(
    recipe: Recipe, split: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> Iterator[Prompt]:
    """The prompts of a recipe: its problems in its template, each tokenised once.

    Training problems longer than `data.max_prompt_tokens` are left out; test problems never.
    """
    data = recipe.data
    if data.template.count(PLACE) != 1:
        raise ValueError(f"data.template: expected {PLACE} once, found {data.template!r}")
    limit = data.max_prompt_tokens if split == "train" else None
    found = problems(recipe, split, seed)
    return _prompts(recipe.task, found, tokenizer, data.template, limit)


def prompts(
    task: str, split: str, seed: int, tokenizer: PreTrainedTokenizerBase, **options: object
) -> Iterator[Prompt]:
    """The task's problems, each tokenised once; `options` go to the task's `problems`.

    Raises ValueError on an unknown task or split, and on a text outside the vocabulary.
    """
    return _prompts(task, get_task(task).problems(split, seed, **options), tokenizer)


def _prompts(task, problems, tokenizer, template=PLACE, limit=None):
    from spo.records import Prompt  # imports torch, which the grading worker does without

    too_long = 0
    for problem in problems:
        text = template.replace(PLACE, problem.text)
        # A template spells out its special tokens, so the tokenizer adds none.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
            raise ValueError(
                f"the tokenizer's vocabulary does not cover the {task} problem {problem.text!r}"
            )
        if limit is not None and len(ids) > limit:
            too_long += 1
            if too_long >= ALL_TOO_LONG:
                raise ValueError(
                    f"data.max_prompt_tokens: {too_long} {task} problems in a row have more than "
                    f"{limit} tokens"
                )
            continue
        too_long = 0
        opening = THINK if text.rstrip().endswith(THINK) else ""
        yield Prompt(tuple(ids), problem.answer, task, opening)
