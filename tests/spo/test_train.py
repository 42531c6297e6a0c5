"""The loop on the embedded policy and engine: determinism, resume, kill, guards."""

import hashlib
import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trained import trained_weights

from spo.cli import main
from spo.config.loss import PolicyLossConfig
from spo.config.policy import EMBEDDED
from spo.config.recipe import load_recipe
from spo.credit.values import Values
from spo.engines.hf import HFEngine
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
    tensors = trained_weights(out)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def evaluated_at(out) -> list[int]:
    """The iterations of the evaluations in a run's metrics."""
    lines = read_metrics(Path(out) / "metrics.jsonl")
    return [line["iteration"] for line in lines if line["stage"] == "eval"]


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


def test_another_seed_is_another_run_and_a_resumed_one_may_be_new(reference, tmp_path):
    more = ("train.seed=1", "train.iterations=1", "eval.every=0")
    lines = train(config(tmp_path, *more), resume=True)  # there is nothing to resume from
    assert [line["stage"] for line in lines] == ["eval", "train", "eval"]
    first, other = (
        Forest.load(out / "forest-first.safetensors") for out in (reference[0], tmp_path)
    )
    assert not set(first.prompts) & set(other.prompts)


# Where a run is stopped: what is called there for the n-th time, in its second iteration.
PLACES = {
    "trees grow": ("spo.loop", "_grow", 2),
    "a step is due": ("spo.learn.learner", "Learner.train", 2),
    "weights go to the engine": ("spo.loop", "sync", 2),
    "a line is written, its checkpoint is not": ("spo.learn.learner", "Learner.save", 2),
    "half a checkpoint is written": ("spo.learn.checkpoint", "save_recipe", 2),
    "the older checkpoint is still there": ("spo.learn.checkpoint", "_complete", 6),
}
KILLED = """
import importlib, json, os, signal, sys
import spo.loop
from spo.cli import main

places, out, *arguments = sys.argv[1:]
for place, (module, name, count) in json.loads(places).items():
    child = os.fork()  # the modules are there, and no thread yet
    if child:
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, place
        continue
    *owners, name = name.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(owner, name, counted)
    main(["train", *arguments, f"out={out}/{place}"])
    os._exit(0)
"""
REPLAY = ["train.replay_nodes=2"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Runs like the reference, each killed at one of the places: a folder by place."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "recipe.yaml").write_text("name: test\n")
    command = [sys.executable, "-c", KILLED, json.dumps(PLACES), folder, folder / "recipe.yaml"]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run([*command, *SMALL, *REPLAY], env=environment, check=True, timeout=250)
    return folder


def goes_on_as(reference, out):
    """Resume a run and compare what is left of it with an undisturbed one's, bit for bit."""
    train(config(out, *REPLAY), resume=True)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["iter-000003"]
    assert weights(out) == weights(reference[0])
    assert forest_bytes(out) == forest_bytes(reference[0])
    mine, theirs = (read_metrics(x / "metrics.jsonl") for x in (out, reference[0]))
    for a, b in zip(mine, theirs, strict=True):
        for key in ("stage", "iteration", "generated_tokens", "loss", "greedy"):
            assert a.get(key) == b.get(key), key


@pytest.mark.parametrize("place", PLACES)
def test_a_killed_run_resumes_to_the_same_weights(reference, killed, place):
    out = killed / place
    whole = 2 if place == "the older checkpoint is still there" else 1
    assert load_state(latest_checkpoint(out)).iteration == whole
    assert len(list((out / "checkpoints").glob("iter-*"))) == whole
    half_written = list((out / "checkpoints").glob(".writing-*"))
    assert bool(half_written) == (place == "half a checkpoint is written")
    goes_on_as(reference, out)


@pytest.mark.parametrize("place", ["trees grow", "half a checkpoint is written"])
def test_ctrl_c_leaves_a_run_that_resumes(reference, tmp_path, monkeypatch, capsys, place):
    module, name, count = PLACES[place]
    owner = importlib.import_module(module)
    real, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == count:
            signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    (tmp_path / "recipe.yaml").write_text("name: test\n")
    out = tmp_path / "run"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    try:
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, counted)
            code = main(["train", str(tmp_path / "recipe.yaml"), *SMALL, *REPLAY, f"out={out}"])
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130 and "--resume" in capsys.readouterr().err.splitlines()[-1]
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["iter-000001"]
    goes_on_as(reference, out)


