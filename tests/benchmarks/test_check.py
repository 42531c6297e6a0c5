"""`make bench-check`: its verdict by hand, and four workloads that are slower on purpose."""

import shutil
import subprocess
import sys

import pytest

from benchmarks import ROOT, check
from benchmarks.workloads import WORKLOADS

# workload -> file, the line after which a pause is put
PAUSES = {
    "loss from logits": ("spo_kernels/policy_loss.py", "def masked_ppo_loss("),
    "head": ("spo_kernels/linear_policy_loss.py", "def linear_masked_ppo_loss("),
    "packed step": ("spo/learn/loss.py", "def policy_loss("),
    "rollout prefill": ("spo/engines/hf.py", "    def _prefill("),
}


def test_slower_is_a_median_of_ratios_above_the_limit():
    times = {
        "even": [(10, 11), (20, 22), (10, 10)],
        "one busy round": [(10, 90), (10, 11), (10, 10), (10, 11), (10, 10)],
        "who is second is faster": [(10, 8), (8, 10)] * 4,
        "slower": [(10, 12), (10, 11.2), (10, 13), (10, 9), (10, 12)],
        "at the limit": [(100, 115)] * 3,
    }
    assert check.ratio(times["who is second is faster"]) == 1
    assert check.ratio(times["slower"]) == pytest.approx(1.16)
    assert check.slower(times) == ["slower"]


@pytest.mark.parametrize(("late_series", "found"), [(1, []), (2, ["b"])])
def test_a_first_series_is_confirmed_by_a_longer_one(monkeypatch, capsys, late_series, found):
    asked = []

    def measure(base, this, names, rounds):
        asked.append((list(names), rounds))
        late = [(10.0, 12.0)] if len(asked) <= late_series else [(10.0, 10.0)]
        return {name: late * rounds if name == "b" else [(1.0, 1.0)] * rounds for name in names}

    monkeypatch.setattr(check, "measure", measure)
    assert check.compare(ROOT, ROOT, ["a", "b"], rounds=3) == found
    assert asked == [(["a", "b"], 3), (["b"], 6)]
    assert capsys.readouterr().out.count("SLOWER") == len(found)


def with_pauses(folder):
    """A copy of the packages in which each workload pauses once for 1 s."""
    for package in ("spo", "spo_kernels", "benchmarks"):
        skipped = shutil.ignore_patterns("__pycache__", "policies", "results")
        shutil.copytree(ROOT / package, folder / package, ignore=skipped)
    for file, mark in PAUSES.values():
        path = folder / file
        head, found, tail = path.read_text().partition(mark)
        signature, docs, body = tail.partition('"""')
        inside, end, rest = body.partition('"""\n')
        assert found and docs and end, file
        space = "        " if mark.startswith(" ") else "    "
        pause = f"{space}__import__('time').sleep(1)\n"
        path.write_text(head + found + signature + docs + inside + end + pause + rest)
    return folder


def test_each_workload_that_is_slower_fails(tmp_path):
    times = check.measure(ROOT, with_pauses(tmp_path / "slow"), list(WORKLOADS), rounds=1)
    assert sorted(check.slower(times)) == sorted(WORKLOADS) and len(WORKLOADS) == 4


@pytest.mark.slow
def test_the_same_tree_passes():
    assert check.compare(ROOT, ROOT) == []


def test_a_workload_that_breaks_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "spo_kernels").mkdir()
    (tmp_path / "spo_kernels" / "__init__.py").write_text("raise ImportError('broken')")
    monkeypatch.setattr(check, "build", lambda base: tmp_path)
    assert check.main(["HEAD"]) == 2
    assert "the workloads do not run" in capsys.readouterr().err


def test_an_unknown_commit_is_one_sentence():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.check", "no-such-commit"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no-such-commit" in done.stderr
