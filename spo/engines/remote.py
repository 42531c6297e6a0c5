"""vLLM in another process, here or on another machine, by address: token ids over HTTP.

Each sample in flight has a thread that uses the standard library's client: a trainer without vLLM
lacks the HTTP packages that come with it, and a thread that waits costs nothing. Siblings are
separate requests, because vLLM answers a request only when its last sample has ended.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import queue
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterable
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from spo.engines.protocol import COUNTERS, check_request, check_vocabulary
from spo.engines.stops import StopTexts, drawn_before, stop_texts
from spo.engines.vllm_sampler import CANNOT, parameters
from spo.records import LENGTH, STOP, Completion, Request, Sampling

GENERATE = "/inference/v1/generate"
CONNECT_S = 10.0
POLL_S = 0.002  # maximum wait for a sample in `poll`: less than a step, so nothing is delayed
END = (float("-inf"),)  # sorts before all work
EXPECTED = {  # flags of `vllm serve` that samples and their logprobs depend on
    "--scheduling-policy": "priority",
    "--logprobs-mode": "processed_logprobs",  # at the sampling temperature
    "--enable-prefix-caching": True,
}


class Refused(RuntimeError):
    """The server answered, with an error."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Client:
    """One keep-alive connection. A thread needs its own."""

    def __init__(self, address: str, timeout_s: float):
        if (found := re.fullmatch(r"http://([^/]+:\d+)/?", address)) is None:
            raise ValueError(f"engine.addresses: expected http://host:port, found {address!r}")
        self.address, self.timeout_s = address, timeout_s
        self._http = http.client.HTTPConnection(found[1], timeout=CONNECT_S)
        self._shut = False

    def ask(self, method: str, path: str, body: dict | None = None) -> Any:
        """The JSON answer, None if it is empty.

        Raises ConnectionError if there is no answer, Refused if the answer is an error.
        """
        idle = self._http.sock is not None
        try:
            return self._exchange(method, path, body)
        except TimeoutError as error:
            self._http.close()
            raise ConnectionError(f"{self.address}: no answer in time ({error})") from error
        except (OSError, http.client.HTTPException) as error:
            self._http.close()
            if idle and not self._shut:  # servers close idle connections: try a new one
                return self.ask(method, path, body)
            raise ConnectionError(f"{self.address}: {error or type(error).__name__}") from error

    def shut(self) -> None:
        """Wake up the thread that waits for an answer: `ask` raises ConnectionError there."""
        self._shut = True
        if (sock := self._http.sock) is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:  # already closed by the other side
                pass

    def _exchange(self, method: str, path: str, body: dict | None) -> Any:
        sock = self._http.sock
        if sock is None:
            self._http.connect()
            self._http.sock.settimeout(self.timeout_s)
        data = None if body is None else json.dumps(body)
        self._http.request(method, path, data, {"Content-Type": "application/json"})
        response = self._http.getresponse()
        text = response.read().decode(errors="replace")
        if response.status >= 400:
            reason = f"{self.address}{path} answered {response.status}: {text[:500]}"
            raise Refused(reason, response.status)
        return json.loads(text) if text else None


