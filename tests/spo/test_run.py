"""What a run gives back and says while it goes on; models that a caller has loaded."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sentences import one_sentence
from trained import trained_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import spo
from spo.callbacks import Log
from spo.config.policy import EMBEDDED
from spo.learn.checkpoint import State, latest_checkpoint
from spo.metrics import MetricsWriter
from spo.models.tokenizer import load_tokenizer

SMALL: dict[str, Any] = {
    "task": "arithmetic",
    "engine": {"name": "hf", "max_num_seqs": 32, "max_model_len": 96},
    "shape": {"kind": "star", "group_size": 4},
    "train": {"prompts": 4, "minibatches": 1, "learning_rate": 1e-4, "checkpoint_every": 5},
    "eval": {"problems": 4, "every": 1},
    "max_new_tokens": 40,
}


def given(**changes: Any) -> dict[str, Any]:
    return SMALL | changes


class Heard:
    """Says False at the `stop`-th call of an event; writes down all of them."""

    def __init__(self, event="", stop=0):
        self.event, self.stop, self.calls = event, stop, []

    def _hear(self, event, what):
        self.calls.append((event, what))
        same = [name for name, _ in self.calls].count(event)
        return not (event == self.event and same == self.stop)

    def on_iteration(self, line):
        return self._hear("iteration", line)

    def on_evaluation(self, line):
        return self._hear("evaluation", line)

    def on_checkpoint(self, folder):
        return self._hear("checkpoint", folder)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of three iterations, and what its callback heard."""
    heard = Heard()
    out = tmp_path_factory.mktemp("whole")
    run = spo.train("grpo", out=out, iterations=3, callbacks=[heard], **SMALL)
    assert any(line["grad_norm"] > 0 for line in run.metrics if line["stage"] == "train")
    return run, heard.calls


def test_a_run_gives_its_model_scores_and_forests(whole):
    run, _ = whole
    trained = trained_weights(run.folder)
    for name, weights in run.model.named_parameters():  # in the type that the folder holds
        assert torch.equal(trained[name].to(weights.dtype), weights), name
    last = run.metrics[-1]
    assert run.scores["greedy"] == (last["greedy"], last["greedy_stderr"])
    assert str(run.scores["greedy"]).startswith(f"{last['greedy']:.3f} ± ")
    assert run.recipe.train.iterations == 3 and run.checkpoint == latest_checkpoint(run.folder)
    assert run.forest() == spo.Forest.load(run.folder / "forest-last.safetensors")
    assert run.forest("first") != run.forest()
    assert run.report().read_text().startswith("<!doctype html>")
    prompt = run.tokenizer("arithmetic 3 + 4\n", return_tensors="pt").input_ids
    assert run.model.generate(prompt, max_new_tokens=4, do_sample=False).shape[0] == 1
    assert f"greedy {run.scores['greedy']}" in repr(spo.Run(run.folder))
    (again, *_) = spo.evaluate("grpo", checkpoint=run, **given(train={}))
    assert again.pass_at_1 == last["greedy"]


def test_callbacks_hear_what_the_run_writes(whole):
    run, calls = whole
    lines = [what for event, what in calls if event != "checkpoint"]
    assert lines == run.metrics
    order = ["evaluation", "iteration"] * 3 + ["checkpoint", "evaluation"]
    assert [event for event, _ in calls] == order
    assert dict(calls)["checkpoint"] == run.checkpoint


