"""What the four trackers hold of a run that crashed and went on, read back from their own files."""

import json
import math
import shutil
import struct
import subprocess
import sys
from typing import Any

import pytest
from explained import trl_names, unexplained
from sentences import one_sentence

import spo
from spo.config.log import TRACKERS
from spo.config.recipe import load_recipe
from spo.metrics import read_metrics
from spo.trackers.names import TRL, figures, in_sections
from spo.trackers.tracker import opened, require_installed

SMALL: dict[str, Any] = {
    "engine": {"name": "hf", "max_num_seqs": 32, "max_model_len": 96},
    "shape": {"kind": "star", "group_size": 4},
    "train": {"prompts": 4, "minibatches": 1, "learning_rate": 1e-4, "checkpoint_every": 2},
    "eval": {"problems": 4, "every": 0, "samples": 2},
    "max_new_tokens": 40,
    "iterations": 4,
}
OWN = """
def quarters(response):
    return len(response) % 5 / 4

def mean(response):
    return 0.5
"""
SECRET = "0123456789abcdef0123456789abcdef01234567"


class Crash:
    def on_iteration(self, line):
        if line["iteration"] == 3:
            raise KeyError("crash")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Trackers write below this folder and ask no server."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_API_KEY", SECRET)
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        yield folder


@pytest.fixture(scope="module")
def tracked(places):
    """A run that crashed in iteration 3 and went on from its checkpoint before iteration 2: its
    folder, the lines at the crash and those at the end."""
    (places / "own.py").write_text(OWN)
    reward = [f"{places}/own.py:{name}" for name in ("quarters", "mean")]
    settings = SMALL | {"out": places / "run", "reward": reward}
    with pytest.raises(KeyError, match="crash"):
        spo.train("grpo", callbacks=[Crash()], log=list(TRACKERS), **settings)
    before = read_metrics(places / "run" / "metrics.jsonl")
    run = spo.train("grpo", resume=True, log=list(TRACKERS), **settings)
    return run.folder, before, run.metrics


def expected(lines):
    """Name -> its (iteration, value)s, under TRL's names."""
    found = {}
    for line in lines:
        for name, value in figures(line).items():
            found.setdefault(name, []).append((line["iteration"], value))
    return found


def first_heard(tracked):
    """The lines that a tracker got which takes nothing back: those of the crash, then the rest."""
    _, before, after = tracked
    heard = {(line["iteration"], line["stage"]) for line in before}
    return before + [line for line in after if (line["iteration"], line["stage"]) not in heard]


def line_of(iteration, **more):
    """A short line of an iteration."""
    head = {"iteration": iteration, "seconds": 1.0, "generated_tokens": 5, "stage": "train"}
    return head | more


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return events, {
        tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_the_run_repeats_iterations(tracked):
    _, before, after = tracked
    assert [(x["iteration"], x["stage"]) for x in before] == [
        (0, "eval"), (0, "train"), (1, "train"), (2, "train"), (3, "train"),
    ]  # fmt: skip
    assert [(x["iteration"], x["stage"]) for x in after] == [
        *((x["iteration"], x["stage"]) for x in before), (4, "eval"),
    ]  # fmt: skip
    assert before[3]["loss"] == after[3]["loss"] != 0
    assert before[3]["time_iteration"] != after[3]["time_iteration"]


def test_tensorboard_holds_what_metrics_jsonl_holds(tracked):
    folder, _, after = tracked
    events, found = scalars(folder)
    wanted = in_sections(expected(after))
    assert found.keys() == wanted.keys()
    for name, points in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        values = [value for _, value in points]
        assert [v for _, v in found[name]] == pytest.approx(values, rel=1e-6), name
    (first, again) = events.Tensors("recipe/text_summary")
    assert b"learning_rate: 0.0001" in first.tensor_proto.string_val[0] and again.step == 2


def test_mlflow_holds_each_iteration_once(tracked):
    from mlflow import MlflowClient

    folder, _, _ = tracked
    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("spo").experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "grpo"
    assert run.data.params["train.learning_rate"] == "0.0001"
    wanted = expected(first_heard(tracked))
    assert run.data.metrics.keys() == wanted.keys()
    for name, points in wanted.items():
        history = client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.value) for m in history] == points, name


def test_trackio_holds_each_iteration_once(tracked):
    from trackio.sqlite_storage import SQLiteStorage

    (record,) = SQLiteStorage.get_run_records("spo")
    assert record["name"] == "grpo"
    found = {}
    for row in SQLiteStorage.get_logs("spo", run_id=record["id"]):
        for name, value in row.items():
            if name not in ("step", "timestamp"):
                found.setdefault(name, []).append((row["step"], value))
    assert found == in_sections(expected(first_heard(tracked)))
    config = SQLiteStorage.get_run_config("spo", "grpo", run_id=record["id"])
    assert config["train"]["learning_rate"] == 1e-4


