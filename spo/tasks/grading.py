"""Grading in a worker process that can be killed: no response can hang, crash or fool the trainer.

The worker is a new interpreter behind two pipes, never a fork, so threads of the parent do not
matter. It receives the names and settings of the tasks and makes the tasks itself. It reads one
batch of items at a time and answers item by item. The parent kills it if an item takes too long,
gives that item no reward, and sends the rest to a new worker.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import resource
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from spo import named
from spo.tasks import OPTIONS, Task

START_TIMEOUT_S = 120.0  # a task may import torch from a slow disk
BATCH_ITEMS, BATCH_CHARS = 512, 1 << 20  # maximum size of a message
HEADER = 8  # bytes of a message's length, big endian


@dataclass(frozen=True)
class Graded:
    """One verdict."""

    key: int  # as submitted
    reward: float | None  # 1 or 0; None if there is no verdict, which is never a zero
    reason: str | None = None  # why there is no verdict


class Grader:
    """Grades responses in the background: `submit`, then `poll` until `pending` is 0.

    Args:
        tasks: value of `Prompt.task` -> the task that grades it. The package's own tasks may be
            left out; such a task restarts the worker at its first use.
        timeout_s: maximum time for one item; after it the worker is killed.
        memory_mb: memory that grading may map, beyond that of the worker with prepared tasks.

    Raises ValueError for limits that are not positive and for settings that JSON cannot hold,
    RuntimeError if the worker cannot start.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task] | None = None,
        *,
        timeout_s: float = 5.0,
        memory_mb: int = 1024,
    ) -> None:
        for name, value in (("timeout_s", timeout_s), ("memory_mb", memory_mb)):
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, found {value}")
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._tasks = {name: _spec(task) for name, task in (tasks or {}).items()}
        self._queue: deque[tuple[int, str]] = deque()  # key and item as JSON, not yet sent
        self._sent: deque[tuple[int, str]] = deque()  # with the worker, in order
        self._graded: list[Graded] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._start()

    def submit(self, key: int, task: str, text: str, answer: object) -> None:
        """Queue one response; `answer` is any JSON value. The next `poll` sends it.

        Raises ValueError for an unknown task, TypeError if `text` is no str or `answer` no JSON.
        """
        if self._process is None:
            raise RuntimeError("the grader is closed")
        if task not in self._tasks and task not in named.OWN["task"]:
            known = ", ".join(sorted({*named.OWN["task"], *self._tasks}))
            raise ValueError(f"task: expected one of {known}, found {task!r}")
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str, found {type(text).__name__}")
        item = json.dumps([task, text, answer])
        if task not in self._tasks:
            self._tasks[task] = (task, {})
            self._restart(None)  # loading takes longer than an item may
        self._queue.append((key, item))

    @property
    def pending(self) -> int:
        """Number of items that were submitted and that `poll` has not returned yet."""
        return len(self._queue) + len(self._sent) + len(self._graded)

    def poll(self, timeout_s: float = 0.0) -> list[Graded]:
        """Verdicts since the last call, in the order of submission; sends waiting items.

        Waits up to `timeout_s` for the first one. Call it regularly: it also enforces the deadline.
        """
        give_up = time.monotonic() + timeout_s
        while True:
            if not self._sent and self._queue:
                self._send()
            if not self._sent:
                break
            wait_s = 0.0 if self._graded else give_up - time.monotonic()
            self._receive(max(0.0, min(wait_s, self._deadline - time.monotonic())))
            if self._sent and (self._graded or time.monotonic() >= give_up):
                break
        graded, self._graded = self._graded, []
        return graded

    def close(self) -> None:
        """Kill the worker and forget all pending items."""
        self._kill()
        self._queue.clear()
        self._sent.clear()
        self._graded.clear()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        arguments = [self._timeout_s, self._memory_mb, self._tasks]
        process = self._process = subprocess.Popen(
            [sys.executable, "-B", "-m", "spo.tasks.grading", json.dumps(arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # The trainer needs the other cores, and every thread maps memory.
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C reaches only the trainer; the group can be killed
        )
        assert process.stdin is not None and process.stdout is not None
        self._stdin: IO[bytes] = process.stdin
        self._stdout: IO[bytes] = process.stdout
        self._unread = b""
        ready, _, _ = select.select([self._stdout], [], [], START_TIMEOUT_S)
        said = os.read(self._stdout.fileno(), 1 << 16) if ready else b""
        if said != b"null\n":
            self._kill()
            why = said.decode(errors="replace").strip() or "nothing"
            raise RuntimeError(f"the grading worker did not start; it said: {why}")

    def _kill(self) -> None:
        """End the worker and everything it started."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            self._stdin.close()
            self._stdout.close()

    def _restart(self, reason: str | None) -> None:
        """Start a new worker for the sent items; with a reason, the first of them fails."""
        self._kill()
        if reason is not None:
            self._graded.append(Graded(self._sent.popleft()[0], None, reason))
        self._queue.extendleft(reversed(self._sent))
        self._sent.clear()
        self._start()

    def _send(self) -> None:
        """Send a batch. The worker reads all of it before it grades, so this cannot block long."""
        size = 0
        while self._queue and len(self._sent) < BATCH_ITEMS:
            size += len(self._queue[0][1])
            if self._sent and size > BATCH_CHARS:
                break
            self._sent.append(self._queue.popleft())
        body = f"[{','.join(item for _, item in self._sent)}]".encode()
        message = memoryview(len(body).to_bytes(HEADER, "big") + body)
        try:
            while message:
                message = message[self._stdin.write(message) :]
        except BrokenPipeError:  # it died while it waited, not because of an item
            self._restart(None)
        self._deadline = time.monotonic() + self._timeout_s

    def _receive(self, wait_s: float) -> None:
        """Read the worker's answers; replace the worker if it is dead or late."""
        ready, _, _ = select.select([self._stdout], [], [], wait_s)
        if not ready:
            if time.monotonic() >= self._deadline:
                self._restart(f"timed out after {self._timeout_s:g} s")
            return
        said = os.read(self._stdout.fileno(), 1 << 16)
        if not said:
            assert self._process is not None
            # Not reaped here, so that its process group still exists when `_kill` ends it.
            end = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
            assert end is not None
            by = "exit code" if end.si_code == os.CLD_EXITED else "signal"
            self._restart(f"the worker ended with {by} {end.si_status}")
            return
        *lines, self._unread = (self._unread + said).split(b"\n")
        for line in lines:
            verdict = json.loads(line)
            if isinstance(verdict, str):  # an error that ended the worker
                self._restart(verdict)
                return
            key, _ = self._sent.popleft()
            if isinstance(verdict, list):
                self._graded.append(Graded(key, None, verdict[0]))
            else:
                self._graded.append(Graded(key, float(verdict)))
        self._deadline = time.monotonic() + self._timeout_s


def _spec(task: Task) -> tuple[str, dict[str, Any]]:
    """A task's name and its settings as JSON, from which the worker makes the task."""
    name = named.name_of("task", type(task))
    return name, named.settings_of(task, f"task {name}")


def _made(name: str, settings: dict[str, Any]) -> Task:
    """The task of a `_spec`. The package's own tasks have plain settings and need no pydantic."""
    kind = named.find("task", name)
    return kind(**settings) if name in named.OWN["task"] else named.build(kind, settings, OPTIONS)


def _serve(timeout_s: float, memory_mb: int, specs: dict[str, tuple[str, dict[str, Any]]]) -> None:
    """The worker writes `null` when ready, then a line per item: true, false or [the reason].

    An error that ends the worker is a line with a str.
    """
    answers = os.dup(1)  # what a grader prints must not look like a verdict
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def say(value: object) -> None:
        os.write(answers, json.dumps(value).encode() + b"\n")

    def words(kind: type, error: object) -> str:
        return f"{kind.__name__}: {error}"[:1000]

    sys.excepthook = lambda kind, error, _: say(words(kind, error))
    tasks = {name: _made(*spec) for name, spec in specs.items()}
    for task in tasks.values():
        if prepare := getattr(task, "prepare", None):
            prepare()
    memory = _mapped() + (int(memory_mb) << 20)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # it writes no file
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    say(None)
    while header := sys.stdin.buffer.read(HEADER):
        batch = json.loads(sys.stdin.buffer.read(int.from_bytes(header, "big")))
        for name, text, answer in batch:
            _limit_cpu(timeout_s)
            try:
                verdict = tasks[name].grade(text, answer)
                if not isinstance(verdict, bool):
                    raise TypeError(f"expected grade of {name} to return a bool, found {verdict!r}")
            except Exception as error:  # of the user's code; a new worker would take seconds
                verdict = [words(type(error), error)]
            say(verdict)


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
    _serve(*json.loads(sys.argv[1]))
