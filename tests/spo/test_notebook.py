"""Cells of a notebook: an event loop runs already, functions have no file, Ctrl-C may come."""

import asyncio
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

from spo.config.policy import EMBEDDED
from spo.config.recipe import load_recipe
from spo.engines.hf import HFEngine
from spo.forest import Forest
from spo.tasks.grading import Grader

START = """
import asyncio, os, signal
import spo
pairs = [(a, b) for a in range(8) for b in range(5)]
rows = [{"question": f"arithmetic {a} + {b}\\n", "final": a + b} for a, b in pairs]
columns = {"problem": "question", "answer": "final"}
given = {
    "policy": "embedded",
    "data": {"train": rows, "test": "same", "columns": columns},
    "engine": {"name": "hf", "max_num_seqs": 32, "max_model_len": 96},
    "shape": {"kind": "star", "group_size": 4},
    "max_new_tokens": 40,
    "problems": 4,
}
train = {"iterations": 1, "prompts": 4, "minibatches": 1}
"""


class Kernel:
    """Runs cells in one namespace, inside an event loop, as a notebook's kernel does."""

    def __init__(self):
        self.names = {"__name__": "__main__"}
        self.loop = asyncio.new_event_loop()
        self.run(START)

    def run(self, code):
        async def cell():
            exec(compile(code, "<cell>", "exec"), self.names)

        self.loop.run_until_complete(cell())


@pytest.fixture
def kernel():
    made = Kernel()
    yield made
    made.loop.close()


def left() -> list[str]:
    """What a call has left running: threads of rewards, and grading workers."""
    found = [thread.name for thread in threading.enumerate() if thread.name == "spo-reward"]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
            parent = (process / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:  # it has ended
            continue
        if "spo.tasks.worker" in command and int(parent) == os.getpid():
            found.append(command)
    return found


def test_cells_train_sample_and_show(kernel, tmp_path, capfd, monkeypatch):
    """An async reward in this process, one of a name that is defined again, and a tree's page."""
    monkeypatch.setattr(logging, "_tqdm_active", True)  # another test may have used the command
    kernel.names["out"] = str(tmp_path)
    kernel.run(
        "async def close(response, final):\n"
        "    await asyncio.sleep(0)\n"
        "    return 0.25 + 0.5 * (f' {final} ' in response)\n"
        "judged = {'function': close, 'process': 'trainer'}\n"
        "lines = spo.train('grpo', reward=judged, out=out, **given, **train).metrics\n"
    )
    start, line, end = kernel.names["lines"]
    assert (start["stage"], line["stage"], end["stage"]) == ("eval", "train", "eval")
    assert 0.25 <= line["reward_close"] <= 0.75 and line["invalid_gradings"] == 0
    share = "forest, _ = spo.rollout('grpo', reward=close, prompts=4, **given)\n"
    for most in (1, 2):  # in the worker, which gets what the name stands for now
        kernel.run(f"def close(response, final):\n    return {most}\n{share}")
        forest = kernel.names["forest"]
        assert set(forest.rewards[forest.finish == 1].tolist()) == {most}
    kernel.run("page = forest.show()._repr_html_()")
    assert kernel.names["page"].startswith("<iframe srcdoc=")
    assert left() == [] and "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()


INTERRUPTED = """
asked = []
async def stopped(response):
    asked.append(response)
    if len(asked) == 11:
        os.kill(os.getpid(), signal.SIGINT)
    await asyncio.sleep(3600 if len(asked) >= 11 else 0)
    return len(response) / 40
"""


def test_ctrl_c_closes_all_and_the_next_call_works(kernel, tmp_path):
    """It comes while the first iteration's samples run: at most eight are of the evaluation."""
    names = kernel.names
    engine = HFEngine(str(EMBEDDED), max_num_seqs=8, max_model_len=96)
    names |= {"out": str(tmp_path), "engine": engine}
    kernel.run(INTERRUPTED)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            kernel.run(
                "judged = {'function': stopped, 'process': 'trainer', 'timeout_s': 3600}\n"
                "spo.train('grpo', reward=judged, out=out, **given | {'engine': engine}, **train)\n"
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert left() == [] and engine.room < 8  # some samples have not ended
    kernel.run("given['reward'] = lambda response: len(response) / 100")
    kernel.run("forest, _ = spo.rollout('grpo', prompts=4, **given | {'engine': engine})")
    kernel.run("lines = spo.train('grpo', out=out, **given, **train).metrics")
    assert [line["stage"] for line in names["lines"]] == ["eval", "train", "eval"]
    first = Forest.load(tmp_path / "forest-first.safetensors")
    assert torch.equal(names["forest"].token_ids, first.token_ids)  # nothing of what ran before
    assert torch.equal(names["forest"].rewards.nan_to_num(), first.rewards.nan_to_num())


def test_ctrl_c_while_the_worker_starts_leaves_nothing(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import os, time\n"
        f"if os.getpid() != {os.getpid()}:\n"
        "    time.sleep(60)\n"
        "def slow(response):\n"
        "    return 1.0\n"
    )
    recipe = load_recipe(None, [f"reward={tmp_path}/slow.py:slow"])
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            Grader(reward=recipe.reward)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert left() == []
