"""Tasks, shapes and rules by name: from modules and files outside of the package."""

import dataclasses
import sys
import types

import pytest
from sentences import one_sentence

from spo import named

RULE = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Annotated, Literal
from pydantic import Field
from spo.config.credit import Rule as Base
{more}
@dataclass(frozen=True)
class Rule(Base):
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    mode: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = ()

    def __post_init__(self):
        if self.mode == "b" and not self.sizes:
            raise ValueError("mode b needs sizes")

    def assign(self, forest, models):
        return self.share

class Plain:
    pass

@dataclass
class Idle:
    x: int = 0
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rule.py").write_text(RULE.format(more=""))
    return tmp_path


def test_a_file_beside_the_recipe_wherever_the_process_runs(folder, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    found = named.find("credit.type", "./rule.py:Rule", folder)
    assert found(share=0.25).assign(None, None) == 0.25
    name = named.name_of("credit.type", found)
    assert name == f"{folder / 'rule.py'}:Rule"
    assert named.find("credit.type", name) is found  # the same class, not a second one


def test_a_file_in_the_current_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    assert named.find("credit.type", "rule.py:Rule") is named.find("credit.type", "./rule.py:Rule")


def test_a_file_imports_its_neighbours(folder):
    (folder / "neighbour_of_rule.py").write_text("SHARE = 0.75\n")
    (folder / "second.py").write_text(RULE.format(more="from neighbour_of_rule import SHARE"))
    module = sys.modules[named.find("credit.type", "second.py:Rule", folder).__module__]
    assert module.SHARE == 0.75


def test_a_module_on_the_path_or_in_the_current_folder(folder, monkeypatch):
    (folder / "my_rules_module.py").write_text(RULE.format(more=""))
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    found = named.find("credit.type", "my_rules_module:Rule")
    assert named.name_of("credit.type", found) == "my_rules_module:Rule"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("values2", ["credit.type", "values, gae", "./file.py:Name", "'values2'"]),
        ("./none.py:Rule", ["credit.type", "there is no file", "none.py"]),
        ("./rule.py:Absent", ["has no class Absent"]),
        ("./rule.py:Plain", ["to be a dataclass"]),
        ("./rule.py:Idle", ["to inherit Rule of spo.config.credit"]),
        ("./broken.py:Rule", ["broken.py cannot be imported", "ZeroDivisionError"]),
        ("./wrong.py:Rule", ["wrong.py cannot be imported", "ValueError", "not today"]),
        ("no_such_module_here:Rule", ["cannot be imported", "no_such_module_here"]),
        ("./rule.py:", ["module:Name"]),
    ],
)
def test_what_cannot_be_found_is_one_sentence(folder, name, words):
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "wrong.py").write_text("raise ValueError('not today')\n")
    with one_sentence(words):
        named.find("credit.type", name, folder)


def test_a_broken_file_is_read_again_once_it_is_mended(folder):
    (folder / "late.py").write_text("1 / 0\n")
    with pytest.raises(ValueError):
        named.find("credit.type", "late.py:Rule", folder)
    (folder / "late.py").write_text(RULE.format(more=""))
    assert named.find("credit.type", "late.py:Rule", folder)


def test_settings_are_converted_and_checked(folder):
    rule = named.find("credit.type", "rule.py:Rule", folder)
    built = named.build(rule, {"share": "1e-1", "sizes": [1, 2]}, "credit")
    assert dataclasses.asdict(built) == {"share": 0.1, "mode": "a", "sizes": (1, 2)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"shape": 1}, ["credit.shape", "share, mode, sizes"]),
        ({"share": 2}, ["credit.share", "less than or equal to 1", "2"]),
        ({"mode": "c"}, ["credit.mode", "'c'"]),
        ({"sizes": ["x"]}, ["credit.sizes.0", "'x'"]),
        ({"mode": "b"}, ["credit", "mode b needs sizes"]),
    ],
)
def test_bad_settings_are_named(folder, settings, words):
    rule = named.find("credit.type", "rule.py:Rule", folder)
    with one_sentence(words):
        named.build(rule, settings, "credit")


def test_types_that_cannot_be_checked_are_said():
    odd = types.new_class("Odd", (), {}, lambda body: None)

    @dataclasses.dataclass
    class Settings:
        x: odd = None  # type: ignore[valid-type]

    with pytest.raises(ValueError, match="cannot be checked"):
        named.build(Settings, {"x": 1}, "credit")


def test_the_package_finds_and_names_what_it_has():
    for key, own in named.OWN.items():
        for name in own:
            assert named.name_of(key, named.find(key, name)) == name
