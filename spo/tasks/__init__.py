"""Tasks: seeded problems and their graders. A task is a dataclass, found by name; see `Task`."""

from __future__ import annotations

import inspect
import json
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from spo import named
from spo.tasks.answers import THINK
from spo.tasks.problem import Problem, mixture
from spo.tasks.sources import CHOICES, Source, state
from spo.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from spo.config.recipe import Recipe
    from spo.records import Prompt

__all__ = [
    "Problem",
    "Task",
    "check_data",
    "get_task",
    "problems_of",
    "prompts",
    "prompts_of",
    "sources_of",
    "task_of",
]

ALL_TOO_LONG = 20_000  # so many too long prompts in a row mean that all are too long
FIRST_ROWS = 1000  # that a dry run reads of each file
PARTS = 1_000_003  # between the seeds of two data sets of a mixture
DRAWN = "test problems"  # seed of the subset, the same in all runs
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


def sources_of(recipe: Recipe, task: Task, split: str) -> tuple[Source, ...]:
    """The data sets of a split: the recipe's, else the task's own; () if problems are generated.

    Several are a mixture. Raises ValueError if the recipe names one and the task reads none, and if
    it does not say what to test on.
    """
    from spo.config.data import SAME, parts_of  # imports pydantic, as the worker need not

    data, own = recipe.data, getattr(task, "sources", None)
    if "source" not in inspect.signature(task.problems).parameters:
        for name in ("train", "test", "test_share", "columns", "difficulty"):
            if found := getattr(data, name):
                raise ValueError(
                    f"data.{name}: task {recipe.task} reads no data set, found {found}; task=rows, "
                    "with a reward, reads any"
                )
        return ()
    parts = parts_of(data.train)
    train = tuple(Source(p.path, p.columns or data.columns, p.weight) for p in parts)
    if not train and own and "train" in own:
        train = (Source(own["train"]),)
    held_out = data.test_share or 0.0
    test: tuple[Source, ...] = ()
    if data.test == SAME or held_out:
        name = "test_share" if held_out else "test"
        if not train:
            raise ValueError(f"data.{name}: expected data.train beside it, found none")
        test = tuple(replace(source, reads="train", share=held_out) for source in train)
    elif data.test:
        test = (Source(data.test, data.columns),)
    elif own and "test" in own:
        test = (Source(own["test"]),)
    elif own is not None and len(train) == 1:
        test = (replace(train[0], given=False),)
    elif own is not None and train and split == "test":
        raise ValueError(f"data.test: expected the problems to test on beside a mixture; {CHOICES}")
    if split == "test":
        return test
    return train if data.test == SAME else tuple(replace(s, apart=test) for s in train)


def prompts_of(
    recipe: Recipe,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    most: int | None = None,
) -> Iterator[Prompt]:
    """The prompts of a recipe: its problems in its template or chat, each tokenised once.

    Of a test split that is read and has more than `most` problems, so many are drawn, the same in
    all runs and in the order of the source; of one that is generated they are the first.
    Training problems longer than `data.max_prompt_tokens` are left out; test problems never are.
    Those of a mixture are drawn with `seed`. Raises ValueError for an unknown task or split, for
    options that the task does not have, for a chat that the tokenizer's template refuses, for
    tokens that the model lacks, and if the data cannot be read.
    """
    # Here, since they import transformers, which the grading worker does not need.
    from spo.models import chat
    from spo.models.tokenizer import model_vocab_size, sampling_of

    data = recipe.data

    def look(ids: Sequence[int], messages: Sequence[Mapping] | None) -> None:
        chat.warn_about_prompt(data, tokenizer, ids, messages is not None)
        if data.chat or messages is not None:
            stops = sampling_of(recipe, tokenizer).stop_token_ids
            chat.warn_about_turn_end(data, tokenizer, stops, messages)

    problems = problems_of(recipe, split, seed)
    if most is not None:
        read = bool(sources_of(recipe, task_of(recipe), split))
        problems = _subset(list(problems), most) if read else islice(problems, most)
    return _prompts(
        recipe.task,
        problems,
        tokenizer,
        chat.prompt_writer(data, tokenizer),
        data.max_prompt_tokens if split == "train" else None,
        model_vocab_size(recipe.policy),
        look,
    )


def _subset(problems: Sequence[Problem], most: int) -> Iterator[Problem]:
    """At most so many of the problems, in their order; fewer are drawn from among more."""
    order = random.Random(DRAWN).sample(range(len(problems)), len(problems))
    return (problems[index] for index in sorted(order[:most]))


def problems_of(recipe: Recipe, split: str, seed: int = 0) -> Iterator[Problem]:
    """The problems of a recipe's split, in an order that follows from `seed`.

    Raises ValueError for settings that do not fit the task, and if the data cannot be read.
    """
    task = task_of(recipe)
    sources = sources_of(recipe, task, split)
    return _problems(recipe.task, partial(_drawn, task, split, seed, sources))


def _drawn(task: Task, split: str, seed: int, sources: Sequence[Source]) -> Iterator[Problem]:
    """The problems of a split: generated, of one data set, or of several."""
    if not sources:
        return task.problems(split, seed)
    streams = []
    for index, source in enumerate(sources):
        options: dict[str, Any] = {"source": source}
        streams.append(task.problems(split, seed + index * PARTS, **options))
    if split == "train" and len(streams) > 1:
        return mixture(streams, [source.weight for source in sources], seed)
    return chain.from_iterable(streams)


def _problems(task: str, draw: Callable[[], Iterable[Problem]]) -> Iterator[Problem]:
    """The problems; any exception of a task from outside becomes one sentence that names it."""
    try:
        for problem in draw():
            if not isinstance(problem, Problem):
                raise ValueError(f"expected problems to yield Problem, found {problem!r:.60}")
            json.dumps([problem.answer, problem.columns])
            yield problem
    except ValueError as error:
        named_already = task in str(error) or task in named.OWN["task"]
        raise error if named_already else ValueError(f"task {task}: {error}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"task {task}: problems failed ({reason})") from error


def check_data(recipe: Recipe, split: str) -> None:
    """Read the first rows of a split's files on this machine; asks no server.

    Raises ValueError as reading all of them does, such as for an unknown column.
    """
    task = task_of(recipe)
    for source in sources_of(recipe, task, split):
        if state(source) != "local":
            continue
        whole = replace(source, apart=(), share=0.0)

        def draw(source: Source = whole) -> Iterator[Problem]:
            return islice(task.problems(split, 0, source=source), 1)  # pyright: ignore[reportCallIssue]

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they count the first rows only
                list(_problems(recipe.task, partial(draw, replace(whole, most=FIRST_ROWS))))
        except ValueError:  # rows further down may have what the first ones lack
            list(_problems(recipe.task, draw))


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
    write: Callable[[str, Sequence[Mapping] | None], str] = lambda text, messages: text,
    limit: int | None = None,
    known: int | None = None,  # the model has no row for ids from here on
    look: Callable[[Sequence[int], Sequence[Mapping] | None], None] | None = None,  # at the first
) -> Iterator[Prompt]:
    from spo.records import Prompt  # imports torch, which the grading worker does not need

    too_long = 0
    for problem in problems:
        text = write(problem.text, problem.messages)
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
        if look is not None:
            look(ids, problem.messages)
            look = None
        opening = THINK if text.rstrip().endswith(THINK) else ""
        columns = problem.columns
        if problem.messages is not None:  # as TRL gives chats to rewards
            columns = columns | {"prompt": [dict(turn) for turn in problem.messages]}
        yield Prompt(tuple(ids), problem.answer, task, opening, columns)
