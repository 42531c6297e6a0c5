"""Odd recipes and classes: refused at load with one sentence, or saved and read back."""

import dataclasses

import pytest
import yaml
from sentences import one_sentence

import spo
from spo.config.recipe import load_recipe, save_recipe
from spo.config.train import TrainConfig
from spo.credit.gae import Gae

HEAD = """
import enum
from dataclasses import dataclass, field
from pathlib import Path
from spo import Rule, ShapeConfig
from spo.config.shape import Cost
from spo.credit.values import Values

@dataclass(frozen=True)
class Inner:
    a: int = 1

class Mode(enum.Enum):
    FAST = "fast"

@dataclass(frozen=True)
class Plain(Rule):
    x: int = 1
    where: Path = Path("here")
    mode: Mode = Mode.FAST
    of: dict[str, Inner] = field(default_factory=dict)
    many: tuple[Inner, ...] = ()
    def assign(self, forest, models):
        return Values().assign(forest)

def factory():
    @dataclass(frozen=True)
    class Local(Plain):
        y: int = 0
    return Local

Made = factory()
"""

MINE = "@dataclass(frozen=True)\nclass Mine(Plain):\n"


@pytest.fixture
def rule(tmp_path):
    """`rule(code)` writes rule.py and loads a recipe whose rule is its last class, Mine."""

    def load(code="Mine = Plain", *overrides, key="credit.type"):
        name = f"rule{len(list(tmp_path.glob('rule*.py')))}"
        (tmp_path / f"{name}.py").write_text(f"{HEAD}\n{code}\n")
        return load_recipe(None, [f"{key}={tmp_path / name}.py:Mine", *overrides])

    return load


@pytest.mark.parametrize(
    "code", ["Mine = Plain", "Mine = Made", "class A:\n    B = Plain\nMine = A.B"]
)
def test_a_class_is_saved_under_the_name_it_was_found_by(rule, tmp_path, code):
    recipe = rule(code)
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text())["credit"]["type"].endswith(":Mine")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


def test_a_class_that_a_file_imports_is_saved_under_that_file(tmp_path):
    (tmp_path / "odd_neighbour.py").write_text(HEAD)
    (tmp_path / "front.py").write_text("from odd_neighbour import Plain\n")
    recipe = load_recipe(None, [f"credit.type={tmp_path / 'front.py'}:Plain"])
    assert recipe.credit_type == f"{tmp_path / 'front.py'}:Plain"


def test_settings_of_any_type_are_saved_and_read_back(rule, tmp_path):
    recipe = rule(
        "Mine = Plain", "credit.where=there", "credit.of={k: {a: 3}}", "credit.many=[{a: 2}]"
    )
    save_recipe(recipe, tmp_path / "saved.yaml")
    again = load_recipe(tmp_path / "saved.yaml")
    assert again == recipe and again.credit.of["k"].a == 3 and again.credit.many[0].a == 2


@pytest.mark.parametrize(
    ("code", "overrides", "words"),
    [
        ("raise SystemExit(0)", [], ["cannot be imported", "SystemExit"]),
        ("Mine = Plain", ["credit.of={k: {z: 3}}"], ["credit.of.k.z", "known here: a"]),
        ("Mine = Plain", ["credit.many=[{z: 3}]"], ["credit.many.0.z", "known here: a"]),
        ("Mine = Plain", ["credit.x=true"], ["credit.x", "number", "True"]),
        (
            "@dataclass(frozen=True)\nclass Mine(Plain):\n    type: str = 'mine'",
            [],
            ["has a field type"],
        ),
        ("@dataclass(frozen=True)\nclass Mine(Rule):\n    x: int = 1", [], ["no method assign"]),
        (
            f"{MINE}    def check(self, shape):\n        dict()['k']",
            [],
            ["check failed", "KeyError"],
        ),
        (
            f"{MINE}    def __post_init__(self):\n        dict()['k']",
            [],
            ["Mine cannot be made", "KeyError"],
        ),
        (
            "@dataclass(frozen=True)\nclass Mine(Plain):\n    loss = []",
            [],
            ["credit.loss: expected policy or likelihood"],
        ),
        ("@dataclass(frozen=True)\nclass Mine(Plain):\n    o: object = object()", [], ["credit"]),
    ],
)
def test_a_rule_that_cannot_work_is_refused_at_load(rule, code, overrides, words):
    with one_sentence(words):
        rule(code, *overrides)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("    def make(self, growing): pass", ["no method cost"]),
        (
            "    def make(self, g): pass\n    def cost(self, n): {}['k']",
            ["cost failed", "KeyError"],
        ),
        ("    def make(self, g): pass\n    def cost(self, n): return 3", ["Cost, found 3"]),
    ],
)
def test_a_shape_that_cannot_work_is_refused_at_load(rule, body, words):
    with one_sentence(words):
        rule(f"@dataclass(frozen=True)\nclass Mine(ShapeConfig):\n{body}", key="shape.kind")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  prompts: 3\ntrain:\n  epochs: 2\n", ["not valid YAML", "'train' occurs twice"]),
        ("train: {prompts: 3, prompts: 4}\n", ["'prompts' occurs twice"]),
        ("credit: 0\n", ["credit", "group", "found 0"]),
        ("shape: tree\n", ["shape", "shape.kind=tree", "'tree'"]),
        ("data: ''\n", ["data", "group"]),
        ("false\n", ["expected a mapping"]),
        ("train: {prompts: true}\n", ["train.prompts", "number", "True"]),
        ("shape: {widths: [true, 2, 2]}\n", ["shape.widths.0", "number"]),
        ("train: {learning_rate: true}\n", ["train.learning_rate", "number"]),
        ("shape: {kind: star, group_size: 99999999999999999999999}\n", ["shape.group_size"]),
        ("train: {prompts: 99999999999}\n", ["train.prompts"]),
        ("sampling: {stages: [[.nan, 12]]}\n", ["sampling.stages"]),
        ("train: {replay_samples: 3}\n", ["train.replay_samples", "replay_nodes"]),
        ("engine: {name: hf, addresses: ['http://a:1']}\n", ["engine.addresses", "hf"]),
        ("engine: {max_model_len: 10}\n", ["engine.max_model_len", "64", "10"]),
        ("policy: {device: tpu}\n", ["policy.device", "tpu"]),
        ("data: {template: 'no place'}\n", ["data.template", "{problem}"]),
        ("name: ../x\n", ["name", "../x"]),
        ("name: ''\n", ["name"]),
        ("credit: {type: 3}\n", ["credit.type", "found 3"]),
    ],
)
def test_odd_yaml_is_refused_at_load(tmp_path, text, words):
    (tmp_path / "r.yaml").write_text(text)
    with one_sentence(words):
        load_recipe(tmp_path / "r.yaml")


def test_a_folder_named_like_a_recipe_does_not_hide_it(tmp_path, monkeypatch):
    (tmp_path / "grpo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("grpo").name == "grpo"
    assert load_recipe("paper/gsm8k-grpo") == load_recipe("gsm8k-grpo")


def test_recipes_made_in_python_are_checked_before_any_work(tmp_path):
    made = spo.Recipe(out=str(tmp_path / "run"))
    for recipe, words in (
        (dataclasses.replace(made, credit=Gae()), ["credit.type=gae", "shape.kind=star"]),
        (dataclasses.replace(made, train=TrainConfig(prompts=-5)), ["train.prompts", "-5"]),
    ):
        with one_sentence(words):
            spo.train(recipe)
    assert not (tmp_path / "run").exists()
