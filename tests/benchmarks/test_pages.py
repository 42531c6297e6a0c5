"""Figures in README and docs are those of the committed results, with where they come from."""

import json
import re
import shutil

import pytest

pytest.importorskip("matplotlib")  # the pages' drawings; an extra

from benchmarks import RESULTS, ROOT, provenance
from benchmarks.figures import measure, pages, results, steps

COMMIT = re.compile(r"(measured before the [\w ]+ of )\w+\+?")


def test_the_pages_hold_what_the_committed_results_say():
    """But for the commit that a mark names: a change of the sources moves it."""
    for (path, name), body in pages.bodies().items():
        text = path.read_text()
        between = text.partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
        found, wanted = (COMMIT.sub(r"\1X", part.strip()) for part in (between, body))
        assert found == wanted, f"{path.name}, {name}: run python -m benchmarks.figures.pages"


def rows_of(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    content = json.loads(path.read_text())
    if isinstance(content, list):
        return content
    return [content] if "date" in content else list(content.values())


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(RESULTS.glob("*/*.json*")) if p.name != "suite.json"],
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_every_result_names_machine_date_commit_and_sources(path):
    for row in rows_of(path):
        assert row["device"] and re.fullmatch(r"\d{4}-\d\d-\d\d", row["date"]), row
        assert re.fullmatch(r"[0-9a-f]{7,}\+?", row["commit"])
        assert re.fullmatch(r"[0-9a-f]{12}\+?", row["sources"])
        kind = path.parent.name.removeprefix("cpu").removeprefix("-")
        found = row["device_kind"].replace(" ", "-").lower()  # a GPU's is its name
        assert found == kind or path.parent == results.EVIDENCE


def test_a_page_marks_what_was_measured_on_other_sources(tmp_path, monkeypatch):
    rows = json.loads((RESULTS / "cpu-amx" / "train_step.json").read_text())
    now = provenance.environment("training code")
    (tmp_path / now["device_kind"]).mkdir()
    path = tmp_path / now["device_kind"] / "train_step.json"
    monkeypatch.setattr(results.devices, "__defaults__", (tmp_path,))
    monkeypatch.setattr(results.read, "__defaults__", (tmp_path,))
    path.write_text(json.dumps([row | now for row in rows]))
    assert "measured before" not in steps.training_step()
    path.write_text(json.dumps([row | now | {"sources": "0" * 12} for row in rows]))
    assert re.search(r"; measured before the training code of \w+\+?\.$", steps.training_step())


def test_a_digest_is_of_names_and_contents(tmp_path):
    def digest():
        return provenance.digest.__wrapped__("rollout code", tmp_path)

    (tmp_path / "spo" / "grow").mkdir(parents=True)
    file = tmp_path / "spo" / "grow" / "a.py"
    file.write_text("x = 1\n")
    first = digest()
    assert re.fullmatch("[0-9a-f]{12}", first)
    (tmp_path / "spo" / "grow" / "notes.md").write_text("no source")
    (tmp_path / "spo" / "cli.py").write_text("x = 1\n")
    assert digest() == first
    file.write_text("x = 2\n")
    second = digest()
    file.rename(file.with_name("b.py"))
    assert len({first, second, digest()}) == 3


def test_every_pattern_of_sources_names_files():
    for patterns in provenance.SOURCES.values():
        for pattern in patterns:
            assert any(path.is_file() for path in ROOT.glob(pattern)), pattern


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ("avx2 avx512f avx512_bf16 amx_bf16 amx_tile", "amx"),
        ("avx2 avx512f avx512_bf16", "avx512_bf16"),
        ("avx2 avx512f", "avx512"),
        ("sse2 avx2", "avx2"),
    ],
)
def test_the_kind_of_a_cpu_is_its_best_unit(monkeypatch, flags, kind):
    monkeypatch.setattr(provenance, "_cpuinfo", lambda field: flags)
    assert provenance.kind_of("cpu") == kind
    assert provenance.folder("cpu").name == f"cpu-{kind}"


def test_times_are_compared_on_one_kind_only():
    def row(kind, ms, role="ours"):
        return {"device_kind": kind, "shape": "s", "role": role, "ms": ms}

    before = [row("amx", 10.0), row("amx", 1.0, "floor")]
    assert measure.changes(before, [row("amx", 12.0)]) == ["s: 1.20 of the time committed for amx"]
    assert measure.changes(before, [row("avx2", 12.0)]) == []


def test_a_figure_is_replaced_only_by_a_measurement_that_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "folder", lambda: tmp_path)
    (tmp_path / "gae.json").write_text("[]")
    monkeypatch.setitem(measure.SHORT, "gae", [shutil.which("false")])
    with pytest.raises(measure.subprocess.CalledProcessError):
        measure.run("gae")
    assert (tmp_path / "gae.json").read_text() == "[]"
    monkeypatch.setitem(measure.SHORT, "gae", measure.module("kernels.gae", "--quick"))
    measure.run("gae")
    record = json.loads((tmp_path / "gae.json").read_text())
    assert record[0]["sources"] == provenance.digest("kernels")
