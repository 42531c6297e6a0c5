"""vLLM in another process, here or on another machine, by address: token ids over HTTP.

One thread per sample in flight, on the standard library's client: where only the servers have vLLM,
the HTTP packages that come with it are missing, and a thread that waits costs nothing.
Siblings are separate requests, because vLLM answers a request when its last sample has ended.
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

from spo.engines.protocol import COUNTERS, check_request
from spo.records import LENGTH, STOP, Completion, Request

GENERATE = "/inference/v1/generate"
CONNECT_S = 10.0
POLL_S = 0.002  # longest wait for a sample in `poll`: less than a step, and the loop does not spin
END = (float("-inf"),)  # sorts before all work
EXPECTED = {  # flags of `vllm serve` without which samples or their logprobs would differ
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

        Raises ConnectionError if there is no answer, Refused if it is an error.
        """
        idle = self._http.sock is not None
        try:
            return self._exchange(method, path, body)
        except TimeoutError as error:
            self._http.close()
            raise ConnectionError(f"{self.address}: no answer in time ({error})") from error
        except (OSError, http.client.HTTPException) as error:
            self._http.close()
            if idle and not self._shut:  # servers close idle connections; a dead one has no other
                return self.ask(method, path, body)
            raise ConnectionError(f"{self.address}: {error or type(error).__name__}") from error

    def shut(self) -> None:
        """Wake up the thread that waits for an answer: it gets a ConnectionError."""
        self._shut = True
        if (sock := self._http.sock) is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:  # the other side was faster
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
            found = f"{self.address}{path} answered {response.status}: {text[:500]}"
            raise Refused(found, response.status)
        return json.loads(text) if text else None


