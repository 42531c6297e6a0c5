"""What no healthy `vllm serve` answers: errors, silence, wrong flags. A small HTTP server does."""

import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file
from sampling import drain
from sentences import one_sentence

from spo.config.policy import EMBEDDED, PolicyConfig
from spo.config.recipe import load_recipe
from spo.engines.make import make_engine
from spo.engines.pool import EnginePool
from spo.engines.remote import GENERATE, RemoteEngine
from spo.models.tokenizer import load_tokenizer
from spo.records import STOP, Request, Sampling

EOS = 1


class Fake:
    """Answers as one `vllm serve` process would; tests replace what it says."""

    def __init__(self):
        self.settings = {
            "device": "cpu",
            "dtype": "float32",
            "max_model_len": 64,
            "max_num_seqs": 4,
            "block_size": 32,
            "flags": {
                "--scheduling-policy": "priority",
                "--logprobs-mode": "processed_logprobs",
                "--enable-prefix-caching": True,
                "--enable-chunked-prefill": False,
            },
        }
        self.generate = lambda body: (200, sample(body["sampling_params"]["seed"]))
        self.counters = {"steps": 7}
        self.replies = {}  # path -> status, answer
        self.asked = []
        self.keeps_alive = True
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size)) if size else None
                status, answer = fake.answer(self.path, body)
                text = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
                self.close_connection = not fake.keeps_alive  # without having said so

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # clients hang up in some tests
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, path, body):
        self.asked.append((path, body))
        if path in self.replies:
            return self.replies[path]
        if path == GENERATE:
            return self.generate(body)
        if path == "/collective_rpc":
            result = {"spo_settings": self.settings, "spo_counters": self.counters}
            return 200, {"results": [result.get(body["method"])]}
        return 200, {"success": True}


def sample(token, finish="length", **changes):
    choice = {
        "finish_reason": finish,
        "token_ids": [token],
        "logprobs": {"content": [{"logprob": -0.5}]},
        "weight_versions": [{"version": "0", "start": 0, "end": 1}],
    }
    return {"choices": [choice | changes]}


@pytest.fixture
def fake():
    running = Fake()
    yield running
    running.server.shutdown()
    running.server.server_close()


def threads_of(fake):
    return [thread for thread in threading.enumerate() if thread.name == fake.address]


def assert_all_end(threads):
    for thread in threads:
        thread.join(2)
        assert not thread.is_alive()


def request(key=0, n=1, seed=10, priority=0):
    return Request(key, (5, 9), n, 4, Sampling(seed, stop_token_ids=(EOS,)), priority=priority)


def test_an_error_answer_fails_its_sample_alone(fake):
    engine = RemoteEngine(fake.address)
    fake.generate = lambda body: (
        (400, {"error": {"message": "too hot"}})
        if body["sampling_params"]["seed"] == 11
        else (200, sample(body["sampling_params"]["seed"]))
    )
    engine.submit(request(n=3))
    done = drain(engine, 3)
    assert [c.token_ids for c in done] == [(10,), (), (12,)]
    assert "answered 400" in done[1].error and "too hot" in done[1].error
    assert done[0].error is None and done[2].error is None
    fake.replies[GENERATE] = (500, "oops")  # a healthy server's fault
    engine.submit(request())
    assert "answered 500: oops" in drain(engine, 1)[0].error
    assert engine.counters()["generated"] == 2
    engine.close()