def records(path):
    """The protobuf records of a .wandb file, which is a LevelDB log with a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def test_the_newest_files_of_wandb_hold_the_whole_run(tracked):
    folder, _, after = tracked
    first, last = sorted((folder / "wandb").glob("offline-run-*"))
    assert first.name.rpartition("-")[2] == last.name.rpartition("-")[2]  # the run's id
    assert (folder / "wandb" / "latest-run").resolve() == last
    (path,) = last.glob("*.wandb")
    rows, config = [], {}
    for record in records(path):
        for item in record.config.update:
            config["/".join([item.key, *item.nested_key])] = json.loads(item.value_json)
        if record.HasField("history"):
            row = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
            row = {k: json.loads(v) for k, v in row.items() if not k.startswith("_")}
            rows.append((row.pop("train/global_step"), row))
    assert rows == [(line["iteration"], in_sections(figures(line))) for line in after]
    assert config["train"]["learning_rate"] == 1e-4
    assert not any(SECRET.encode() in p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_every_key_is_explained_and_has_the_name_that_the_page_gives(tracked):
    _, _, after = tracked
    for line in after:
        assert not unexplained(line)
    assert unexplained({"colour": 1, "aime/greedy": 1, "aime/colour": 1}) == [
        "colour",
        "aime/colour",
    ]
    named = {key: name for key, name in trl_names().items() if name}
    assert named == TRL | {
        "iteration": "the x axis",
        "stage": "not sent",
        "reward_<term>": "rewards/<term>/mean",
    }
    sent = figures(after[1])
    assert sent["reward"] == after[1]["reward_mean"]
    assert sent["rewards/quarters/mean"] == after[1]["reward_quarters"]
    assert sent["rewards/mean_1/mean"] == 0.5 != sent["reward"]  # a term of the name `mean`
    assert sent["spo/generated_tokens"] == after[1]["generated_tokens"]
    assert {*TRL.values()} - sent.keys() == {"kl"}  # without loss.kl_coef
    line = {"stage": "eval", "iteration": 2, "aime/greedy": 0.5, "aime/majority": math.nan}
    assert figures(line | {"note": "of a rule"}) == {"eval_aime_greedy": 0.5}


def test_a_tracker_that_fails_is_left_out_and_a_resumed_run_sends_what_it_lacks(places):
    out = places / "failing"
    out.mkdir()
    folder = out / "run"

    class Away:
        """Hides MLflow's files after the first iteration."""

        def on_iteration(self, line):
            if (folder / "mlruns").exists():
                (folder / "mlruns").rename(out / "hidden")

    settings = SMALL | {"out": folder}
    with pytest.warns(UserWarning) as heard:
        spo.train("grpo", log="mlflow", callbacks=[Away()], **settings)
    said = [str(w.message) for w in heard if "log:" in str(w.message)]
    assert len(said) == 1 and "mlflow is left out from iteration 1 on" in said[0]
    assert len(read_metrics(folder / "metrics.jsonl")) == 6
    with one_sentence(["log: mlflow does not start"]):
        spo.train("grpo", log="mlflow", resume=True, **settings)

    shutil.rmtree(folder / "mlruns", ignore_errors=True)
    (out / "hidden").rename(folder / "mlruns")
    run = spo.train("grpo", log=["mlflow", "tensorboard"], resume=True, **settings)
    wanted = expected(run.metrics)["reward"]
    assert [step for step, _ in wanted] == [0, 1, 2, 3]
    assert [step for step, _ in scalars(folder)[1]["train/reward"]] == [0, 1, 2, 3]
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(folder / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("spo").experiment_id])
    history = client.get_metric_history(found.info.run_id, "reward")
    assert [(m.step, m.value) for m in history] == wanted


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_fails_is_one_warning(tmp_path):
    recipe = load_recipe("grpo", [f"out={tmp_path}", "log=tensorboard"])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.warns(UserWarning) as heard, opened(recipe, True, False, 0) as (tracker,):
        tracker.on_iteration(line_of(0))
        shutil.rmtree(tmp_path / "tensorboard")
        for step in (1, 2):
            tracker.on_iteration(line_of(step))
    said = [str(w.message) for w in heard if "log:" in str(w.message)]
    assert len(said) == 1 and "tensorboard is left out from iteration 1 on" in said[0]


def test_a_new_run_in_the_folder_of_one_without_a_checkpoint_is_a_new_run(places):
    recipe = load_recipe("grpo", [f"out={places / 'again'}", "log=[tensorboard, trackio]"])
    from trackio.sqlite_storage import SQLiteStorage

    recipe.out_dir.mkdir()
    known = len(SQLiteStorage.get_run_records("spo"))
    for attempt, steps in enumerate((3, 2)):
        (recipe.out_dir / "metrics.jsonl").write_text("")
        with opened(recipe, True, False, 0) as trackers:
            for step in range(steps):
                for tracker in trackers:
                    tracker.on_iteration(line_of(step, loss=float(attempt)))
    assert scalars(recipe.out_dir)[1]["train/loss"] == [(0, 1.0), (1, 1.0)]
    runs = SQLiteStorage.get_run_records("spo")[known:]
    assert [len(SQLiteStorage.get_logs("spo", run_id=run["id"])) for run in runs] == [3, 2]

    # The first of two runs of one name goes on, not the newest.
    (recipe.out_dir / "tracker-trackio.json").write_text(
        json.dumps({"run": runs[0]["id"], "sent": [2, True]})
    )
    with opened(recipe, True, True, 3) as (_, tracker):
        tracker.on_iteration(line_of(3))
    assert [len(SQLiteStorage.get_logs("spo", run_id=run["id"])) for run in runs] == [4, 2]


def test_a_tracker_that_does_not_start_is_one_sentence_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:password@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    recipe = load_recipe("grpo", [f"out={tmp_path}", "log=mlflow"])
    with one_sentence(["log: mlflow does not start", "@127.0.0.1:9"]):
        try:
            with opened(recipe, True, False, 0):
                pass
        except ValueError as error:
            assert "password" not in str(error)
            raise


def test_other_ranks_and_runs_without_trackers_import_none(tmp_path):
    recipe = load_recipe("grpo", [f"out={tmp_path}", "log=wandb"])
    with opened(recipe, False, False, 0) as trackers:
        assert trackers == []
    code = f"import sys, spo.trackers.tracker; print({set(TRACKERS)} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_folder_named_like_a_package_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ModuleNotFoundError, match="needs wandb, .* 'spo-kernels.trackers.'"):
        require_installed(load_recipe("grpo", ["log=wandb"]))
