"""The loop on the embedded policy and engine: determinism, resume, kill, guards."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spo.config.loss import PolicyLossConfig
from spo.config.recipe import load_recipe
from spo.credit.values import Values
from spo.learn.checkpoint import latest_checkpoint, load_state
from spo.learn.loss import LOSSES
from spo.loop import train
from spo.metrics import read_metrics
from spo.records import Forest

SMALL = [
    "engine.name=hf",
    "engine.max_num_seqs=64",
    "engine.max_model_len=96",
    "sampling.max_new_tokens=40",
    "shape={widths: [3, 2], segment_tokens: [8]}",
    "train.prompts=4",
    "train.minibatches=2",
    "train.learning_rate=1e-4",
    "train.iterations=3",
    "eval.every=2",
    "eval.problems=8",
]


def config(out, *more):
    return load_recipe(None, [*SMALL, f"out={out}", *more])


def weights(out) -> str:
    path = latest_checkpoint(Path(out)) / "policy" / "model.safetensors"
    tensors = load_file(path)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def forest_bytes(out) -> bytes:
    return (Path(out) / "forest-last.safetensors").read_bytes()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """An undisturbed run with a replay buffer."""
    out = tmp_path_factory.mktemp("run")
    lines = train(config(out, "train.replay_nodes=2"))
    return out, lines


def test_a_run_leaves_what_it_promises(reference):
    out, lines = reference
    found = latest_checkpoint(out)
    assert found.name == "iter-000003"
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["iter-000003"]
    state = load_state(found)
    trains = [line for line in lines if line["stage"] == "train"]
    assert (state.iteration, state.version, state.prompt_cursor) == (3, 3, 12)
    assert state.optimizer_steps == 6
    assert state.generated_tokens == lines[-1]["generated_tokens"] > 0
    assert [line["iteration"] for line in lines if line["stage"] == "eval"] == [0, 2, 3]
    assert len(trains) == 3 and read_metrics(out / "metrics.jsonl")[-1]["iteration"] == 3
    for line in trains:
        assert line["probe_difference"] < 1e-3 and line["mismatch_kl"] < 0.05
        assert 0 < line["kept_share"] < 1
    for name in ("recipe.yaml", "versions.json", "replay.safetensors", "optimizer.pt"):
        assert (found / name).exists()
    assert "torch" in json.loads((found / "versions.json").read_text())
    forest = Forest.load(out / "forest-last.safetensors")
    assert set(forest.born[forest.parent >= 0].tolist()) == {2}


def test_same_seed_same_run(reference, tmp_path):
    train(config(tmp_path, "train.replay_nodes=2"))
    assert weights(tmp_path) == weights(reference[0])
    assert forest_bytes(tmp_path) == forest_bytes(reference[0])
    other = tmp_path / "other"
    train(config(other, "train.replay_nodes=2", "train.seed=1", "train.iterations=1"))
    assert weights(other) != weights(reference[0])


LONG = ["train.replay_nodes=2", "train.iterations=12", "eval.every=0"]

SCRIPT = """
import sys
from spo.cli import main
sys.exit(main(sys.argv[1:]))
"""


def start(out, *more):
    recipe = Path(out) / "recipe.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text("name: test\n")
    command = [sys.executable, "-c", SCRIPT, "train", str(recipe), *SMALL, f"out={out}"]
    command += [*LONG, *more]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def long_reference(tmp_path_factory):
    """An undisturbed run, in a process of its own, that is long enough to be interrupted."""
    out = tmp_path_factory.mktemp("long")
    process = start(out)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    return out, read_metrics(out / "metrics.jsonl")


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["ctrl-c", "kill -9"]
)
def test_an_interrupted_run_resumes_to_the_same_weights(long_reference, tmp_path, signum, code):
    process = start(tmp_path)
    deadline = time.monotonic() + 120
    while latest_checkpoint(tmp_path) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.15)  # somewhere in a later iteration
    process.send_signal(signum)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    if signum == signal.SIGINT:
        assert "--resume" in errors.splitlines()[-1]
    at = load_state(latest_checkpoint(tmp_path)).iteration
    assert 1 <= at < 12
    process = start(tmp_path, "--resume")
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    assert weights(tmp_path) == weights(long_reference[0])
    assert forest_bytes(tmp_path) == forest_bytes(long_reference[0])
    mine, theirs = read_metrics(tmp_path / "metrics.jsonl"), long_reference[1]
    for a, b in zip(mine, theirs, strict=True):
        assert (a["stage"], a["iteration"], a["generated_tokens"]) == (
            b["stage"],
            b["iteration"],
            b["generated_tokens"],
        )
        assert a.get("loss") == b.get("loss") and a.get("greedy") == b.get("greedy")


def test_a_run_is_not_overwritten(reference):
    with pytest.raises(ValueError, match="already holds a run; add --resume"):
        train(config(reference[0]))


def test_resume_without_a_checkpoint_starts(tmp_path):
    lines = train(config(tmp_path, "train.iterations=1", "eval.every=0"), resume=True)
    assert [line["stage"] for line in lines] == ["eval", "train", "eval"]


STREAMED = ["train.stream_depth=1", "train.iterations=4"]


def test_a_streamed_run_trains_on_its_own_prompts_at_most_one_version_late(reference, tmp_path):
    from spo.config.policy import EMBEDDED
    from spo.engines.hf import HFEngine

    engine = HFEngine(str(EMBEDDED), max_num_seqs=64, max_model_len=96)
    lines = train(config(tmp_path, *STREAMED), engine=engine)
    trains = [line for line in lines if line["stage"] == "train"]
    ages = [line["max_age"] for line in trains]
    assert ages[0] == 0 and max(ages) == 1
    assert all((line["mean_age"] > 0) == (line["max_age"] > 0) for line in trains)
    assert all(line["probe_difference"] < 1e-3 for line in trains)
    assert load_state(latest_checkpoint(tmp_path)).prompt_cursor == 16
    assert engine.room == 64  # what was streamed ahead of the end has left it
    first, last = (Forest.load(tmp_path / f"forest-{n}.safetensors") for n in ("first", "last"))
    plain = Forest.load(reference[0] / "forest-first.safetensors")
    assert first.prompts == plain.prompts and not set(first.prompts) & set(last.prompts)
    assert set(last.born[last.parent >= 0].tolist()) <= {2, 3}


def test_a_streamed_run_resumes_at_its_next_prompt(reference, tmp_path):
    undisturbed = tmp_path / "a"
    train(config(undisturbed, "train.stream_depth=1", "train.iterations=3"))
    halves = tmp_path / "b"
    train(config(halves, "train.stream_depth=1", "train.iterations=2"))
    lines = train(config(halves, "train.stream_depth=1", "train.iterations=3"), resume=True)
    assert [line["max_age"] for line in lines if line["stage"] == "train"] == [0]  # grown anew
    a, b = (Forest.load(out / "forest-last.safetensors") for out in (undisturbed, halves))
    assert a.prompts == b.prompts


def test_damaged_checkpoints_get_a_sentence(reference, tmp_path):
    import shutil

    for name in ("state.json", "optimizer.pt", "policy/model.safetensors"):
        out = tmp_path / name.replace("/", "-")
        shutil.copytree(reference[0], out)
        path = latest_checkpoint(out) / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError) as error:
            train(config(out, "train.iterations=4"), resume=True)
        assert name.split("/")[0] in str(error.value) and "iter-000003" in str(error.value)


def test_non_finite_gradients_never_reach_the_weights(tmp_path, monkeypatch):
    real, calls = LOSSES[PolicyLossConfig], []

    def sometimes_nan(model, batch, loss, temperature):
        out = real(model, batch, loss, temperature)
        calls.append(1)
        if len(calls) != 2:
            return out
        return type(out)(out.loss * float("nan"), out.metrics | {"loss": float("nan")})

    monkeypatch.setitem(LOSSES, PolicyLossConfig, sometimes_nan)
    lines = train(config(tmp_path, "train.iterations=1", "eval.every=0"))
    assert [line["skipped_steps"] for line in lines if line["stage"] == "train"] == [1]
    tensors = load_file(latest_checkpoint(tmp_path) / "policy" / "model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())
    assert list((tmp_path / "skipped").glob("step-000001-*.safetensors"))

    def always_nan(*arguments):
        out = real(*arguments)
        return type(out)(out.loss * float("nan"), out.metrics | {"loss": float("nan")})

    monkeypatch.setitem(LOSSES, PolicyLossConfig, always_nan)
    with pytest.raises(RuntimeError, match="2 steps in a row"):
        train(config(tmp_path / "b", "train.max_skipped=2"))


def test_a_constant_norm_divides_by_what_no_sample_decides(tmp_path):
    lines, shared = {}, ["train.iterations=1", "train.minibatches=1", "eval.every=0"]
    for norm in ("tokens", "constant"):
        out = config(tmp_path / norm, *shared, f"loss.policy_norm={norm}")
        (lines[norm],) = (line for line in train(out) if line["stage"] == "train")
    forest = Forest.load(tmp_path / "tokens" / "forest-last.safetensors")
    credit = Values().assign(forest).tokens
    trains = credit.abs() > 1e-6
    kept = int((trains & (forest.rollout_logprobs < math.log(0.9))).sum())
    assert 0 < kept < 4 * 40  # 4 prompts, at most 40 tokens
    for key in ("loss", "grad_norm"):
        expected = lines["tokens"][key] * kept / (4 * 40)
        assert lines["constant"][key] == pytest.approx(expected, rel=1e-4)


def test_stale_weights_are_noticed(tmp_path):
    from spo.config.policy import EMBEDDED
    from spo.engines.hf import HFEngine

    class Deaf(HFEngine):
        def load_weights(self, named_tensors, version):
            self.version = version

    engine = Deaf(str(EMBEDDED), max_num_seqs=64, max_model_len=96)
    with pytest.raises(RuntimeError, match="trainer and engine differ"):
        train(config(tmp_path, "train.learning_rate=1e-2"), engine=engine)


@pytest.mark.parametrize(
    "more",
    [
        (
            "shape={kind: star}",
            "shape.group_size=4",
            "credit.scale=std",
            "loss.prob_threshold=null",
        ),
        ("shape={kind: star}", "shape.group_size=4", "credit.baseline=loo"),
        ("shape={kind: chain}", "shape.group_size=3", "shape.num_probes=2", "shape.interval=2"),
        (
            "shape={kind: chain}",
            "shape.group_size=2",
            "shape.num_probes=2",
            "shape.partition=steps",
            "shape.probe_prompt=true",
            "loss.prob_threshold=null",
        ),
        (
            "shape={kind: chain}",
            "shape.partition=fixed",
            "shape.group_size=2",
            "shape.num_probes=2",
        ),
        ("shape={kind: chain}", "shape.group_size=2", "shape.num_probes=2", "shape.rescore=true"),
        ("loss.kl_coef=0.1", "loss.kl_scope=all"),
        ("loss.kl_coef=0.1", "sampling.temperature=0.6", "train.epochs=2"),
        ("policy.autocast=true",),
    ],
    ids=["grpo", "rloo", "spo-chain", "vineppo", "fixed", "rescore", "kl-all", "kl", "autocast"],
)
def test_every_method_runs(tmp_path, more):
    out = config(tmp_path, "train.iterations=2", "eval.every=0", *more)
    lines = [line for line in train(out) if line["stage"] == "train"]
    assert len(lines) == 2 and lines[-1]["skipped_steps"] == 0
    assert all(line["grad_norm"] > 0 for line in lines)
    if any(m.startswith("loss.kl_coef") for m in more):
        assert lines[0]["kl"] >= 0 and lines[-1]["kl"] > 0


@pytest.mark.parametrize(
    "change",
    ["task=countdown", "policy.dtype=bfloat16", "sampling.temperature=0.5", "train.seed=9"],
)
def test_another_run_is_not_resumed(reference, change):
    out, _ = reference
    before = sorted(p.name for p in (out / "checkpoints").iterdir())
    with pytest.raises(ValueError, match=f"{change.split('=')[0]}: the run to resume has"):
        train(config(out, change), resume=True)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == before


def test_a_device_that_is_not_here_is_one_sentence(tmp_path):
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="policy.device: .* found cuda: there is no CUDA"):
            train(config(tmp_path, "policy.device=cuda"))
    with pytest.raises(ValueError, match="policy.device: expected cpu or cuda, found meta"):
        train(config(tmp_path, "policy.device=meta"))


def test_data_that_cannot_be_read_are_found_before_the_first_evaluation(tmp_path):
    lines = []
    with pytest.raises(ValueError, match="task arithmetic reads no data set"):
        train(config(tmp_path, "data.train=x.jsonl"), report=lines.append)
    assert not lines
