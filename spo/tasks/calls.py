"""Rewards in the trainer's process: coroutines on one event loop, other functions in threads.

And a reward as the grading workers receive it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import queue
import threading
from collections import deque
from collections.abc import Callable
from types import CodeType
from typing import Any

from spo import named
from spo.config.reward import RewardConfig
from spo.reward import Result, Reward, failed
from spo.signatures import Response

Item = tuple[int, Response]
CLOSING_S = 1.0  # that `close` waits for coroutines to end


class Calls:
    """Rewards of responses: `submit`, then `poll` until `pending` is 0.

    At most `config.parallel` calls run at the same time. A call that is late leaves its responses
    without a reward and goes on in a thread that does not keep the process alive.
    """

    def __init__(self, reward: Reward, config: RewardConfig):
        self._reward, self._config = reward, config
        lists = all(function.takes_lists for function, _ in reward.terms)
        self._size = config.batch if lists else 1
        self._waiting: deque[Item] = deque()
        self._done: queue.SimpleQueue[tuple[int, Result]] = queue.SimpleQueue()
        self._running = 0  # calls
        self.pending = 0  # responses that `poll` has not returned
        self._loop = asyncio.new_event_loop()  # not the caller's, which a notebook's kernel runs
        self._thread = threading.Thread(target=self._serve, name="spo-reward", daemon=True)
        self._thread.start()

    def submit(self, key: int, response: Response) -> None:
        """Queue one response; the next `poll` starts its call."""
        self._waiting.append((key, response))
        self.pending += 1

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, Result]]:
        """Results since the last call, as they ended; waits up to `timeout_s` for the first."""
        self._start()
        found: list[tuple[int, Result]] = []
        while self.pending > len(found):
            try:
                found.append(
                    self._done.get(timeout=0 if found else timeout_s)
                    if timeout_s
                    else self._done.get_nowait()
                )
            except queue.Empty:
                break
        self.pending -= len(found)
        return found

    def close(self) -> None:
        """Forget all responses, cancel the coroutines and end the event loop."""
        self._waiting.clear()
        with contextlib.suppress(RuntimeError):  # it was closed before
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CLOSING_S)  # a coroutine that blocks keeps it

    def _serve(self) -> None:
        self._loop.run_forever()
        for task in (tasks := asyncio.all_tasks(self._loop)):
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.wait(tasks))
        self._loop.close()

    def _start(self) -> None:
        while self._waiting and self._running < self._config.parallel:
            batch = [self._waiting.popleft() for _ in range(min(self._size, len(self._waiting)))]
            self._running += 1
            asyncio.run_coroutine_threadsafe(self._judge(batch), self._loop)

    async def _judge(self, batch: list[Item]) -> None:
        try:
            results = await self._results([response for _, response in batch])
            if len(batch) > 1 and results[0].trace:  # whose fault was it
                results = [(await self._results([response]))[0] for _, response in batch]
        finally:
            self._running -= 1
        for (key, _), result in zip(batch, results, strict=True):
            self._done.put((key, result))

    async def _results(self, responses: list[Response]) -> list[Result]:
        limit = self._config.timeout_s
        try:
            return await asyncio.wait_for(self._asked(responses), limit)
        except asyncio.TimeoutError:
            return [Result(None, reason=f"timed out after {limit:g} s")] * len(responses)
        except Exception as error:  # of the user's code
            return [failed(error)] * len(responses)

    async def _asked(self, responses: list[Response]) -> list[Result]:
        columns = []
        for function, _ in self._reward.terms:
            if function.is_async:
                returned = await function.call(responses)
            else:
                returned = await in_thread(lambda f=function: f.call(responses))
            columns.append(function.results(returned, len(responses)))
        return [self._reward.total(parts) for parts in zip(*columns, strict=True)]


async def in_thread(function: Callable[[], Any]) -> Any:
    """The result of a function that runs in a thread of its own, which ends with the process."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if future.done():  # it was late
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def run() -> None:
        value, problem = None, None
        try:
            value = function()
        except Exception as error:  # of the user's code
            problem = error
        try:
            loop.call_soon_threadsafe(settle, value, problem)
        except RuntimeError:  # the loop has ended
            return

    threading.Thread(target=run, daemon=True).start()
    return await future


def reward_spec(config: RewardConfig) -> dict[str, Any]:
    """A reward as JSON, from which the worker makes it: functions given in Python are pickled.

    Raises ValueError for one that cannot be.
    """
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
