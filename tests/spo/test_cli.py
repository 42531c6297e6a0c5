"""The command line as a user types it."""

import json
import runpy
import shutil

import pytest

from spo.cli import main
from spo.metrics import read_metrics
from spo.records import Forest
from spo.report.compare import verdict

SMALL = [
    "engine.name=hf",
    "engine.max_model_len=96",
    "sampling.max_new_tokens=32",
    "shape.widths=[2,2]",
    "shape.segment_tokens=[8]",
    "train.prompts=2",
    "train.iterations=1",
    "eval.problems=4",
    "eval.every=0",
]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text("name: test\ntask: arithmetic\n")
    return str(path)


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    """The folder of a run from the command line."""
    out = tmp_path_factory.mktemp("trained") / "run"
    assert run("train", recipe, *SMALL, f"out={out}") == 0
    return out


def run(*arguments):
    return main([str(a) for a in arguments])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.lerning_rate=1"], ["unknown key train.lerning_rate"]),
        (["policy.path=/no/such/model"], ["policy.path", "/no/such/model"]),
        (["policy.path=nobody/nothing"], ["policy.path", "nobody/nothing"]),
        (["task=chess"], ["task", "chess", "arithmetic"]),
        (["engine.max_model_len=40"], ["longer than 8 tokens", "context of 40"]),
    ],
)
def test_bad_input_is_one_sentence_and_an_exit_code(recipe, tmp_path, capsys, overrides, words):
    code = run("train", recipe, *SMALL, f"out={tmp_path / 'run'}", *overrides)
    error = capsys.readouterr().err.strip()
    assert code != 0
    assert error.startswith("spo: ") and "\n" not in error and "Traceback" not in error
    for word in words:
        assert word in error


def test_a_model_without_a_tokenizer_is_refused(recipe, tmp_path, tiny_model, capsys):
    code = run("train", recipe, *SMALL, f"policy.path={tiny_model}", f"out={tmp_path / 'run'}")
    assert code == 2 and "holds no tokenizer" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:'spo.cli' found in sys.modules")