@pytest.mark.parametrize(
    ("reply", "health", "words"),
    [
        ((500, "engine dead"), (503, ""), "/health answered 503"),
        ((200, sample(5, "abort")), (200, ""), "'abort'"),
        ((200, {"choices": [{"finish_reason": "stop"}]}), (200, ""), "client thread failed"),
    ],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_server_that_cannot_go_on_is_lost(fake, reply, health, words):
    engine = RemoteEngine(fake.address)
    engine.submit(request(n=3))
    drain(engine, 3)  # its threads wait for work
    fake.replies = {GENERATE: reply, "/health": health}
    threads = threads_of(fake)
    assert len(threads) == 3
    engine.submit(request())
    with pytest.raises(ConnectionError, match=words):
        drain(engine, 1)
    with pytest.raises(ConnectionError, match=words):
        engine.submit(request(1))
    assert_all_end(threads)


def test_no_answer_in_time(fake):
    engine = RemoteEngine(fake.address, timeout_s=0.2)
    assert engine.counters()["steps"] == 7
    silence = threading.Event()
    fake.generate = lambda body: (silence.wait(5), sample(5))
    engine.submit(request(n=2))
    start = time.monotonic()
    with pytest.raises(ConnectionError, match="no answer in time"):
        drain(engine, 1)
    assert 0.15 < time.monotonic() - start < 2
    fake.counters = {"steps": 9}
    assert engine.counters()["steps"] == 7  # a lost server's figures stay
    silence.set()
    engine.close()


def test_an_idle_connection_that_the_server_closed_is_opened_again(fake):
    fake.keeps_alive = False
    engine = RemoteEngine(fake.address, max_num_seqs=1)
    for key in range(5):
        engine.submit(request(key, seed=key))
        assert [c.token_ids for c in drain(engine, 1)] == [(key,)]
    engine.close()


def test_what_a_server_draws_behind_a_stop_text_is_dropped(fake):
    """The server has no tokenizer. The versions are those of the tokens that are left."""
    tokenizer = load_tokenizer(PolicyConfig())
    one, plus, two, end = tokenizer.convert_tokens_to_ids(["1", "+", "2", "<eos>"])
    versions = [{"version": str(v), "start": v, "end": v + 1} for v in range(4)]
    drawn = {
        "token_ids": [one, plus, two, end],
        "logprobs": {"content": [{"logprob": -0.5 * i} for i in range(4)]},
        "weight_versions": versions,
    }
    fake.generate = lambda body: (200, sample(0, "stop", **drawn))
    engine = RemoteEngine(fake.address, model=str(EMBEDDED))
    text = tokenizer.decode([one, plus])
    for stop, before, left in (
        (("zz", text), (), 2),
        (("zz",), (), 4),
        ((text,), (one,), 2),
        ((tokenizer.decode([two, one]),), (two,), 1),  # it begins in an earlier segment
        ((tokenizer.decode([two, one]),), (), 4),
    ):
        sampling = Sampling(0, stop_token_ids=(end,), stop=stop)
        engine.submit(Request(0, (5, *before), 1, 4, sampling, prompt_size=1))
        (done,) = drain(engine, 1)
        assert done.token_ids == (one, plus, two, end)[:left] and done.finish == STOP
        assert done.logprobs == (0, -0.5, -1, -1.5)[:left]
        assert (done.first_version, done.last_version) == (0, left - 1)
    engine.close()
    nameless = RemoteEngine(fake.address)
    with pytest.raises(ValueError, match="model: expected one, as the request has stop texts"):
        nameless.submit(Request(0, (5,), 1, 4, Sampling(0, stop=("a",))))
    nameless.close()


def test_the_limit_of_ids_is_set_in_the_server(fake):
    engine = RemoteEngine(fake.address)
    for key, size in enumerate((None, 40, 40, None)):
        engine.submit(Request(key, (5,), 1, 4, Sampling(0, vocab_size=size)))
        drain(engine, 1)
    calls = [b for path, b in fake.asked if path == "/collective_rpc"]
    limits = [b["args"] for b in calls if b["method"] == "spo_limit_vocabulary"]
    assert limits == [[None], [40], [None]]  # the first: another trainer may have set one
    engine.close()


def test_what_waits_is_sent_by_priority(fake):
    engine = RemoteEngine(fake.address, max_num_seqs=1)
    first = threading.Event()
    fake.generate = lambda body: (first.wait(5) and 200, sample(5))
    for key, priority in enumerate((5, 9, 7, 8)):
        engine.submit(request(key, seed=key, priority=priority))
        while key == 0 and fake.asked[-1][1].get("priority") != 5:
            time.sleep(0.001)  # the first has left
    assert engine.room == -3
    first.set()
    drain(engine, 4)
    sent = [body["priority"] for path, body in fake.asked if path == GENERATE]
    assert sent[1:] == [5, 7, 8, 9]  # after the one that tries the server
    engine.close()


def test_close_ends_the_threads(fake):
    engine = RemoteEngine(fake.address)
    silence = threading.Event()
    fake.generate = lambda body: (silence.wait(5), sample(5))
    engine.submit(request(n=3))
    while sum(path == GENERATE for path, _ in fake.asked) < 4:
        time.sleep(0.001)
    threads = threads_of(fake)
    assert len(threads) == 3
    engine.close()
    assert_all_end(threads)
    silence.set()


class Served:
    """The weights of a server as vLLM's endpoints change them: out of order is an error."""

    def __init__(self):
        self.paused, self.stale, self.weights, self.label = False, False, None, "0"

    def change(self, path, body):
        if path == "/pause?mode=keep":
            self.paused = True
        elif path == "/collective_rpc":
            assert self.paused, "between two steps of a sample"
            self.weights, self.stale = load_file(body["args"][0]), True
        elif path == "/reset_prefix_cache?reset_running_requests=true":
            assert self.paused
            self.stale = False
        elif path == "/update_weight_version":
            assert not self.stale, "prefixes of the old weights would count as new"
            self.label = body["new_version"]
        elif path == "/resume":
            assert self.label != "0" and not self.stale
            self.paused = False
        return 200, {"success": True, "results": [None]}


def test_weights_are_replaced_between_two_steps(fake):
    engine, served = RemoteEngine(fake.address), Served()
    answer, files = fake.answer, []

    def change(path, body):
        if (body or {}).get("method", "spo_load_weights") != "spo_load_weights":
            return answer(path, body)
        files.extend((body or {}).get("args", []))
        return served.change(path, body)

    fake.answer = change
    engine.load_weights([("weight", torch.ones(2))], 3)
    assert served.weights["weight"].tolist() == [1, 1] and not served.paused
    assert served.label == "3" and engine.version == 3
    assert len(files) == 1 and not os.path.exists(files[0])
    fake.answer = answer
    fake.replies["/reset_prefix_cache?reset_running_requests=true"] = (200, {"success": False})
    with pytest.raises(RuntimeError, match="refused to reset its prefix cache"):
        engine.load_weights([("weight", torch.ones(2))], 4)
    fake.replies["/collective_rpc"] = (500, "no such weight")
    with pytest.raises(RuntimeError, match="answered 500: no such weight"):
        engine.load_weights([("weight", torch.ones(2))], 5)
    engine.close()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--scheduling-policy", "fcfs"),
        ("--logprobs-mode", "raw_logprobs"),
        ("--enable-prefix-caching", False),
        ("--enable-chunked-prefill", True),
    ],
)
def test_a_server_started_otherwise_is_refused(fake, flag, value):
    fake.settings["flags"][flag] = value
    with pytest.raises(ValueError, match=f"engine.addresses: expected {flag} .*found {value}"):
        RemoteEngine(fake.address)


