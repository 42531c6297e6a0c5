"""`spo grade`: a file of responses, one or several graders, and where they differ."""

import json

import pytest

from spo.cli import main

ROWS = [
    {"given": "1/2", "answer": "0.5", "right": True},
    {"given": "1/3", "answer": "0.5", "right": False},
    {"given": r"\frac{4}{2}", "answer": "2", "right": True},
    {"response": "so #### 5", "answer": "5", "right": True},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    return path


def test_graders_are_compared(file, capsys, tmp_path):
    out = tmp_path / "out" / "verdicts.jsonl"
    command = ["grade", "--task", "math", "--task", "gsm8k", str(file), "--json", str(out)]
    assert main([*command, "--workers", "1", "--show", "2"]) == 0
    said = capsys.readouterr().out
    math, gsm8k = (line for line in said.splitlines() if line.startswith(("│ math", "│ gsm8k")))
    assert [word.strip() for word in math.split("│")[1:-2]] == [
        *("math", "2", "2", "0"),
        *("3 of 4 (75.0%)", "0", "1"),
    ]
    assert "2 of 4 (50.0%)" in gsm8k
    assert r"the file: right, math: right, gsm8k: wrong | 0.5 | \boxed{1/2}" in said
    assert "… and 1 more; --show N prints N" in said
    verdicts = [json.loads(line) for line in out.read_text().splitlines()]
    assert [v["math"]["reward"] for v in verdicts] == [1.0, 0.0, 1.0, 0.0]
    assert [v["gsm8k"]["reward"] for v in verdicts] == [0.0, 0.0, 0.0, 1.0]


def test_options_failures_and_your_own_task(tmp_path, capsys):
    (tmp_path / "odd.py").write_text(
        "from dataclasses import dataclass\n\n\n@dataclass(frozen=True)\nclass Odd:\n"
        "    def problems(self, split, seed):\n        yield from ()\n\n"
        "    def grade(self, text, answer):\n        return 1 / 0\n"
    )
    path = tmp_path / "echo.jsonl"
    path.write_text(json.dumps({"given": "5+7", "answer": 12}))
    assert main(["grade", "--task", f"{tmp_path}/odd.py:Odd", str(path)]) == 0
    said = capsys.readouterr().out
    assert "1 × ZeroDivisionError: division by zero" in said and "agrees" not in said
    for options, right in (("{}", "1"), ('{"simplified": true}', "0")):
        assert main(["grade", "--task", "math", "--options", options, str(path)]) == 0
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "math │" in line)
        assert line.split("│")[2].strip() == right


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "answers.jsonl, line 2: expected a JSON object, found '{'"),
        ('{"answer": 1}', "answers.jsonl, line 2: expected a string in response or given"),
        ('{"given": "1"}', "answers.jsonl, line 2: expected an object with answer"),
        ('{"given": "1", "answer": 1, "right": 1}', "line 2: right: expected true or false"),
    ],
)
def test_a_bad_line_is_one_sentence(tmp_path, capsys, line, sentence):
    path = tmp_path / "answers.jsonl"
    path.write_text(f"\n{line}\n")
    assert main(["grade", "--task", "math", str(path)]) == 2
    assert sentence in capsys.readouterr().err


def test_other_bad_input_is_one_sentence(file, tmp_path, capsys):
    for arguments, code, sentence in (
        (["--task", "chess", str(file)], 2, "task: expected aime24"),
        (["--task", "math", "--options", "[]", str(file)], 2, "--options: expected a JSON object"),
        (["--task", "math", "--options", '{"x": 1}', str(file)], 2, "data.options"),
        (["--task", "math", "--workers", "0", str(file)], 2, "workers: expected a positive number"),
        (["--task", "math", str(tmp_path / "none.jsonl")], 1, "No such file"),
    ):
        assert main(["grade", *arguments]) == code
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert main(["grade", "--task", "math", str(empty)]) == 2
    assert "expected at least one line" in capsys.readouterr().err