def test_a_run_is_not_overwritten(reference):
    with pytest.raises(ValueError, match="already holds a run; add --resume"):
        train(config(reference[0]))


STREAMED = ["train.stream_depth=1", "eval.every=0"]


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    """A run whose iterations overlap: its folder, its lines, and its engine."""
    out = tmp_path_factory.mktemp("streamed")
    engine = HFEngine(str(EMBEDDED), max_num_seqs=64, max_model_len=96)
    return out, train(config(out, *STREAMED), engine=engine), engine


def test_a_streamed_run_trains_on_its_own_prompts_at_most_one_version_late(reference, streamed):
    out, lines, engine = streamed
    trains = [line for line in lines if line["stage"] == "train"]
    ages = [line["max_age"] for line in trains]
    assert ages[0] == 0 and max(ages) == 1
    assert all((line["mean_age"] > 0) == (line["max_age"] > 0) for line in trains)
    assert all(line["probe_difference"] < 1e-3 for line in trains)
    assert load_state(latest_checkpoint(out)).prompt_cursor == 12
    assert engine.room == 64  # what was streamed ahead of the end has left it
    first, last = (Forest.load(out / f"forest-{n}.safetensors") for n in ("first", "last"))
    plain = Forest.load(reference[0] / "forest-first.safetensors")
    assert first.prompts == plain.prompts and not set(first.prompts) & set(last.prompts)
    assert set(last.born[last.parent >= 0].tolist()) <= {1, 2}


def test_the_last_evaluation_is_of_the_policy_as_it_is_saved(streamed):
    """The weights in bf16, of which the checkpoint and the training hold more bits."""
    out, _, engine = streamed
    saved = load_file(latest_checkpoint(out) / "policy" / "model.safetensors")
    sampled = dict(engine.model.named_parameters())
    assert all(torch.equal(sampled[name], tensor.float()) for name, tensor in saved.items())
    exact = trained_weights(out)
    assert any(not torch.equal(sampled[name], tensor) for name, tensor in exact.items())


def test_a_streamed_run_resumes_at_its_next_prompt(streamed, tmp_path):
    train(config(tmp_path, *STREAMED, "train.iterations=2"))
    lines = train(config(tmp_path, *STREAMED), resume=True)
    assert [line["max_age"] for line in lines if line["stage"] == "train"] == [0]  # grown anew
    assert evaluated_at(tmp_path) == [0, 2, 3]  # the end of the first part stays in the curve
    a, b = (Forest.load(out / "forest-last.safetensors") for out in (streamed[0], tmp_path))
    assert a.prompts == b.prompts


def test_damaged_checkpoints_get_a_sentence(reference, tmp_path):
    for name in ("state.json", "optimizer.pt", "weights.safetensors", "policy/model.safetensors"):
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
    tensors = trained_weights(tmp_path)
    assert all(t.isfinite().all() for t in tensors.values())
    assert list((tmp_path / "skipped").glob("step-000001-*.safetensors"))

    def always_nan(*arguments):
        out = real(*arguments)
        return type(out)(out.loss * float("nan"), out.metrics | {"loss": float("nan")})

    monkeypatch.setitem(LOSSES, PolicyLossConfig, always_nan)
    with pytest.raises(RuntimeError, match="2 steps in a row"):
        train(config(tmp_path / "b", "train.max_skipped=2"))


MIXED = """
from dataclasses import dataclass

from spo.tasks import Problem

LENGTHS = 3, 90, 90, 90, 3, 3, 90, 3  # of the prompts, in tokens; 96 - 40 fit


@dataclass(frozen=True)
class Mixed:
    def problems(self, split, seed):
        while True:
            for size in LENGTHS if split == "train" else (3, 90):
                yield Problem(" ".join(["7"] * size), 7)

    def grade(self, text, answer):
        return len(text) % 2 == 0
"""


def left_out(lines):
    trains = [line for line in lines if line["stage"] != "eval"]
    assert all(line["problems"] == line["too_long"] == 4 for line in lines if "greedy" in line)
    return [(line["stage"], line["too_long"]) for line in trains]


