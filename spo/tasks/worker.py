"""The grading worker: a process that makes tasks and rewards and says what responses are worth."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import os
import pickle
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from spo import named
from spo.reward import Reward, reward_of
from spo.signatures import Response
from spo.tasks import OPTIONS, Task

HEADER = 8  # bytes of a message's length, big endian
PRINTED = 2000  # characters that an item may print
NO_FILES = "the grading worker writes no files; a reward with process: trainer can"


def _serve() -> None:
    """The worker reads how to work, writes `null` when ready, then a line per item.

    A line is [the item's number, what of it]: true, false or [the reason] of a task, {"answer": …}
    where that was asked, a `Result` of the reward. {"printed": …} may come before. An error that
    ends the worker is a line with a str.
    """
    answers = os.dup(1)  # what a grader prints must not look like a verdict
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    requests = os.fdopen(os.dup(0), "rb")  # nor may it read or close what is asked
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout = sys.stderr

    lock = threading.Lock()  # threads of a grader print
    process = os.getpid()

    def say(value: object) -> None:
        if os.getpid() != process:  # a fork of a grader that came back: its parent answers
            os._exit(0)
        line = json.dumps(value).encode() + b"\n"
        with lock:
            os.write(answers, line)

    def words(kind: type, error: object) -> str:
        return f"{kind.__name__}: {error}"[:1000]

    sys.excepthook = lambda kind, error, _: say(words(kind, error))
    timeout_s, memory_mb, specs, rewarding = _message(requests)
    tasks = {name: _made(*spec) for name, spec in specs.items()}
    reward = None if rewarding is None else _made_reward(rewarding)
    for part in (*tasks.values(), *(reward.functions if reward else ())):
        if prepare := getattr(part, "prepare", None):
            prepare()
    tempfile.gettempdir()  # later it would find no folder to write in
    memory = _mapped() + (int(memory_mb) << 20)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # libraries write past the hook
    sys.addaudithook(_refuse_to_write)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    say(None)
    printed = sys.stdout = sys.stderr = _Printed(say)
    done = 0  # items, which a grader that writes to the pipe does not know
    while batch := _message(requests):
        for name, *item in batch:
            done += 1
            _limit_cpu(timeout_s)
            printed.left = PRINTED
            if reward is not None and name is None:
                say([done, dataclasses.asdict(reward(Response(**item[0])))])
                continue
            text, answer, *asked = item
            try:
                verdict = _answer(tasks[name], text) if asked else tasks[name].grade(text, answer)
                if not asked and not isinstance(verdict, bool):
                    raise TypeError(f"expected grade of {name} to return a bool, found {verdict!r}")
            except Exception as error:  # of the user's code; a new worker would take seconds
                verdict = [words(type(error), error)]
            say([done, verdict])


class _Printed(io.TextIOBase):
    """What is printed goes to the trainer, which shows it: this process cannot write to a log file.

    `left` is how many characters the present item may still print.
    """

    left = 0

    def __init__(self, say: Callable[[object], None]):
        self._say, self._process = say, os.getpid()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self.left > 0 and os.getpid() == self._process:
            self._say({"printed": text[: self.left] + ("…\n" if len(text) > self.left else "")})
            self.left -= len(text)
        return len(text)


def _refuse_to_write(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: files cannot be written, and opening them could empty them."""
    if event != "open" or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
        return
    path = arguments[0]
    device = os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path))
    if not (device or isinstance(path, int)):
        raise PermissionError(f"{NO_FILES} ({os.fsdecode(path)})")


def _answer(task: Any, text: str) -> dict[str, str | None]:
    found = task.answer(text)
    if not isinstance(found, str | None):
        raise TypeError(f"expected answer to return a str or None, found {found!r}")
    return {"answer": found}


def _made(name: str, settings: dict[str, Any]) -> Task:
    """The task of a `_spec`. The package's own tasks have plain settings and need no pydantic."""
    kind = named.find("task", name)
    return kind(**settings) if name in named.OWN["task"] else named.build(kind, settings, OPTIONS)


def _made_reward(spec: dict[str, Any]) -> Reward:
    """The reward of a `reward_spec`, with what its rules prepare."""
    from spo.config.reward import RewardConfig

    for name, pickled in spec["given"].items():
        named.restore(name, pickle.loads(base64.b64decode(pickled)))
    return reward_of(named.build(RewardConfig, spec["reward"], "reward"))


def _message(requests: IO[bytes]) -> Any:
    """The next message of the parent, None at the end."""
    header = requests.read(HEADER)
    if not header:
        return None
    return json.loads(requests.read(int.from_bytes(header, "big")))


def _mapped() -> int:
    """Bytes of address space of this process; libraries such as torch map a lot."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _limit_cpu(seconds: float) -> None:
    """Let the kernel end an endless item, even if the parent is dead or does not poll."""
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(time.process_time() + seconds) + 1
    resource.setrlimit(
        resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard)
    )


if __name__ == "__main__":
    _serve()