def test_it_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["spo", "train", "no-such-recipe.yaml"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("spo.cli", run_name="__main__")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and "cannot be read" in error and "Traceback" not in error


def test_train_eval_view(recipe, trained, tmp_path, capsys):
    out = trained
    page = (out / "report.html").read_text()
    assert "first iteration" in page
    result = tmp_path / "eval.json"
    code = run(
        "eval", recipe, *SMALL, "--checkpoint", out, "--samples", 2,
        "--max-new-tokens", "32,12", "--json", result,
    )  # fmt: skip
    assert code == 0
    saved = json.loads(result.read_text())
    rows = [(r["max_new_tokens"], r["temperature"], r["samples"]) for r in saved["results"]]
    assert rows == [(12, 0, 1), (32, 0, 1), (12, 1, 2), (32, 1, 2)]
    assert all(r["problems"] == 4 for r in saved["results"])
    short, whole, *_ = (r["pass_at_1"] for r in saved["results"])
    assert short <= whole == read_metrics(out / "metrics.jsonl")[-1]["greedy"]
    assert "greedy" in capsys.readouterr().out
    one = ("eval", recipe, *SMALL, "eval.problems=1", "--samples", 2, "--json", result)
    assert run(*one, "--temperature", "0") == 0
    saved = json.loads(result.read_text(), parse_constant=pytest.fail)  # NaN is no JSON
    assert [r["temperature"] for r in saved["results"]] == [0, 0]
    assert all(r["stderr"] is None for r in saved["results"])
    capsys.readouterr()
    assert run(*one, "--temperature", "-1") == 2
    assert "temperature: expected" in capsys.readouterr().err
    assert run("view", out, "-o", tmp_path / "again.html") == 0
    assert (tmp_path / "again.html").read_text() == page
    assert run("train", recipe, *SMALL, f"out={out}") == 2
    assert "--resume" in capsys.readouterr().err


def test_rollout_and_view(recipe, tmp_path, capsys):
    file = tmp_path / "forest.safetensors"
    assert run("rollout", recipe, *SMALL, "-o", file) == 0
    forest = Forest.load(file)
    printed = capsys.readouterr().out
    assert len(forest.prompts) == 2
    assert f"{forest.num_generated} tokens generated" in " ".join(printed.split())
    assert run("view", file) == 0
    page = tmp_path / "forest.html"
    first = page.read_text()
    assert run("view", file, "credit.scale=std", "loss.prob_threshold=null") == 0
    assert page.read_text() != first
    star = tmp_path / "star.yaml"
    star.write_text("policy: {path: nowhere}\n")
    assert run("view", file, "--recipe", star) != 0  # its tokenizer is the policy's
    assert "nowhere" in capsys.readouterr().err


def test_view_and_eval_refuse_what_is_not_there(recipe, tmp_path, capsys):
    assert run("view", tmp_path / "none") == 2
    (tmp_path / "empty").mkdir()
    assert run("view", tmp_path / "empty") == 2
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    assert run("view", tmp_path / "bad.safetensors") == 2
    assert run("eval", recipe, *SMALL, "--checkpoint", tmp_path / "empty") == 2
    assert run("view", tmp_path / "empty", "--recipe", recipe) == 2
    assert run("eval", recipe, *SMALL, "--temperature", "inf") == 2
    assert run("train", recipe, *SMALL, "data.options.foo=1", "--dry-run") == 2
    assert run("eval", recipe, *SMALL, "--max-new-tokens", "2k") == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 8 and "--max-new-tokens" in errors[-1]


def test_compare(recipe, tmp_path, capsys):
    other = tmp_path / "star.yaml"
    other.write_text("name: star\nshape: {kind: star, group_size: 3}\ncredit: {scale: std}\n")
    tree = [s for s in SMALL if not s.startswith("shape")]
    shaped = tmp_path / "tree.yaml"
    shaped.write_text("name: tree\nshape: {widths: [2, 2], segment_tokens: [8]}\n")
    out = tmp_path / "both"
    assert run("compare", shaped, other, *tree, "--out", out) == 0
    printed = capsys.readouterr().out
    assert "Pass@1, test split" in printed and "two standard errors" in " ".join(printed.split())
    assert (out / "report.html").exists() and (out / "star" / "checkpoints").exists()


def evals(before, after, error=0.01):
    return [{"stage": "eval", "greedy": x, "greedy_stderr": error} for x in (before, after)]


def test_verdict_says_what_the_numbers_say():
    same = verdict({"A": evals(0.3, 0.9), "B": evals(0.3, 0.89)})
    assert "A improved" in same and "B improved" in same and "within two standard errors" in same
    apart = verdict({"A": evals(0.3, 0.31), "B": evals(0.3, 0.6)})
    assert "A did not improve" in apart and "B ends above A by 0.290" in apart


def test_overrides_may_stand_behind_an_option(recipe, tmp_path, capsys):
    assert run("train", recipe, "--dry-run", *SMALL, "train.iterations=7") == 0
    assert "7 iterations" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run("train", recipe, "--dry-run", "--colour=red")


def test_a_result_has_a_place_before_the_work_begins(recipe, tmp_path, capsys):
    assert run("rollout", recipe, *SMALL, "-o", tmp_path) == 2
    assert "is a folder" in capsys.readouterr().err
    assert run("rollout", recipe, *SMALL, "-o", tmp_path / "new" / "f.safetensors") == 0


def test_damaged_weights_are_one_sentence(recipe, trained, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    (weights,) = out.glob("checkpoints/*/policy/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    assert run("eval", recipe, *SMALL, "--checkpoint", out) == 2
    (optimizer,) = out.glob("checkpoints/*/optimizer.pt")
    optimizer.write_bytes(b"\x80\x04nonsense")
    assert run("train", recipe, *SMALL, f"out={out}", "--resume") == 2
    assert capsys.readouterr().err.count("spo: ") == 2