@pytest.mark.filterwarnings("ignore:prompts are left out", "ignore:all 6 responses")
def test_a_prompt_that_does_not_fit_is_left_out_and_an_iteration_without_any_is_skipped(tmp_path):
    (tmp_path / "mixed.py").write_text(MIXED)
    settings = [f"task={tmp_path}/mixed.py:Mixed", "train.prompts=2", "train.iterations=4"]
    whole = train(config(tmp_path / "whole", *settings))
    assert left_out(whole) == [("train", 1), ("skipped", 2), ("train", 0), ("train", 1)]
    state = load_state(latest_checkpoint(tmp_path / "whole"))
    assert (state.iteration, state.prompt_cursor, state.version) == (4, 8, 3)
    parts = [
        train(config(tmp_path / "parts", *settings, f"train.iterations={end}"), resume=True)
        for end in (2, 4)
    ]
    assert [row for lines in parts for row in left_out(lines)] == left_out(whole)
    assert (
        evaluated_at(tmp_path / "parts") == evaluated_at(tmp_path / "whole") == [0, 2, 4]
    )  # each once
    assert forest_bytes(tmp_path / "parts") == forest_bytes(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="the last 1 iterations has a reward, .* 2 did not fit"):
        train(config(tmp_path / "strict", *settings, "train.max_skipped=1"))


def test_responses_that_never_stop_end_the_run_in_a_sentence(tmp_path):
    lines = []
    cut = ["sampling={max_new_tokens: 10, truncated: drop}", "eval.every=0"]
    with pytest.warns(UserWarning, match=r"all 24 responses .* end with one of 1 '<eos>': raise"):
        with pytest.raises(RuntimeError, match="last 3 iterations .* 4 were dropped and 0 did not"):
            train(config(tmp_path, *cut), report=lines.append)
    assert [line["stage"] for line in lines] == ["eval", "skipped", "skipped", "skipped"]
    assert [line["dropped_prompts"] for line in lines[1:]] == [4, 4, 4]


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
    class Deaf(HFEngine):
        def load_weights(self, named_tensors, version):
            self.version = version

    engine = Deaf(str(EMBEDDED), max_num_seqs=64, max_model_len=96)
    with pytest.raises(RuntimeError, match="trainer and engine differ"):
        train(config(tmp_path, "train.learning_rate=1e-2"), engine=engine)


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
@pytest.mark.parametrize("sampled", ["float32", "bfloat16"])
def test_an_engine_that_is_wrong_by_less_than_bf16_hides_is_noticed(tmp_path, trained, sampled):
    """Its logprobs are those of a policy that is a little surer of itself."""

    class Sharp(HFEngine):
        sharper = 1.0

        def _forward(self, *arguments, **options):
            out = super()._forward(*arguments, **options)
            if hasattr(out, "logits"):
                out.logits *= self.sharper
            return out

    dtypes = [f"policy.dtype={trained}", f"engine.dtype={sampled}", "train.probe_tolerance=9"]
    recipe = config(tmp_path, *dtypes, "train.iterations=1", "eval.problems=1")
    engine = Sharp(str(EMBEDDED), max_num_seqs=64, max_model_len=96, dtype=getattr(torch, sampled))
    engine.sharper = 1.2
    with pytest.raises(ValueError, match="samples embedded with logprobs that are .* from its own"):
        train(recipe, engine=engine)
    engine.sharper = 1.0
    train(recipe, engine=engine)


def test_what_no_recipe_sets_trains(tmp_path):
    """Beside what the shipped recipes choose; they are trained in test_methods.py."""
    chain = ["shape={kind: chain, group_size: 2, num_probes: 2}", "train.minibatches=1"]
    kinds = {
        "fixed": [*chain, "shape.partition=fixed", "policy.autocast=true", "train.iterations=1"],
        "rescored": [*chain, "shape.rescore=true", "loss.kl_coef=0.1", "loss.kl_scope=all"],
        "hot": ["loss.kl_coef=0.1", "sampling.temperature=0.6", "train.epochs=2"],
    }
    lines = {}
    for kind, more in kinds.items():
        run = train(config(tmp_path / kind, "train.iterations=2", "eval.every=0", *more))
        lines[kind] = [line for line in run if line["stage"] == "train"]
        for line in lines[kind]:
            assert line["grad_norm"] > 0 and line["skipped_steps"] == 0
    # One step an iteration: the first stands where the reference does.
    first, second = lines["rescored"]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 1e-6
    assert first["mismatch_kl"] < 1e-9  # the trainer's own logprobs are the old ones
    assert all(line["kl"] > 1e-6 for line in lines["hot"])


@pytest.mark.parametrize(
    "change",
    [
        "task=countdown",
        "policy.dtype=bfloat16",
        "sampling.temperature=0.5",
        "train.seed=9",
        "data.template='again: {problem}'",
        "reward={rule: number}",
    ],
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
