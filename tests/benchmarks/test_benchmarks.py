"""Every benchmark at tiny shapes, the tables and drawings made of its rows, and the example."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import sanitize, suite
from benchmarks.figures import kernels, pages, results
from benchmarks.kernels import heads, rivals
from benchmarks.peak import peak_memory

ROOT = Path(__file__).parents[2]
BENCHMARKS = results.BENCHMARKS


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A results folder with every kernel benchmark's rows, as JSON and CSV."""
    root = tmp_path_factory.mktemp("results")
    for name in BENCHMARKS:
        files = ["--json", f"{root}/cpu-x/{name}.json", "--csv", f"{root}/cpu-x/{name}.csv"]
        benchmark = importlib.import_module(f"benchmarks.kernels.{name}")
        benchmark.main(["--quick", "--seconds", "0", *files])
    return root


@pytest.mark.parametrize("name", BENCHMARKS)
def test_rows_compare_ours_with_eager_and_the_floor(measured, name):
    records = json.loads((measured / "cpu-x" / f"{name}.json").read_text())
    shapes = {(r["op"], r["shape"]) for r in records}
    for op, shape in shapes:
        rows = {r["role"]: r for r in records if (r["op"], r["shape"]) == (op, shape)}
        assert {"base", "ours", "floor"} <= set(rows)
        ours = rows["ours"]
        assert ours["speedup"] == pytest.approx(rows["base"]["ms"] / ours["ms"])
        assert ours["floor_share"] == pytest.approx(rows["floor"]["ms"] / ours["ms"])
        assert ours["version"].startswith("spo-kernels ")
        assert ours["ms_p20"] <= ours["ms"] <= ours["ms_p80"]
        assert (ours["gb_per_s"] is None) != (ours["tflop_per_s"] is None)
    with (measured / "cpu-x" / f"{name}.csv").open() as file:
        assert [float(r["ms"]) for r in csv.DictReader(file)] == [r["ms"] for r in records]


def test_rivals_with_and_without_the_dropped_rows_agree_with_fp32(measured):
    records = json.loads((measured / "cpu-x" / "policy_loss.json").read_text())
    sparse = [r for r in records if r["kept"] < 1 and r["role"] != "floor"]
    names = {r["implementation"] for r in sparse if r["width"]}
    assert {"PyTorch eager", "PyTorch eager, kept rows only", "spo_kernels"} <= names
    assert max(r["error"] for r in sparse) < 1e-4


def test_every_rival_that_is_installed_gives_the_same_loss():
    tried = set()
    for case in heads.cases("cpu", quick=True):
        problem = heads.make(case, "cpu")
        exact = heads.oracle(problem, rivals.policy_loss)
        for c in heads.candidates(case, "cpu", rivals.policy_loss, compiled=False):
            assert heads.error(heads.step(c.forward, problem), exact, problem.mask) < 1e-4, c.name
            tried.add(c.name)
    assert "PyTorch eager" in tried
    if importlib.util.find_spec("liger_kernel"):
        assert "Liger chunked GRPO, kept rows only" in tried


def test_a_wrong_kernel_is_not_timed():
    case = heads.cases("cpu", quick=True)[0]

    def wrong(p, backend=None):
        return 1.001 * rivals.policy_loss(rivals.eager_logprobs(p), p)

    tried = [*heads.ours("policy_loss", "cpu", wrong)]
    with pytest.raises(AssertionError, match="is off by 0.001"):
        heads.checked(case, "cpu", rivals.policy_loss, tried)


def test_a_rival_that_is_far_off_or_breaks_is_left_out(capsys):
    case = heads.cases("cpu", quick=True)[0]

    def far_off(p):
        return 1.2 * rivals.policy_loss(rivals.eager_logprobs(p), p)

    def breaks(p):
        raise RuntimeError("no such kernel")

    def right(p):
        return rivals.policy_loss(rivals.eager_logprobs(p), p)

    ways = {"far off": far_off, "breaks": breaks, "right": right}
    tried = [heads.Candidate(name, "fair", way) for name, way in ways.items()]
    assert list(heads.checked(case, "cpu", rivals.policy_loss, tried)) == ["right"]
    tried.append(heads.Candidate("slow base", "base", right))
    assert list(heads.checked(case, "cpu", rivals.policy_loss, tried, limit=0)) == ["slow base"]
    printed = capsys.readouterr().out
    assert "far off is off by 0.2" in printed and "RuntimeError: no such kernel" in printed


def test_a_gradient_on_a_dropped_row_is_an_infinite_error():
    problem = heads.make(heads.Case(8, 50, 0, 0.5, torch.float32), "cpu")
    assert int(problem.mask.sum()) == 4
    exact = heads.oracle(problem, rivals.policy_loss)

    def found(p):
        return rivals.policy_loss(rivals.eager_logprobs(p), p)

    loss, gradient = heads.step(found, problem)
    assert heads.error((loss, gradient), exact, problem.mask) < 1e-5
    gradient[~problem.mask] += 1e-9
    assert heads.error((loss, gradient), exact, problem.mask) == math.inf


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_counts_what_is_freed_on_the_way():
    x = torch.ones(16 * 2**20)  # 67 MB

    def call():
        return ((x + 1) * 2).sum() + x[: 2**20].exp()

    peak, results = peak_memory(call, "cpu")
    assert peak == pytest.approx(2 * x.nbytes / 1e6, rel=0.1)
    assert results == 2**20 * 4 / 1e6


