"""A task from outside of the package: found by its file, set by its recipe, graded, trained on."""

from itertools import islice
from pathlib import Path

import pytest

from spo.config.recipe import load_recipe
from spo.loop import train
from spo.models.tokenizer import load_tokenizer
from spo.plan import describe
from spo.tasks import prompts_of, task_of
from spo.tasks.grading import Graded, Grader

FOLDER = Path(__file__).parent


def recipe(*overrides: str):
    return load_recipe(FOLDER / "recipe.yaml", overrides)


def test_the_recipe_s_settings_are_the_task_s_fields():
    task = task_of(recipe())
    assert (task.size, task.order, task.between) == (3, "down", (1, 9))
    for problem in islice(task.problems("test", 0), 100):
        make, *numbers = problem.text.split()
        assert make == "make" and problem.answer == sorted(map(int, numbers), reverse=True)
        assert len(numbers) == 3 and all(1 <= n <= 9 for n in problem.answer)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.options.size=1", ["data.options.size", "greater than or equal to 2", "found 1"]),
        ("data.options.order=odd", ["data.options.order", "'up' or 'down'", "'odd'"]),
        ("data.options.between=[1]", ["data.options.between.1"]),
        ("data.options.sizes=3", ["data.options.sizes", "size, order, between"]),
        ("task=./task.py:Sort", ["task", "has no class Sort"]),
    ],
)
def test_bad_settings_are_one_sentence(override, words):
    with pytest.raises(ValueError) as error:
        recipe(override)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_answers_are_graded_in_the_worker_with_the_settings_of_the_recipe():
    config = recipe()
    with Grader({config.task: task_of(config)}) as grader:
        for key, text in enumerate(("9 5 1", "1 5 9", "a b c")):
            grader.submit(key, config.task, f"<answer> {text} </answer>", [9, 5, 1])
        graded: list[Graded] = []
        while grader.pending:
            graded += grader.poll(1.0)
    assert graded == [Graded(0, 1.0), Graded(1, 0.0), Graded(2, 0.0)]


def test_a_recipe_with_it_describes_itself_and_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER)
    config = recipe(f"out={tmp_path / 'run'}")
    (prompt,) = islice(prompts_of(config, "train", load_tokenizer(config.policy)), 1)
    assert prompt.task == f"{FOLDER / 'task.py'}:Sorting" and len(prompt.answer) == 3
    lines = describe(config).splitlines()
    assert "  train   generated" in lines
    (line,) = (line for line in train(config) if line["stage"] == "train")
    assert line["invalid_gradings"] == 0
    with pytest.raises(ValueError, match=r"data.train: task .*task.py:Sorting reads no data set"):
        describe(recipe("data.train=openai/gsm8k"))
