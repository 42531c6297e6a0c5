"""Tasks from outside of the package in the grading worker: settings, torch, exceptions, imports."""

import subprocess
import sys

import pytest
from test_grading import UNRULY, finish, outside

from spo.tasks.grading import Graded, Grader

SETTLED = """
from __future__ import annotations
import pathlib
from dataclasses import dataclass, field
from enum import Enum

class Mode(Enum):
    EXACT = "exact"
    LOOSE = "loose"

@dataclass(frozen=True)
class Bounds:
    low: int
    high: int

@dataclass(frozen=True)
class Settled:
    names: tuple[str, ...]
    bounds: Bounds
    modes: dict[str, Mode]
    where: pathlib.Path
    known: frozenset[int] = frozenset()
    limit: int | None = None
    size: int = field(init=False, default=3)

    def problems(self, split, seed):
        yield from ()

    def grade(self, text, answer):
        return repr(self) == answer
"""


def test_settings_are_the_same_in_the_worker(tmp_path):
    settings = {
        "names": ["a", "b"],
        "bounds": {"low": 1, "high": 2},
        "modes": {"x": "loose"},
        "where": "/a/b",
        "known": [3],
    }
    task = outside(tmp_path, SETTLED, "Settled", **settings)
    assert task.names == ("a", "b") and task.bounds.high == 2 and task.known == {3}
    with Grader({"./outside.py:Settled": task}) as grader:
        grader.submit(0, "./outside.py:Settled", "", repr(task))
        grader.submit(1, "./outside.py:Settled", "", repr(task).replace("high=2", "high=3"))
        assert finish(grader) == [Graded(0, 1.0), Graded(1, 0.0)]


HEAVY = """
import sys, threading, types
from dataclasses import dataclass
{imported}

@dataclass(frozen=True)
class Heavy:
    def problems(self, split, seed):
        yield from ()

    def prepare(self):
        {prepared}

    def grade(self, text, answer):
        if text == "memory":
            return len(bytearray(3 << 29)) > 0  # 1.5 GiB
        import torch
        return torch.get_num_threads() == 1 and torch.ones(1 << 22).sum().item() == answer
"""


@pytest.mark.parametrize("words", [("import torch", "pass"), ("", "import torch")])
def test_a_task_may_import_torch_and_is_still_held_to_its_memory(tmp_path, words):
    text = HEAVY.format(imported=words[0], prepared=words[1])
    with Grader({"heavy": outside(tmp_path, text, "Heavy")}) as grader:
        grader.submit(0, "heavy", "", 1 << 22)
        grader.submit(1, "heavy", "memory", 0)
        grader.submit(2, "arithmetic", "<answer> 4 </answer>", 4)
        right, dead, own = finish(grader)
    assert (right, own) == (Graded(0, 1.0), Graded(2, 1.0))
    assert dead.reward is None and dead.reason.startswith("MemoryError")


def test_an_exception_does_not_cost_a_worker(tmp_path):
    """One that has loaded torch would take seconds to replace."""
    with Grader({"unruly": outside(tmp_path, UNRULY, "Unruly")}, workers=1) as grader:
        pid = grader._workers[0].process.pid
        for key, text in enumerate(("raise", "nothing", "memory", "fine")):
            grader.submit(key, "unruly", text, 1)
        assert [g.reward for g in finish(grader)] == [None, None, None, 1.0]
        assert grader._workers[0].process.pid == pid


def test_a_task_that_the_worker_cannot_make_is_one_sentence(tmp_path):
    late = outside(tmp_path, UNRULY, "Unruly")
    (tmp_path / "outside.py").write_text("1 / 0")
    with pytest.raises(RuntimeError, match="did not start.*outside.py cannot .*ZeroDivisionError"):
        Grader({"late": late})
    (tmp_path / "outside.py").write_text("raise SystemExit(0)")
    with pytest.raises(RuntimeError, match="outside.py cannot be imported .*SystemExit"):
        Grader({"late": late})
    (tmp_path / "outside.py").write_text("import os; os._exit(0)")
    with pytest.raises(RuntimeError, match="did not start; it said: nothing"):
        Grader({"late": late})


def test_a_task_of_the_program_itself(tmp_path):
    """Its module is called __main__ here and something else in the worker."""
    program = tmp_path / "program.py"
    program.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass(frozen=True)\n"
        "class Mine:\n"
        "    shift: int = 0\n"
        "    def problems(self, split, seed):\n"
        "        yield from ()\n"
        "    def grade(self, text, answer):\n"
        "        return int(text) == answer + self.shift\n"
        "if __name__ == '__main__':\n"
        "    from spo.tasks.grading import Grader\n"
        "    with Grader({'mine': Mine(2)}) as grader:\n"
        "        grader.submit(0, 'mine', '5', 3)\n"
        "        print(grader.poll(60.0))\n"
    )
    env = {"PYTHONPATH": ":".join(p or "." for p in sys.path)}
    ran = subprocess.run([sys.executable, program], env=env, capture_output=True, text=True)
    said = "[Graded(key=0, reward=1.0, reason=None, answer=None)]\n"
    assert (ran.stdout, ran.stderr) == (said, "")
