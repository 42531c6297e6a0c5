"""Grading in a worker process that can be killed: no response can hang, crash or fool the trainer.

The worker is a new interpreter behind two pipes, never a fork, so threads of the parent do not
matter. It receives the names and settings of the tasks and makes the tasks itself. It reads one
batch of items at a time and answers item by item. The parent kills it if an item takes too long,
gives that item no reward, and sends the rest to a new worker.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import IO, TYPE_CHECKING, Any

from spo import named
from spo.reward import Result, printable, reward_of
from spo.signatures import Response
from spo.tasks import Task
from spo.tasks.worker import HEADER

if TYPE_CHECKING:
    from spo.config.reward import RewardConfig
    from spo.tasks.calls import Calls

START_TIMEOUT_S = 120.0  # a task may import torch from a slow disk
BATCH_ITEMS, BATCH_CHARS = 512, 1 << 20  # maximum size of a message


@dataclass(frozen=True)
class Graded:
    """One verdict."""

    key: int  # as submitted
    reward: float | None  # 1 or 0 of a task; None if there is no verdict, which is never a zero
    reason: str | None = None  # why there is no verdict
    trace: str = field(default="", repr=False)  # where a reward function failed
    parts: tuple[float | None, ...] = field(default=(), repr=False)  # of each term, unweighted
    answer: str | None = None  # of `Grader.answers`


class Grader:
    """Grades responses in the background: `submit`, then `poll` until `pending` is 0.

    Args:
        tasks: value of `Prompt.task` -> the task that grades it. The package's own tasks may be
            left out; such a task restarts the worker at its first use.
        reward: what `submit_reward` asks, in the process that it names.
        timeout_s: maximum time for one item; after it the worker is killed.
        memory_mb: memory that grading may map, beyond that of the worker with prepared tasks.

    Raises ValueError for limits that are not positive and for settings that JSON cannot hold,
    RuntimeError if the worker cannot start.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task] | None = None,
        *,
        reward: RewardConfig | None = None,
        timeout_s: float = 5.0,
        memory_mb: int = 1024,
    ) -> None:
        for name, value in (("timeout_s", timeout_s), ("memory_mb", memory_mb)):
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, found {value}")
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._tasks = {name: _spec(task) for name, task in (tasks or {}).items()}
        self._calls: Calls | None = None
        self._reward: dict[str, Any] | None = None
        if reward is not None and reward.process == "trainer":
            from spo.tasks.calls import Calls  # imports what the worker does not need

            self._calls = Calls(reward_of(reward), reward)
        elif reward is not None:
            self._reward = _reward_spec(reward)
        self._queue: deque[tuple[int, str]] = deque()  # key and item as JSON, not yet sent
        self._sent: deque[tuple[int, str]] = deque()  # with the worker, in order
        self._graded: list[Graded] = []
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except BaseException:  # an interrupt, too
            self.close()
            raise

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

    def submit_reward(self, key: int, response: Response) -> None:
        """Queue one response for the reward. Raises TypeError if it is no JSON."""
        if self._calls is not None:
            self._calls.submit(key, response)
        elif self._reward is None:
            raise ValueError("submit_reward: expected a grader with a reward, found one without")
        else:
            self._queue.append((key, json.dumps([None, dataclasses.asdict(response)])))

    def answers(self, responses: Sequence[tuple[str, str]]) -> list[str | None]:
        """What the method `answer` of their task finds in (task, response) pairs; waits for it.

        None where it finds nothing, or fails. Raises RuntimeError if it fails on more than half.
        """
        if self.pending:
            raise RuntimeError(f"expected no item in the grader, found {self.pending}")
        items = enumerate(json.dumps([task, text, None, "answer"]) for task, text in responses)
        self._queue.extend(items)
        done: list[Graded] = []
        while self.pending:
            done += self.poll(0.5)
        failed = [one.reason for one in done if one.reason is not None]
        if len(failed) > len(done) / 2:
            raise RuntimeError(
                f"the task's `answer` failed on {len(failed)} of {len(done)} responses: {failed[0]}"
            )
        return [one.answer for one in done]

    @property
    def pending(self) -> int:
        """Number of items that were submitted and that `poll` has not returned yet."""
        called = 0 if self._calls is None else self._calls.pending
        return len(self._queue) + len(self._sent) + len(self._graded) + called

    def poll(self, timeout_s: float = 0.0) -> list[Graded]:
        """Verdicts since the last call, in the order of submission; sends waiting items.

        Waits up to `timeout_s` for the first one. Call it regularly: it also enforces the deadline.
        """
        called = []
        if self._calls is not None:
            waits = 0.0 if self._queue or self._sent else timeout_s
            called = [_of_result(key, result) for key, result in self._calls.poll(waits)]
        give_up = time.monotonic() + (0.0 if called else timeout_s)
        while True:
            if not self._sent and self._queue:
                self._send()
            if not self._sent:
                break
            wait_s = 0.0 if self._graded else give_up - time.monotonic()
            self._receive(max(0.0, min(wait_s, self._deadline - time.monotonic())))
            if self._sent and (self._graded or time.monotonic() >= give_up):
                break
        graded, self._graded = called + self._graded, []
        return graded

    def close(self) -> None:
        """Kill the worker and forget all pending items."""
        self._kill()
        if self._calls is not None:
            self._calls.close()
        self._queue.clear()
        self._sent.clear()
        self._graded.clear()

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        arguments = [self._timeout_s, self._memory_mb, self._tasks, self._reward]
        process = self._process = subprocess.Popen(
            [sys.executable, "-B", "-m", "spo.tasks.worker"],
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
        with contextlib.suppress(BrokenPipeError):  # what it said tells why
            self._write(json.dumps(arguments))
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
        try:
            self._write(f"[{','.join(item for _, item in self._sent)}]")
        except BrokenPipeError:  # it died while it waited, not because of an item
            self._restart(None)
        self._deadline = time.monotonic() + self._timeout_s

    def _write(self, text: str) -> None:
        """Send one message to the worker."""
        body = text.encode()
        message = memoryview(len(body).to_bytes(HEADER, "big") + body)
        while message:
            message = message[self._stdin.write(message) :]

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
            if isinstance(verdict, dict) and "printed" in verdict:
                print(printable(verdict["printed"]), end="", file=sys.stderr)
                continue
            if isinstance(verdict, str):  # an error that ended the worker
                self._restart(verdict)
                return
            key, _ = self._sent.popleft()
            if isinstance(verdict, list):
                self._graded.append(Graded(key, None, verdict[0]))
            elif not isinstance(verdict, dict):
                self._graded.append(Graded(key, float(verdict)))
            elif "answer" in verdict:
                self._graded.append(Graded(key, None, answer=verdict["answer"]))
            else:
                self._graded.append(_of_result(key, Result(**verdict)))
            self._deadline = time.monotonic() + self._timeout_s


def _spec(task: Task) -> tuple[str, dict[str, Any]]:
    """A task's name and its settings as JSON, from which the worker makes the task."""
    name = named.name_of("task", type(task))
    return name, named.settings_of(task, f"task {name}")


def _of_result(key: int, result: Result) -> Graded:
    return Graded(key, result.reward, result.reason, result.trace, tuple(result.parts))


def _reward_spec(config: RewardConfig) -> dict[str, Any]:
    """A reward as JSON, from which the worker makes it: functions given in Python are pickled."""
    given = {}
    for term in config.terms:
        if term.function is not None and term.function.startswith(named.GIVEN):
            function, _ = named.function("reward.function", term.function)
            try:
                given[term.function] = base64.b64encode(_pickled(function)).decode()
            except Exception as error:  # of whatever the function holds
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"reward: {term.name} cannot be sent to the grading worker ({reason}); "
                    "reward.process=trainer calls it in this process"
                ) from error
    return {"given": given, "reward": named.settings_of(config, "reward")}


def _pickled(function: object) -> bytes:
    """A function with the names of its files, whose lines the worker shows in tracebacks."""
    import cloudpickle

    known: dict[type, Any] = dict(cloudpickle.Pickler.dispatch_table)

    def with_file(code: CodeType) -> tuple[Any, ...]:
        make, arguments = known[CodeType](code)
        return make, tuple(code.co_filename if x == "<dynamic-code>" else x for x in arguments)

    class Pickler(cloudpickle.Pickler):
        dispatch_table = known | {CodeType: with_file}

    file = io.BytesIO()
    Pickler(file).dump(function)
    return file.getvalue()