class RemoteEngine:
    """The `Engine` of one `vllm serve` process; docs/rollout.md says how to start it.

    A server that refuses the connection, dies or does not answer in time raises ConnectionError
    from then on. Weights travel in a file that the server must be able to read: it lies in a new
    folder where temporary files go (`TMPDIR`), on a file system shared with other machines.

    Args:
        address: http://host:port
        dtype: of the server's weights, checked; None takes what it has.
        max_num_seqs: samples in flight, at most the server's own number; others wait here.
        max_model_len: longest prefix + completion, at most the server's own.
        timeout_s: longest wait for an answer, the sample's time in the server's queue included.
    """

    def __init__(
        self,
        address: str,
        *,
        dtype: torch.dtype | None = None,
        max_num_seqs: int | None = None,
        max_model_len: int | None = None,
        timeout_s: float = 600.0,
    ):
        self.address, self.timeout_s, self.version = address, timeout_s, 0
        self._control = Client(address, timeout_s)
        self._lost: str | None = None  # why
        self._work: queue.PriorityQueue = queue.PriorityQueue()
        self._done: queue.SimpleQueue[Completion] = queue.SimpleQueue()
        self._clients: list[Client] = []  # one per thread
        self._serials = itertools.count()
        self._in_flight = 0
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
        for index in range(request.n):
            self._work.put((request.priority, next(self._serials), request, index))
        self._in_flight += request.n
        while len(self._clients) < min(self._in_flight, self.max_num_seqs):
            self._clients.append(Client(self.address, self.timeout_s))
            threading.Thread(
                target=self._serve, args=(self._clients[-1],), name=self.address, daemon=True
            ).start()

    def poll(self) -> list[Completion]:
        """The samples that finished; waits for one, but not for long."""
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
        """Drop what waits here; what the server samples is waited for and thrown away."""
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
        """Nothing: a server shares no memory with the trainer."""

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        with tempfile.TemporaryDirectory(prefix="spo-weights-") as folder:
            path = os.path.join(folder, "weights.safetensors")
            save_file({name: tensor.contiguous() for name, tensor in named_tensors}, path)
            self._ask(self._control, "POST", "/pause?mode=keep")  # between two steps
            self._rpc("spo_load_weights", path)
        answer = self._ask(self._control, "POST", "/reset_prefix_cache?reset_running_requests=true")
        if not answer["success"]:  # a stale cache gives logprobs that are wrong by nats
            raise RuntimeError(f"{self.address} refused to reset its prefix cache")
        self._label(version)
        self._ask(self._control, "POST", "/resume")
        self.version = version

    def counters(self) -> dict[str, float]:
        """Totals of the server, whoever asked it; as of its last answer once it is lost."""
        if self._lost is None:
            try:
                self._served = self._rpc("spo_counters")
            except ConnectionError as error:
                self._lost = str(error)
        return self._served | self._own

    def close(self) -> None:
        """Drop what is in flight; the server goes on."""
        self._lost = self._lost or f"{self.address}: closed"
        self._work.put(END)
        for client in (self._control, *self._clients):
            client.shut()

    def _connect(self, dtype: torch.dtype | None) -> dict:
        """The server's settings. Raises ValueError if it is not there or not set up for this."""
        try:
            settings = self._rpc("spo_settings")
            expected = dict(EXPECTED)
            if settings["device"] == "cpu":  # see spo/engines/vllm.py
                expected["--enable-chunked-prefill"] = False
            for flag, value in expected.items():
                if settings["flags"][flag] != value:
                    raise ValueError(
                        f"engine.addresses: {self.address} was started with {flag} "
                        f"{settings['flags'][flag]}, expected {value}"
                    )
            if dtype is not None and settings["dtype"] != (name := str(dtype)[len("torch.") :]):
                raise ValueError(
                    f"engine.dtype: {self.address} holds {settings['dtype']} weights, found {name}"
                )
            self._label(self.version)
            self._ask(self._control, "POST", "/resume")  # a trainer may have died during an update
            first = self._sample(self._control, Request(-1, (0,), 1, 1, (), 0), 0)
        except (ConnectionError, Refused) as error:
            raise ValueError(f"engine.addresses: {error}; see docs/rollout.md") from error
        if first.error is not None:
            raise ValueError(f"engine.addresses: {first.error}; see docs/rollout.md")
        return settings

    def _serve(self, client: Client) -> None:
        """A thread: one sample after the other until the server is lost or closed."""
        reason: str | None = f"{self.address}: a client thread failed"  # not to wait for it forever
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
            "sampling_params": {
                "temperature": request.temperature,
                "max_tokens": request.max_new_tokens,
                "stop_token_ids": request.stop_token_ids,
                "ignore_eos": True,  # the request's stop tokens are all that stops it
                "seed": request.seed + index,
                "logprobs": 0,  # of the sampled token alone
                "detokenize": False,
            },
        }
        try:
            answer = self._ask(client, "POST", GENERATE, body)
        except Refused as error:
            now = self.version
            return Completion(request.key, index, (), (), LENGTH, now, now, error=str(error))
        (choice,) = answer["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise ConnectionError(  # on its way down, or in other hands
                f"{self.address} ended a sample with {choice['finish_reason']!r}"
            )
        spans = choice["weight_versions"]
        return Completion(
            key=request.key,
            index=index,
            token_ids=tuple(choice["token_ids"]),
            logprobs=tuple(token["logprob"] for token in choice["logprobs"]["content"]),
            finish=STOP if choice["finish_reason"] == "stop" else LENGTH,
            first_version=int(spans[0]["version"]),
            last_version=int(spans[-1]["version"]),
        )

    def _ask(self, client: Client, method: str, path: str, body: dict | None = None) -> Any:
        """`Client.ask`; a server whose engine is dead still answers, and counts as lost."""
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

    def _rpc(self, method: str, *args: str) -> Any:
        """Call a method of `spo.engines.served` in every worker; the first one's answer."""
        body = {"method": method, "args": args}
        return self._ask(self._control, "POST", "/collective_rpc", body)["results"][0]

    def _label(self, version: int) -> None:
        """Name the weights: every sample says which versions it was sampled with."""
        body = {"new_version": str(version)}
        self._ask(self._control, "POST", "/update_weight_version", body)
