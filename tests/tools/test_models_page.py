"""docs/models.md shows the committed sweep, and that sweep is right."""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "tools"))

from architecture_table import BEGIN, END, counts, outcome, render  # noqa: E402
from architectures import TRAIN  # noqa: E402

RESULTS = json.loads((ROOT / "benchmarks" / "results" / "architectures.json").read_text())


def test_the_page_shows_the_results():
    page = (ROOT / "docs" / "models.md").read_text()
    assert page.split(BEGIN)[1].split(END)[0] == f"\n{render(RESULTS)}\n"


def test_no_architecture_is_wrong_and_enough_train():
    number = counts(RESULTS)
    assert number["WRONG"] == 0
    assert number["trains"] >= TRAIN == 45


def test_what_trains_is_right_to_the_limits():
    for row in RESULTS["rows"]:
        if outcome(row) == "trains":
            assert row["trainer"]["logprobs"] <= 1e-4 and row["trainer"]["gradient"] <= 1e-3
            assert row["engine"]["kind"] == "refused" or row["engine"]["logprobs"] <= 1e-4


def test_every_refusal_is_a_sentence():
    for row in RESULTS["rows"]:
        for side in ("trainer", "engine"):
            verdict = row.get(side)
            if verdict and verdict["kind"] == "refused":
                assert verdict["reason"].startswith("policy.path: "), row["name"]
                assert "\n" not in verdict["reason"] and len(verdict["reason"]) < 400, row["name"]
