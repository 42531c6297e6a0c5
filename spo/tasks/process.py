"""One grading worker as its parent sees it: a process behind two pipes, and the time of its item.

Time is what the worker spends: its processor time, and the time that it sleeps, or is stopped by a
signal, while the parent looks on. A machine that stands still, or gives the worker no core, makes
no answer late.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from spo.tasks.forms import Form
from spo.tasks.worker import HEADER

START_TIMEOUT_S = 120.0  # a task may import torch from a slow disk
MOST_WORKERS = 8
TICK_S = 0.1  # between two looks at a busy worker
LONGEST_TICK_S = 0.3  # of sleep that counts between two looks; the parent may have been held up
NO_VERDICT = "the worker said what is no verdict"
END_S = 1.0  # from the end of a worker's pipe to its own
_CLOCK = os.sysconf("SC_CLK_TCK")


def default_workers() -> int:
    """One for each core that this rank may use, at least 2 so that one may hang, at most 8."""
    cores = len(os.sched_getaffinity(0)) // max(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    return max(2, min(cores, MOST_WORKERS))


@dataclass(frozen=True)
class Item:
    """What a worker is asked about."""

    serial: int  # in the order of submission
    key: int  # the caller's
    message: str  # JSON
    form: Form


class Silent(RuntimeError):
    """A worker ended before it was ready and did not say why, as one that was killed."""


class Worker:
    """A process that grades items one by one.

    Args:
        arguments: the worker's first message (`spo.tasks.worker`).
        timeout_s: maximum time that it may spend on one item; `limit_s` may become less.
    """

    def __init__(self, arguments: list[Any], timeout_s: float):
        self.limit_s = timeout_s
        self.sent: deque[Item] = deque()  # with the worker, in order
        self.answered = 0  # items
        self.ready, self.tries = False, 1  # starts in this worker's place since one was ready
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-B", "-m", "spo.tasks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # The trainer needs the other cores, and every thread maps memory.
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C reaches only the trainer; the group can be killed
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._stdin: IO[bytes] = self.process.stdin
        self.stdout: IO[bytes] = self.process.stdout
        self._unread = b""
        self._started = time.monotonic()
        self._looked, self._asleep, self._processor = self._started, 0.0, (0.0, 0.0)
        with contextlib.suppress(BrokenPipeError):  # what it said tells why
            self._write(json.dumps(arguments))

    def start(self, wait_s: float) -> bool:
        """Wait for the worker to be ready; whether it is.

        Raises RuntimeError, and ends it, if it says that it cannot start or says nothing for long;
        `Silent` if it is dead and has said nothing.
        """
        if self.ready:
            return True
        late = time.monotonic() - self._started > START_TIMEOUT_S
        found, _, _ = select.select([self.stdout], [], [], 0 if late else wait_s)
        if not found and not late:
            return False
        said = os.read(self.stdout.fileno(), 1 << 16) if found else b""
        if said != b"null\n":
            silent = bool(found) and not said
            why = f"nothing; {self.end()}" if silent else said.decode(errors="replace").strip()
            self.kill()
            kind = Silent if silent else RuntimeError
            raise kind(f"the grading worker did not start; it said: {why or 'nothing'}")
        self.ready = True
        return True

    def send(self, items: list[Item]) -> bool:
        """Send a batch to an idle worker; False if it has died.

        It reads all of a batch before it grades, so this cannot block long.
        """
        self.sent.extend(items)
        self._restart_clock()
        try:
            self._write(f"[{','.join(item.message for item in items)}]")
        except BrokenPipeError:  # it died while it waited, not because of an item
            return False
        return True

    def read(self) -> list[Any] | None:
        """The values that it said since the last call; None if it has ended. Does not block."""
        if not select.select([self.stdout], [], [], 0)[0]:
            return []
        said = os.read(self.stdout.fileno(), 1 << 16)
        if not said:
            return None
        *lines, self._unread = (self._unread + said).split(b"\n")
        return [_value(line) for line in lines]

    def done(self) -> tuple[Item, float]:
        """The item that it has answered, and the most that it spent; the next one's time begins."""
        spent = self._usage()[1] - self._processor[0] + self._asleep
        self._restart_clock()
        self.answered += 1
        return self.sent.popleft(), spent

    def is_late(self) -> bool:
        """Whether it has spent too much on its item. To be asked every `TICK_S`."""
        now, (state, processor) = time.monotonic(), self._usage()
        worked = processor - self._processor[1]
        if state in "SDTt":  # asleep, or stopped by a signal
            self._asleep += max(min(now - self._looked, LONGEST_TICK_S) - worked, 0.0)
        self._looked, self._processor = now, (self._processor[0], processor)
        return processor - self._processor[0] + self._asleep >= self.limit_s

    def is_dead(self) -> bool:
        return self._end() is not None

    def end(self) -> str:
        """How a worker ended whose pipe is closed. A grader may have closed it: no long wait."""
        give_up = time.monotonic() + END_S
        while (end := self._end()) is None:
            if time.monotonic() > give_up:
                return "the worker closed its pipe"
            time.sleep(0.001)
        if end.si_code != os.CLD_EXITED and end.si_status == signal.SIGXCPU:
            return self.late
        by = "exit code" if end.si_code == os.CLD_EXITED else "signal"
        return f"the worker ended with {by} {end.si_status}"

    @property
    def late(self) -> str:
        return f"timed out after {self.limit_s:.3g} s"

    def kill(self) -> None:
        """End the worker and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._stdin.close()
        self.stdout.close()

    def _end(self) -> Any:
        """Not reaped here, so that its group exists until `kill`."""
        return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)

    def _restart_clock(self) -> None:
        processor = self._usage()[1]
        self._looked, self._asleep = time.monotonic(), 0.0
        self._processor = (processor, processor)  # at the start of the item, at the last look

    def _usage(self) -> tuple[str, float]:
        """State and seconds of processor time, of all its threads."""
        try:
            text = Path(f"/proc/{self.process.pid}/stat").read_text()
        except OSError:
            return "Z", self._processor[1]
        fields = text.rpartition(")")[2].split()
        return fields[0], (int(fields[11]) + int(fields[12])) / _CLOCK

    def _write(self, text: str) -> None:
        """Send one message."""
        body = text.encode()
        message = memoryview(len(body).to_bytes(HEADER, "big") + body)
        while message:
            message = message[self._stdin.write(message) :]


def _value(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # a grader has written to the pipe
        return NO_VERDICT
