"""Tasks: seeded problems and their graders. A task is a dataclass, found by name; see `Task`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from spo import named
from spo.tasks.answers import THINK
from spo.tasks.problem import Problem
from spo.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spo.config.recipe import Recipe
    from spo.records import Prompt

__all__ = ["Problem", "Task", "get_task", "prompts", "prompts_of", "source_of", "task_of"]

ALL_TOO_LONG = 20_000  # so many too long prompts in a row mean that all are too long
OPTIONS = "data.options"  # where a recipe sets the fields of its task


def get_task(name: str, settings: Mapping[str, Any] | None = None) -> Task:
    """The task that a recipe calls `name`, with these settings.

    Raises ValueError with one sentence if there is no such task, and for settings that it lacks or
    that are out of range.
    """
    return named.build(named.find("task", name), settings or {}, OPTIONS)


def task_of(recipe: Recipe) -> Task:
    """The task of a recipe; see `get_task`."""
    return get_task(recipe.task, recipe.data.options)


def source_of(recipe: Recipe, task: Task, split: str) -> str | None:
    """The data set of a split: the recipe's, else the task's own; None if problems are generated.

    Raises ValueError if the recipe names one and the task reads none.
    """
    source = recipe.data.train if split == "train" else recipe.data.test
    if "source" in inspect.signature(task.problems).parameters:
        return source or getattr(task, "sources", {}).get(split)
    if source is not None:
        raise ValueError(f"data.{split}: task {recipe.task} reads no data set, found {source}")
    return None


def prompts_of(
    recipe: Recipe, split: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0
) -> Iterator[Prompt]:
    """The prompts of a recipe: its problems in its template or chat, each tokenised once.

    Training problems longer than `data.max_prompt_tokens` are left out; test problems never are.
    Raises ValueError for an unknown task or split, for options that the task does not have, for a
    chat that the tokenizer's template refuses, for tokens that the model lacks, and if the data
    cannot be read.
    """
    # Here, since they import transformers, which the grading worker does not need.
    from spo.models import chat
    from spo.models.tokenizer import model_vocab_size

    data, task = recipe.data, task_of(recipe)
    limit = data.max_prompt_tokens if split == "train" else None
    source = source_of(recipe, task, split)
    options: dict[str, Any] = {} if source is None else {"source": source}
    problems = _problems(recipe.task, partial(task.problems, split, seed, **options))
    write = chat.prompt_writer(data, tokenizer)
    known = model_vocab_size(recipe.policy)
    found = _prompts(recipe.task, problems, tokenizer, write, limit, known)
    return _looked_at(found, partial(chat.warn_about_prompt, data, tokenizer))


def _looked_at(found: Iterator[Prompt], look: Callable[[Sequence[int]], None]) -> Iterator[Prompt]:
    """The same prompts, of which the first is looked at."""
    for index, prompt in enumerate(found):
        if index == 0:
            look(prompt.prompt_ids)
        yield prompt


def _problems(task: str, draw: Callable[[], Iterable[Problem]]) -> Iterator[Problem]:
    """The problems; any exception of a task from outside becomes one sentence that names it."""
    try:
        for problem in draw():
            if not isinstance(problem, Problem):
                raise ValueError(f"expected problems to yield Problem, found {problem!r:.60}")
            json.dumps(problem.answer)
            yield problem
    except ValueError as error:
        named_already = task in str(error) or task in named.OWN["task"]
        raise error if named_already else ValueError(f"task {task}: {error}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"task {task}: problems failed ({reason})") from error


def prompts(
    task: str, split: str, seed: int, tokenizer: PreTrainedTokenizerBase, **settings: object
) -> Iterator[Prompt]:
    """The problems of a task with these settings, each tokenised once.

    Raises ValueError for an unknown task or split, and for a text outside the vocabulary.
    """
    return _prompts(task, get_task(task, settings).problems(split, seed), tokenizer)


def _prompts(
    task: str,
    problems: Iterable[Problem],
    tokenizer: PreTrainedTokenizerBase,
    write: Callable[[str], str] = str,
    limit: int | None = None,
    known: int | None = None,  # the model has no row for ids from here on
) -> Iterator[Prompt]:
    from spo.records import Prompt  # imports torch, which the grading worker does not need

    too_long = 0
    for problem in problems:
        text = write(problem.text)
        # The text spells out its special tokens, so the tokenizer adds none.
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        unknown = tokenizer.unk_token_id
        # Some tokenizers end a text with it, so a prompt may spell it out.
        if unknown is not None and unknown in ids and str(tokenizer.unk_token) not in text:
            raise ValueError(
                f"policy.path: the tokenizer's vocabulary does not cover the {task} problem "
                f"{problem.text!r}"
            )
        if not ids:
            raise ValueError(
                f"data.template: expected prompts of at least one token, the {task} problem "
                f"{problem.text!r} gives none"
            )
        if known is not None and max(ids) >= known:
            token = tokenizer.convert_ids_to_tokens(max(ids))
            raise ValueError(
                f"policy.path: the tokenizer writes {token!r} as {max(ids)}, and the model has "
                f"tokens below {known} only"
            )
        if limit is not None and len(ids) > limit:
            too_long += 1
            if too_long >= ALL_TOO_LONG:
                raise ValueError(
                    f"data.max_prompt_tokens: {too_long} {task} problems in a row have more than "
                    f"{limit} tokens; raise the limit"
                )
            continue
        too_long = 0
        opening = THINK if text.rstrip().endswith(THINK) else ""
        yield Prompt(tuple(ids), problem.answer, task, opening)
