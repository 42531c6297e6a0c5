"""Grading in workers that can be killed: no response can hang, crash or fool the trainer.

A worker is a new interpreter behind two pipes, never a fork, so threads of the parent do not
matter. It receives the names and settings of the tasks and makes the tasks itself. It reads one
batch of items at a time and answers item by item. The parent kills it if it spends too much on an
item, gives that item no reward, and sends the rest to another worker.
"""

from __future__ import annotations

import dataclasses
import json
import select
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spo import named
from spo.reward import Result, printable, reward_of
from spo.signatures import Response
from spo.tasks import Task
from spo.tasks.forms import Hangs, form_of
from spo.tasks.process import NO_VERDICT, TICK_S, Item, Silent, Worker, default_workers

if TYPE_CHECKING:
    from spo.config.reward import RewardConfig
    from spo.tasks.calls import Calls

BATCH_ITEMS, BATCH_CHARS = 512, 1 << 20  # maximum size of a message
FEW = 64  # items for each worker that are sent at once; of more a part
MOST_STARTS = 3  # of workers in one place that die in silence, one after the other
AGAIN = "not tried: an answer of this form timed out before"


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
            left out; such a task restarts the workers at its first use.
        reward: what `submit_reward` asks, in the process that it names.
        timeout_s: maximum time that a worker may spend on one item, working or asleep; after it
            the worker is killed.
        memory_mb: memory that grading may map, beyond that of the worker with prepared tasks.
        workers: processes; by default one for each core of this rank, from 2 to 8.

    A response that hung is not tried again, nor one that differs in its numbers only once two of
    that form, and more than were fine, have hung: it has no reward, at once. From the fourth hang
    on the limit is 10 times what the slowest other item took, at least a tenth of `timeout_s`.

    Raises ValueError for limits that are not positive and for settings that JSON cannot hold,
    RuntimeError if the workers cannot start.
    """

    def __init__(
        self,
        tasks: Mapping[str, Task] | None = None,
        *,
        reward: RewardConfig | None = None,
        timeout_s: float = 5.0,
        memory_mb: int = 1024,
        workers: int | None = None,
    ) -> None:
        count = default_workers() if workers is None else workers
        for name, value in (
            ("timeout_s", timeout_s),
            ("memory_mb", memory_mb),
            ("workers", count),
        ):
            if not value > 0:
                raise ValueError(f"{name}: expected a positive number, found {value}")
        self._timeout_s = timeout_s
        self._memory_mb = memory_mb
        self._tasks = {name: _spec(task) for name, task in (tasks or {}).items()}
        self._calls: Calls | None = None
        self._reward: dict[str, Any] | None = None
        if reward is not None:
            from spo.tasks.calls import Calls, reward_spec  # import what tasks do not need

            if reward.process == "trainer":
                self._calls = Calls(reward_of(reward), reward)
            else:
                self._reward = reward_spec(reward)
        self._queue: deque[Item] = deque()  # not yet sent
        self._graded: dict[int, Graded] = {}  # by serial number, until those before them are there
        self._submitted = self._returned = 0
        self._hangs = Hangs(timeout_s)
        self._workers: list[Worker] = []
        self._count, self._open = count, True
        try:
            self._start()
        except BaseException:  # an interrupt, too
            self.close()
            raise

    def submit(self, key: int, task: str, text: str, answer: object) -> None:
        """Queue one response; `answer` is any JSON value. The next `poll` sends it.

        Raises ValueError for an unknown task, TypeError if `text` is no str or `answer` no JSON.
        """
        if not self._open:
            raise RuntimeError("the grader is closed")
        if task not in self._tasks and task not in named.OWN["task"]:
            known = ", ".join(sorted({*named.OWN["task"], *self._tasks}))
            raise ValueError(f"task: expected one of {known}, found {task!r}")
        if not isinstance(text, str):
            raise TypeError(f"text: expected a str, found {type(text).__name__}")
        item = json.dumps([task, text, answer])
        if task not in self._tasks:
            self._tasks[task] = (task, {})
            for worker in self._workers:
                self._take_back(worker)
            self._start()  # loading takes longer than an item may
        self._add(key, item, task, text, json.dumps(answer))

    def submit_reward(self, key: int, response: Response) -> None:
        """Queue one response for the reward. Raises TypeError if it is no JSON."""
        if self._calls is not None:
            self._calls.submit(key, response)
        elif self._reward is None:
            raise ValueError("submit_reward: expected a grader with a reward, found one without")
        else:
            item = json.dumps([None, dataclasses.asdict(response)])
            answer = json.dumps([response.answer, response.prompt])
            self._add(key, item, "", response.response, answer)

    def answers(self, responses: Sequence[tuple[str, str]]) -> list[str | None]:
        """What the method `answer` of their task finds in (task, response) pairs; waits for it.

        None where it finds nothing, or fails. Raises RuntimeError if it fails on more than half.
        """
        if self.pending:
            raise RuntimeError(f"expected no item in the grader, found {self.pending}")
        for key, (task, text) in enumerate(responses):
            self._add(key, json.dumps([task, text, None, "answer"]), task, text, "answer")
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
        return self._submitted - self._returned + called

    def poll(self, timeout_s: float = 0.0) -> list[Graded]:
        """Verdicts since the last call, in the order of submission; sends waiting items.

        Waits up to `timeout_s` for the first one. Call it regularly: it also enforces the deadline.
        """
        called = []
        if self._calls is not None:
            waits = 0.0 if self._submitted > self._returned else timeout_s
            called = [_of_result(key, result) for key, result in self._calls.poll(waits)]
        give_up = time.monotonic() + (0.0 if called else timeout_s)
        while self._submitted > self._returned:
            self._send()
            wait_s = 0.0 if self._returned in self._graded else give_up - time.monotonic()
            self._receive(max(0.0, min(wait_s, TICK_S)))
            if self._returned in self._graded or time.monotonic() >= give_up:
                break
        graded = called
        while self._returned in self._graded:
            graded.append(self._graded.pop(self._returned))
            self._returned += 1
        return graded

    def close(self) -> None:
        """Kill the workers and forget all pending items."""
        self._open = False
        for worker in self._workers:
            worker.kill()
        self._workers.clear()
        if self._calls is not None:
            self._calls.close()
        self._queue.clear()
        self._graded.clear()
        self._returned = self._submitted

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(self, key: int, message: str, task: str, text: str, answer: str) -> None:
        self._queue.append(Item(self._submitted, key, message, form_of(task, text, answer)))
        self._submitted += 1

    def _new(self) -> Worker:
        arguments = [self._timeout_s, self._memory_mb, self._tasks, self._reward]
        return Worker(arguments, self._timeout_s)

    def _start(self) -> None:
        """Start all workers; wait for the first, which has loaded what the others load."""
        self._workers = [self._new() for _ in range(self._count)]
        while not self._is_ready(self._workers[0], TICK_S):
            pass

    def _is_ready(self, worker: Worker, wait_s: float) -> bool:
        """Whether a worker has started; one that was killed before has another in its place."""
        try:
            return worker.start(wait_s)
        except Silent:
            if worker.tries >= MOST_STARTS:
                raise
            self._replace(worker)
            return False

    def _take_back(self, worker: Worker, reason: str | None = None) -> None:
        """Kill a worker and queue its items again; with a reason, the first of them fails."""
        worker.kill()
        if reason is not None and worker.sent:  # else it was idle, and no item is to blame
            item = worker.sent.popleft()
            self._graded[item.serial] = Graded(item.key, None, reason)
            if reason == worker.late:
                self._hangs.hung(item.form)
        self._queue.extendleft(reversed(worker.sent))
        worker.sent.clear()

    def _replace(self, worker: Worker, reason: str | None = None) -> None:
        self._take_back(worker, reason)
        new = self._new()
        new.tries = 1 if worker.ready else worker.tries + 1
        self._workers[self._workers.index(worker)] = new

    def _send(self) -> None:
        """Give the workers that are idle their parts of the queue."""
        for worker in list(self._workers):
            if not self._queue:
                return
            if not worker.sent and self._is_ready(worker, 0.0) and (items := self._batch()):
                if not worker.send(items):
                    self._replace(worker)

    def _batch(self) -> list[Item]:
        """The next items, without those whose form is known to hang."""
        share = -(-len(self._queue) // self._count)
        most = min(BATCH_ITEMS, share if share <= FEW else max(FEW, share // 4))
        batch: list[Item] = []
        size = 0
        while self._queue and len(batch) < most:
            item = self._queue[0]
            if self._hangs.is_known(item.form):
                self._graded[item.serial] = Graded(item.key, None, AGAIN)
                self._queue.popleft()
                continue
            size += len(item.message)
            if batch and size > BATCH_CHARS:
                break
            batch.append(self._queue.popleft())
        return batch

    def _receive(self, wait_s: float) -> None:
        """Read what the workers say; replace those that are dead or late."""
        waiting = [w for w in self._workers if w.sent or not w.ready]
        found, _, _ = select.select([w.stdout for w in waiting], [], [], wait_s)
        for worker in waiting:
            if not worker.sent:
                self._is_ready(worker, 0.0)
            elif worker.stdout not in found:
                worker.limit_s = self._hangs.limit_s
                late, dead = worker.is_late(), worker.is_dead()  # its children may hold the pipe
                if (late or dead) and not select.select([worker.stdout], [], [], 0)[0]:
                    self._replace(worker, worker.end() if dead else worker.late)
            elif (values := worker.read()) is None:
                self._replace(worker, worker.end())
            else:
                self._take(worker, values)

    def _take(self, worker: Worker, values: list[Any]) -> None:
        for value in values:
            if isinstance(value, dict) and "printed" in value:
                print(printable(value["printed"]), end="", file=sys.stderr)
                worker.is_late()
                continue
            if isinstance(value, str) or not worker.sent:  # its end, or what nobody asked for
                self._replace(worker, str(value))
                return
            try:
                graded = _of_value(worker.sent[0].key, worker.answered + 1, value)
            except TypeError:
                self._replace(worker, NO_VERDICT)
                return
            item, spent = worker.done()
            self._hangs.graded(item.form, spent)
            self._graded[item.serial] = graded


def _spec(task: Task) -> tuple[str, dict[str, Any]]:
    """A task's name and its settings as JSON, from which the worker makes the task."""
    name = named.name_of("task", type(task))
    return name, named.settings_of(task, f"task {name}")


def _of_value(key: int, number: int, said: Any) -> Graded:
    """What the worker said of its item of that number. Raises TypeError if that is no verdict."""
    if not isinstance(said, list) or len(said) != 2 or said[0] != number:
        raise TypeError(f"expected a verdict on item {number}, found {said!r}")
    value = said[1]
    if isinstance(value, bool):
        return Graded(key, float(value))
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        return Graded(key, None, value[0])
    if not isinstance(value, dict):
        raise TypeError(f"expected a verdict, found {value!r}")
    if "answer" in value:
        return Graded(key, None, answer=value["answer"])
    return _of_result(key, Result(**value))


def _of_result(key: int, result: Result) -> Graded:
    return Graded(key, result.reward, result.reason, result.trace, tuple(result.parts))