@pytest.mark.parametrize(
    ("event", "stop", "iterations", "evaluations"),
    [
        ("evaluation", 1, 0, 1),
        ("evaluation", 2, 1, 2),
        ("iteration", 1, 1, 2),
        ("checkpoint", 1, 3, 4),
    ],
)
def test_a_false_stops_cleanly_and_the_run_goes_on(
    whole, tmp_path, event, stop, iterations, evaluations
):
    heard = Heard(event, stop)
    settings = given(out=tmp_path, iterations=3)
    run = spo.train("grpo", callbacks=[Heard(), heard], **settings)
    stages = [line["stage"] for line in run.metrics]
    assert (stages.count("train"), stages.count("eval")) == (iterations, evaluations)
    assert run.checkpoint.name == f"iter-{iterations:06d}" and run.scores
    rest = spo.train("grpo", resume=True, **settings)
    timeless = [
        {
            k: v
            for k, v in line.items()
            if not k.startswith(("time", "seconds")) and "_per_s" not in k
        }
        for line in (*rest.metrics, *whole[0].metrics)
    ]
    ours, theirs = timeless[: len(timeless) // 2], timeless[len(timeless) // 2 :]
    assert [*map(repr, ours)] == [*map(repr, theirs)]
    expected = trained_weights(whole[0].folder)
    assert all(torch.equal(v, expected[k]) for k, v in trained_weights(tmp_path).items())


@pytest.mark.parametrize(
    ("callbacks", "words"),
    [
        ([print], ["callbacks: expected objects with a method on_iteration", "print"]),
        ([Heard(), object()], ["callbacks", "object object"]),
        (Heard(), ["callbacks: expected a list"]),
    ],
)
def test_callbacks_that_would_never_be_called_are_refused(tmp_path, callbacks, words):
    with one_sentence(words):
        spo.train("grpo", out=tmp_path, callbacks=callbacks, **SMALL)
    assert not list(tmp_path.iterdir())


def test_an_exception_of_a_callback_ends_the_run_as_a_crash_does(tmp_path):
    class Broken:
        def on_iteration(self, line):
            raise KeyError("mine")

    settings = given(out=tmp_path, iterations=1)
    with pytest.raises(KeyError, match="mine"):
        spo.train("grpo", callbacks=[Broken()], **settings)
    assert spo.train("grpo", resume=True, **settings).scores


def test_a_loaded_model_trains_as_its_folder_does(whole, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype="auto")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    settings = given(policy=model, out=tmp_path, iterations=3)
    run = spo.train("grpo", callbacks=[Heard("iteration", 1)], **settings)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert (
        model.config._attn_implementation != run.model.config._attn_implementation
        or model.training is False
    )
    run = spo.train("grpo", resume=True, **settings)
    expected = trained_weights(whole[0].folder)
    assert all(torch.equal(v, expected[k]) for k, v in trained_weights(tmp_path).items())
    assert sorted(p.name for p in tmp_path.iterdir() if "start" in p.name) == ["start"]

    other = AutoModelForCausalLM.from_pretrained(EMBEDDED, dtype="auto")
    with torch.no_grad():
        next(other.parameters())[0] += 1
    with one_sentence(["policy.path", "that the run to resume began with"]):
        spo.train("grpo", resume=True, **given(**settings | {"policy": other}))
    with one_sentence(["already holds a run"]):
        spo.train("grpo", **settings)
    assert [p.name for p in tmp_path.iterdir() if "start" in p.name] == ["start"]
    assert spo.train("grpo", resume=True, **settings).scores == run.scores


def test_a_loaded_model_is_evaluated_and_rolled_out(whole):
    run, _ = whole
    small = given(train={})
    (scores,) = spo.evaluate("grpo", policy=run.model, **small)
    assert scores.pass_at_1 == run.scores["greedy"].mean
    forest, _ = spo.rollout("grpo", policy=run.model, prompts=2, **small)
    assert forest.tree(0).leaves[0].response


def test_a_model_made_here_needs_a_tokenizer(tmp_path):
    loaded = AutoModelForCausalLM.from_pretrained(EMBEDDED)
    made = type(loaded)(loaded.config)
    made.config._name_or_path = made.name_or_path = ""
    small = given(out=tmp_path, iterations=1)
    with one_sentence(["tokenizer: expected one beside this SeedOssForCausalLM"]):
        spo.train("grpo", policy=made, **small)
    tokenizer = load_tokenizer(spo.Recipe().policy)
    run = spo.train("grpo", policy=made, tokenizer=tokenizer, **small)
    assert math.isfinite(run.scores["greedy"].mean)
    assert AutoTokenizer.from_pretrained(tmp_path / "start").eos_token == tokenizer.eos_token


@pytest.mark.parametrize("policy", [3, torch.nn.Linear(2, 2), [EMBEDDED]])
def test_other_objects_are_refused(tmp_path, policy):
    with one_sentence(
        ["policy: expected a folder, a hub id or a loaded model", type(policy).__name__]
    ):
        spo.train("grpo", policy=policy, out=tmp_path / "run", **SMALL)


@pytest.mark.parametrize("said", [np.bool_(False), torch.tensor(False), np.mean([0.5]) > 0.9])
def test_false_of_numpy_and_torch_stops_too(tmp_path, said):
    class Answers:
        def on_evaluation(self, line):
            return said

    run = spo.train("grpo", out=tmp_path, callbacks=[Answers()], **SMALL)
    assert [line["stage"] for line in run.metrics] == ["eval"]


@pytest.mark.parametrize("said", [None, True, 1, np.bool_(True), "no"])
def test_any_other_answer_does_not_stop(said):
    class Answers:
        def on_iteration(self, line):
            return said

    log = Log(writer=Lines(), state=State(), report=lambda line: None, callbacks=[Answers()])
    log.write({"stage": "train"})
    assert log.lines and not log.stopped


class Lines(MetricsWriter):
    """Writes nothing."""

    def __init__(self):
        pass

    def write(self, line):
        pass


def test_a_tokenizer_beside_a_name_is_refused():
    for call in (spo.train, spo.evaluate, spo.rollout):
        with one_sentence(["tokenizer: expected none beside policy='embedded'"]):
            call("grpo", policy="embedded", tokenizer=object(), **given(train={}))


def test_a_run_s_folder_is_a_folder(tmp_path):
    path = tmp_path / "file"
    path.write_text("x")
    with one_sentence(["out: expected a folder", "file is a file"]):
        spo.train("grpo", out=path, **SMALL)
    with one_sentence(["is a folder, expected a forest file"]):
        spo.Forest.load(tmp_path)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with one_sentence(["expected a run folder", "metrics.jsonl"]):
        spo.Run(tmp_path)