class RemoteEngine:
    """One `vllm serve` process as an `Engine`; docs/rollout.md says how to start it.

    If the server refuses the connection, dies or does not answer in time, all methods raise
    ConnectionError from then on. Weights are passed in a file in a new folder under `TMPDIR`, which
    must be on a file system that the server's machine shares.

    Args:
        address: http://host:port
        model: folder or hub id whose tokenizer finds stop texts. The server has none: it draws a
            sample to its limit, and what follows a stop text is dropped here.
        dtype: expected dtype of the server's weights; None accepts any.
        max_num_seqs: maximum of samples in flight, at most the server's own; others wait here.
        max_model_len: maximum of prefix + completion, at most the server's own.
        timeout_s: maximum wait for an answer, including the time in the server's queue.
    """

    saved_names = True

    def __init__(
        self,
        address: str,
        *,
        model: str | None = None,
        dtype: torch.dtype | None = None,
        max_num_seqs: int | None = None,
        max_model_len: int | None = None,
        timeout_s: float = 600.0,
    ):
        self.address, self.timeout_s, self.version = address, timeout_s, 0
        self._control = Client(address, timeout_s)
        self._lost: str | None = None  # the reason
        self._work: queue.PriorityQueue = queue.PriorityQueue()
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._clients: list[Client] = []  # one per thread
        self._serials = itertools.count()
        self._in_flight = 0
        self._vocab_size: int | None = None
        self._truncates = False  # whether its logprobs are the policy's where samples truncate
        self._model = model
        self._stops: StopTexts | None = None  # made when the first request has stop texts
        self._own: dict[str, float] = {"generated": 0, "step_seconds": 0.0}
        settings = self._connect(dtype)
        self.block_size = settings["block_size"]
        self.max_num_seqs = min(max_num_seqs or settings["max_num_seqs"], settings["max_num_seqs"])
        self.max_model_len = min(
            max_model_len or settings["max_model_len"], settings["max_model_len"]
        )
        self._served: dict[str, float] = dict.fromkeys(COUNTERS, 0)

    @property
    def room(self) -> int:
        return self.max_num_seqs - self._in_flight

    def submit(self, request: Request) -> None:
        check_request(request, self.max_model_len)
        if self._lost is not None:
            raise ConnectionError(self._lost)
        if (size := request.sampling.vocab_size) != self._vocab_size:
            check_vocabulary(size, self._vocab_size, self._in_flight)
            self._rpc("spo_limit_vocabulary", size)
            self._vocab_size = size
        if request.sampling.truncates and not self._truncates:
            if not self._rpc("spo_keep_policy_logprobs"):
                raise ValueError(f"{CANNOT}; the server is {self.address}")
            self._truncates = True
        if request.sampling.stop and self._stops is None:
            if self._model is None:
                raise ValueError("model: expected one, as the request has stop texts, found none")
            self._stops = stop_texts(self._model)
        for index in range(request.n):
            self._work.put((request.priority, next(self._serials), request, index))
        self._in_flight += request.n
        while len(self._clients) < min(self._in_flight, self.max_num_seqs):
            self._clients.append(Client(self.address, self.timeout_s))
            threading.Thread(
                target=self._serve, args=(self._clients[-1],), name=self.address, daemon=True
            ).start()

    def poll(self) -> list[Completion]:
        """The samples that finished; waits `POLL_S` at most for the first."""
        if not self._in_flight:
            return []
        start, done = time.perf_counter(), []
        try:
            done.append(self._done.get(timeout=POLL_S))
            while True:
                done.append(self._done.get_nowait())
        except queue.Empty:
            pass
        self._in_flight -= len(done)
        self._own["step_seconds"] += time.perf_counter() - start
        self._own["generated"] += sum(len(sample.token_ids) for sample in done)
        if not done and self._lost is not None:
            raise ConnectionError(self._lost)
        return done

    def abort(self) -> None:
        """Drop the samples that wait here; wait for those on the server and drop them too."""
        while True:
            try:
                item = self._work.get_nowait()
            except queue.Empty:
                break
            if item == END:
                self._work.put(END)
                break
            self._in_flight -= 1
        while self._in_flight:
            self.poll()

    def sleep(self) -> None:
        """Does nothing: a server shares no memory with the trainer."""

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        with tempfile.TemporaryDirectory(prefix="spo-weights-") as folder:
            path = os.path.join(folder, "weights.safetensors")
            save_file({name: tensor.contiguous() for name, tensor in named_tensors}, path)
            self._ask(self._control, "POST", "/pause?mode=keep")  # between two steps
            self._rpc("spo_load_weights", path)
        answer = self._ask(self._control, "POST", "/reset_prefix_cache?reset_running_requests=true")
        if not answer["success"]:  # a stale cache would give wrong logprobs
            raise RuntimeError(f"{self.address} refused to reset its prefix cache")
        self._label(version)
        self._ask(self._control, "POST", "/resume")
        self.version = version

    def counters(self) -> dict[str, float]:
        """Totals of the server, whoever used it; its last answer if it is lost."""
        if self._lost is None:
            try:
                self._served = self._rpc("spo_counters")
            except ConnectionError as error:
                self._lost = str(error)
        return self._served | self._own

    def close(self) -> None:
        """Drop the samples in flight; the server keeps running."""
        self._lost = self._lost or f"{self.address}: closed"
        self._work.put(END)
        for client in (self._control, *self._clients):
            client.shut()

    def _connect(self, dtype: torch.dtype | None) -> dict:
        """The server's settings. Raises ValueError if it does not answer or has other flags."""
        try:
            settings = self._rpc("spo_settings")
            expected = dict(EXPECTED)
            if settings["device"] == "cpu":  # see spo/engines/vllm.py
                expected["--enable-chunked-prefill"] = False
            for flag, value in expected.items():
                if settings["flags"][flag] != value:
                    raise ValueError(
                        f"engine.addresses: expected {flag} {value} at {self.address}, found "
                        f"{settings['flags'][flag]}; see docs/rollout.md"
                    )
            if dtype is not None and settings["dtype"] != (name := str(dtype)[len("torch.") :]):
                raise ValueError(
                    f"engine.dtype: expected {settings['dtype']}, the weights of {self.address}, "
                    f"found {name}"
                )
            self._label(self.version)
            self._rpc("spo_limit_vocabulary", None)  # another trainer may have set one
            self._ask(self._control, "POST", "/resume")  # a trainer may have died during an update
            first = self._sample(self._control, Request(-1, (0,), 1, 1, Sampling(0)), 0)
        except (ConnectionError, Refused) as error:
            raise ValueError(f"engine.addresses: {error}; see docs/rollout.md") from error
        if first.error is not None:
            raise ValueError(f"engine.addresses: {first.error}; see docs/rollout.md")
        return settings

    def _serve(self, client: Client) -> None:
        """One thread: sample after sample, until the server is lost or closed."""
        reason: str | None = f"{self.address}: a client thread failed"  # else `poll` waits forever
        try:
            while self._lost is None:
                if (item := self._work.get()) == END:
                    break
                *_, request, index = item
                self._done.put(self._sample(client, request, index))
            reason = None
        except ConnectionError as error:
            reason = str(error)
        finally:
            self._lost = self._lost or reason
            self._work.put(END)  # for the next thread that waits for work

    def _sample(self, client: Client, request: Request, index: int) -> Completion:
        body = {
            "token_ids": request.prefix_ids,
            "priority": request.priority,
            "sampling_params": parameters(request, index),
        }
        try:
            answer = self._ask(client, "POST", GENERATE, body)
        except Refused as error:
            now = self.version
            return Completion(request.key, index, (), (), LENGTH, now, now, error=str(error))
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise ConnectionError(  # it shuts down, or somebody else uses it
                f"{self.address} ended a sample with {choice['finish_reason']!r}"
            )
        ids, stop = tuple(choice["token_ids"]), request.sampling.stop
        end = self._end_of_text(ids, request) if stop else None
        size = len(ids) if end is None else end
        stopped = end is not None or choice["finish_reason"] == "stop"
        spans = [span for span in choice["weight_versions"] if span["start"] < size]
        return Completion(
            key=request.key,
            index=index,
            token_ids=ids[:size],
            logprobs=tuple(token["logprob"] for token in choice["logprobs"]["content"][:size]),
            finish=STOP if stopped else LENGTH,
            first_version=int(spans[0]["version"]),
            last_version=int(spans[-1]["version"]),
        )

    def _end_of_text(self, ids: tuple[int, ...], request: Request) -> int | None:
        """Number of tokens up to the one that completes a stop text; None if none does."""
        assert self._stops is not None  # `submit` has made it
        stop, before = request.sampling.stop, drawn_before(request)
        ends = (n for n in range(1, len(ids) + 1) if self._stops.completed(stop, ids[:n], before))
        return next(ends, None)

    def _ask(self, client: Client, method: str, path: str, body: dict | None = None) -> Any:
        """`Client.ask`. A server whose engine has died still answers: it counts as lost too."""
        try:
            return client.ask(method, path, body)
        except Refused as error:
            if error.status < 500:
                raise
            try:
                client.ask("GET", "/health")
            except Refused as unhealthy:
                raise ConnectionError(str(unhealthy)) from error
            raise

    def _rpc(self, method: str, *args: Any) -> Any:
        """Call a method of `spo.engines.served` in every worker; returns the first answer."""
        body = {"method": method, "args": args}
        return self._ask(self._control, "POST", "/collective_rpc", body)["results"][0]

    def _label(self, version: int) -> None:
        """Label the weights: every sample then says which versions sampled it."""
        body = {"new_version": str(version)}
        self._ask(self._control, "POST", "/update_weight_version", body)
