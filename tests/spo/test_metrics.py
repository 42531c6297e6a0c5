"""Metrics files survive kills and non-finite numbers; means and errors are worked by hand."""

import json
import math

import numpy
import pytest

from spo.metrics import MetricsWriter, mean_stderr, plus_minus, read_metrics


def line(iteration, stage="train", **figures):
    at = {"iteration": iteration, "seconds": 1.5 * iteration, "generated_tokens": 100 * iteration}
    return {**at, "stage": stage, **figures}


def write(path, lines):
    with MetricsWriter(path) as writer:
        for each in lines:
            writer.write(each)


def test_lines_come_back_as_written_and_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [
        line(0, loss=0.25, lr=1e-6),
        line(1, "eval", greedy=0.5, problems=1319, note="ü\u2028"),
    ]
    with MetricsWriter(path) as writer:
        writer.write(lines[0])
        assert read_metrics(path) == lines[:1]  # flushed, not only on close
        writer.write(lines[1])
    assert read_metrics(path) == lines
    assert len(path.read_bytes().splitlines()) == 2


def test_non_finite_is_null_in_the_file_and_nan_when_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(
        path, [line(0, loss=math.nan, grad_norm=math.inf, low=-math.inf, half=numpy.float32(0.5))]
    )
    assert json.loads(path.read_text())["grad_norm"] is None
    (read,) = read_metrics(path)
    assert math.isnan(read["loss"]) and math.isnan(read["grad_norm"]) and math.isnan(read["low"])
    assert read["half"] == 0.5


def test_resume_drops_later_lines_and_keeps_the_rest_byte_for_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [line(i, stage) for i in range(4) for stage in ("eval", "train")])
    before = path.read_bytes().splitlines(keepends=True)
    with MetricsWriter(path, resume_at=2) as writer:
        assert path.read_bytes() == b"".join(before[:5])  # the evaluation at 2 is of this policy
        writer.write(line(2, loss=9.0))
        writer.write(line(3, "eval"))
    assert path.read_bytes().startswith(b"".join(before[:5]))
    assert [(x["iteration"], x["stage"]) for x in read_metrics(path)[4:]] == [
        (2, "eval"), (2, "train"), (3, "eval"),
    ]  # fmt: skip
    with MetricsWriter(path, resume_at=3) as writer:
        writer.write(line(3, "eval", greedy=0.5))  # it is measured again: one line, the new one
    assert path.read_bytes().startswith(b"".join(before[:5]))
    assert read_metrics(path)[5:] == [line(2, loss=9.0), line(3, "eval", greedy=0.5)]
    MetricsWriter(path, resume_at=0).close()  # another run in the folder of one that left nothing
    assert path.read_bytes() == b""
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_last_line_cut_at_any_byte_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [line(0, loss=0.5), line(1, loss=0.25)])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first, len(whole)):  # the last cut loses the line's end only
        path.write_bytes(whole[:cut])
        assert read_metrics(path) == [line(0, loss=0.5)]
        write(path, [line(7)])
        assert read_metrics(path) == [line(0, loss=0.5), line(7)]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [line(0), line(1)])
    for broken in (b'{"iteration": 0, "sec', b"[]", b'{"loss": 1}', b'{"iteration": 0}', b"\xff"):
        path.write_bytes(broken + b"\n" + path.read_bytes().splitlines(keepends=True)[-1])
        with pytest.raises(ValueError, match="line 1 is not a metrics line"):
            read_metrics(path)
        with pytest.raises(ValueError, match="line 1 is not a metrics line"):
            MetricsWriter(path, resume_at=1)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ({"stage": "test"}, ValueError, "stage: expected one of"),
        ({"iteration": 1.5}, ValueError, "iteration: expected a whole number, found 1.5"),
        ({"generated_tokens": math.nan}, ValueError, "generated_tokens: expected a whole number"),
        ({"loss": [1.0]}, TypeError, "metric 'loss': expected a number or a string"),
        ({"loss": None}, TypeError, "metric 'loss': expected a number or a string"),
    ],
)
def test_a_bad_line_is_refused_and_nothing_is_written(tmp_path, bad, error, words):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer, pytest.raises(error, match=words):
        writer.write(line(0) | bad)
    missing = line(0)
    del missing["seconds"]
    with MetricsWriter(path) as writer, pytest.raises(ValueError, match="the key 'seconds'"):
        writer.write(missing)
    assert path.read_bytes() == b""


def test_mean_and_standard_error():
    assert mean_stderr([1, 0, 1, 1]) == (0.75, 0.25)  # sqrt(0.75 * 0.25 / 3)
    assert mean_stderr([2.0, 4.0, 9.0]) == (5.0, pytest.approx(math.sqrt(26 / 6)))
    assert mean_stderr(x > 2 for x in range(3)) == (0.0, 0.0)
    mean, error = mean_stderr([0.5])
    assert mean == 0.5 and math.isnan(error)
    assert math.isnan(mean_stderr([1.0, math.nan])[0])
    with pytest.raises(ValueError, match="at least one sample"):
        mean_stderr([])


def test_an_error_that_is_not_known_is_not_shown():
    assert plus_minus(0.25, 0.5) == "0.250 ± 0.500" and plus_minus(0.25, 0, "+") == "+0.250 ± 0.000"
    assert plus_minus(1, math.nan) == "1.000"