def test_a_missing_package_is_an_import_error():
    with pytest.raises(ModuleNotFoundError, match="no_such_package"):
        rivals.import_part("no_such_package.kernels.loss")


def test_the_suite_survives_failures_and_steps_without_end(tmp_path, monkeypatch):
    Step, python = suite.Step, suite.python
    steps = (
        Step("breaks", python("-c", "raise SystemExit(3)"), 1),
        Step("hangs", python("-c", "import time; print('on', flush=True); time.sleep(60)"), 0.1),
        Step("gone", ("no-such-tool",), 1, tool="no-such-tool"),
        Step("elsewhere", ("true",), 1, device="cuda"),
        Step("last", python("-c", "import spo_kernels; print('x: skipped: y'); print('z')"), 1),
    )
    monkeypatch.setattr(suite, "STEPS", steps)
    path = tmp_path / "suite.json"
    assert suite.main(["--minutes", "1", "--json", str(path)]) == 1
    record = json.loads(path.read_text())
    outcomes = record["steps"]
    assert outcomes["breaks"]["returncode"] == 3
    assert outcomes["hangs"]["cut_off"] and outcomes["hangs"]["output"] == "on\n"
    assert outcomes["hangs"]["seconds"] < 30
    assert outcomes["gone"]["skipped"] == "no-such-tool is not installed"
    assert outcomes["elsewhere"]["skipped"] == "it needs --device cuda"
    assert outcomes["last"]["returncode"] == 0 and outcomes["last"]["notes"] == ["x: skipped: y"]
    assert record["environment"]["packages"]["torch"] == torch.__version__


def test_a_rehearsal_of_the_suite_skips_only_what_needs_a_gpu():
    skipped = {s.name for s in suite.STEPS if suite.reason_to_skip(s, "cpu", ())}
    assert skipped - {"nvcc"} == {"gpu", "registers", "tests on Triton"}
    for step in suite.STEPS:
        if step.name in ("memcheck", "racecheck", "synccheck"):
            assert step.variables["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
            assert step.command[1:3] == ("--error-exitcode", "1")
            sizes = step.command[step.command.index("--device") + 2 :]
            assert not sizes or {"1031", "151937"} < set(sizes)  # one block, and a cluster
    backends = {s.name: s.variables.get("SPO_TEST_BACKEND") for s in suite.STEPS}
    assert backends["tests"] == "{device}" and backends["tests on Triton"] == "triton"


def test_sanitized_kernels_are_as_the_reference(capsys):
    """What compute-sanitizer runs on a GPU; a wrong kernel is an AssertionError."""
    sanitize.main(["--sizes", "1", "1031"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 3 * 5 + 1 and all(line.endswith("as the reference") for line in lines)
    with pytest.raises(AssertionError, match="result 0: off by 1 of 2"):
        sanitize.check("it", [torch.ones(1)], [torch.full((1,), 2.0)], torch.float32)


def test_the_suite_collects_the_rows_of_its_benchmarks(tmp_path):
    step = next(s for s in suite.STEPS if s.name == "gae")
    arguments = Namespace(device="cpu", quick=True, seconds=0.0)
    outcome = suite.run(step, 60, arguments)
    assert outcome["returncode"] == 0, outcome["output"]
    folder = tmp_path / "h200"
    folder.mkdir()
    (folder / "suite.json").write_text(json.dumps({"steps": {"gae": outcome}}))
    assert {r["op"] for r in results.load("h200", "gae", tmp_path)} == {"gae"}
    assert results.load("h200", "tree", tmp_path) == []


def test_tables_hold_the_measured_figures(measured, tmp_path):
    text = kernels.everything(measured)
    for benchmark in BENCHMARKS:
        for rows in results.shapes(results.load("cpu-x", benchmark, measured)).values():
            ours = results.best(rows, "ours")
            assert f"**{ours['ms']:.3g}** | {kernels.times(ours['speedup'])} |" in text
    assert "`tree_values`, 6-6-6 trees" in text
    page = tmp_path / "page.md"
    page.write_text("a <!-- k -->old<!-- /k --> z")
    for _ in range(2):
        pages.write_between(page, "k", "new")
    assert page.read_text() == "a <!-- k -->\n\nnew\n\n<!-- /k --> z"


def test_drawings_are_small_and_the_same_every_time(measured, tmp_path):
    plot = pytest.importorskip("benchmarks.figures.plot")
    first, second = tmp_path / "first", tmp_path / "second"
    names = [path.name for path in plot.draw_all(measured, first)]
    plot.draw_all(measured, second)
    assert set(names) == {
        f"cpu-x-{op}.svg"
        for op in ("policy_loss", "linear_policy_loss", "logprobs", "linear_logprobs")
    }
    for name in names:
        drawn = (first / name).read_bytes()
        assert drawn == (second / name).read_bytes()
        assert b"spo_kernels" in drawn and len(drawn) < 60_000


def test_the_example_gives_the_same_losses_both_ways(monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "any_trainer", ROOT / "examples" / "any_trainer.py"
    )
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.setattr(example, "STEPS", 3)
    monkeypatch.setattr(example, "BATCH", 2)
    monkeypatch.setattr(example, "LENGTH", 33)
    monkeypatch.setattr(example, "VOCAB", 200)
    (eager, *_), (fused, *_) = example.train(example.eager), example.train(example.fused)
    assert fused == pytest.approx(eager, rel=1e-4, abs=1e-5)
    assert len({round(loss, 4) for loss in eager}) == 3  # it does train
