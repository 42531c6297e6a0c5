"""The recipes of docs/own-data.md, read word for word in a folder with such files."""

import re
from itertools import islice
from pathlib import Path

import pytest
from test_datasets import write_lines

from spo.config.recipe import load_recipe
from spo.tasks import problems_of

PAGE = (Path(__file__).parents[3] / "docs" / "own-data.md").read_text()
RECIPES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
SIZES = {"mine": 20, "exams": 10, "finals": 5}  # of each file
# Of each recipe: the training problems and the test problems, as name of the set -> number.
EXPECTED = [
    ({"mine": 18}, {"mine": 2}),
    ({"exams": 10}, {"finals": 5}),
    ({"mine": 20}, {"mine": 20}),
    ({"mine": 18, "exams": 9}, {"mine": 2, "exams": 1}),
    ({"mine": 20, "exams": 10}, {"finals": 5}),
    ({"mine": 18}, {"mine": 2}),
]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    for name, size in SIZES.items():
        table = [{"question": f"{name} {i}?", "answer": i} for i in range(size)]
        write_lines(tmp_path / f"{name}.jsonl", table)
        lines = ["TEXT,Final", *(f"{row['question']},{row['answer']}" for row in table)]
        (tmp_path / f"{name}.csv").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def counted(problems) -> dict[str, int]:
    """Distinct problems of each set; the answer is that of the problem's row."""
    found: dict[str, set[str]] = {}
    for problem in problems:
        name, number = problem.text.rstrip("?").split()
        assert int(problem.answer) == int(number)
        found.setdefault(name, set()).add(number)
    return {name: len(numbers) for name, numbers in found.items()}


@pytest.mark.parametrize(
    ("text", "train", "test"),
    [(text, *expected) for text, expected in zip(RECIPES, EXPECTED, strict=True)],
    ids=range(len(RECIPES)),
)
def test_a_recipe_of_the_page(folder, text, train, test):
    (folder / "recipe.yaml").write_text(text)
    recipe = load_recipe(folder / "recipe.yaml")
    assert counted(problems_of(recipe, "test")) == test
    first = list(islice(problems_of(recipe, "train", 3), 1000))
    assert counted(first) == train
    assert list(islice(problems_of(recipe, "train", 3), 1000)) == first


def test_the_page_is_short():
    assert len(PAGE.splitlines()) <= 120