def test_settings_that_do_not_fit_are_named(fake):
    with pytest.raises(ValueError, match="engine.dtype: .*float32.*bfloat16"):
        RemoteEngine(fake.address, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="engine.addresses: .*https://x:1"):
        RemoteEngine("https://x:1")
    with pytest.raises(ValueError, match="engine.addresses: .*engine.name=vllm, found hf"):
        make_engine("hf", "folder", addresses=[fake.address])
    fake.replies[GENERATE] = (403, "restart with --enable-scale-out")
    with pytest.raises(ValueError, match="engine.addresses: .*403: restart with"):
        RemoteEngine(fake.address)
    fake.replies["/collective_rpc"] = (404, "Not Found")
    with pytest.raises(ValueError, match="engine.addresses: .*404.*docs/rollout.md"):
        RemoteEngine(fake.address)


def test_every_rank_takes_its_share(fake, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    built = make_engine("vllm", "folder", addresses=["http://127.0.0.1:1", fake.address])
    assert [member.engine.address for member in built.members] == [fake.address]
    with pytest.raises(ValueError, match="engine.addresses: .*2 in all, found 1"):
        make_engine("vllm", "folder", addresses=[fake.address])


def test_the_recipe_s_addresses_become_a_pool(fake):
    config = load_recipe(None, [f"engine.addresses=[{fake.address}]", "engine.max_num_seqs=3"])
    built = make_engine(
        config.engine.name,
        "folder",
        addresses=config.engine.addresses,
        dtype=torch.float32,
        device="cpu",
        max_num_seqs=config.engine.max_num_seqs,
        max_model_len=config.engine.max_model_len,
    )
    assert isinstance(built, EnginePool)
    assert (built.room, built.max_model_len, built.block_size) == (3, 64, 32)
    with pytest.raises(ValueError, match="exceeds the context of 64"):
        built.submit(Request(0, (5,) * 63, 1, 4, Sampling(0)))
    built.close()


def test_a_server_that_cannot_truncate_says_so(fake):
    engine = RemoteEngine(fake.address)  # its workers' answer is null
    cut = Request(0, (5, 9), 1, 4, Sampling(3, top_k=2))
    with one_sentence(["eval.top_k", "engine.name=hf can truncate", fake.address]):
        engine.submit(cut)
    engine.submit(request())
    assert len(drain(engine, 1)) == 1
    engine.close()
