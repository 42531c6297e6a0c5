"""The grading worker: verdicts, deadlines, deaths, and what hostile text cannot do."""

import os
import random
import time
from pathlib import Path

import pytest

from spo.tasks import Task, countdown, get_task
from spo.tasks.grading import BATCH_ITEMS, Graded, Grader
from spo.tasks.worker import PRINTED

DEADLINE_S = 2.0

UNRULY = """
import os, signal, subprocess, sys, threading, time
from dataclasses import dataclass

@dataclass(frozen=True)
class Unruly:
    def problems(self, split, seed):
        yield from ()

    def grade(self, text, answer):
        if text == "hang":
            time.sleep(1000)
        if text.startswith("tower"):
            while True:
                pass
        if text.startswith("slow"):
            end = time.process_time() + 0.6
            while time.process_time() < end:
                pass
        if text == "hang in C":
            9**9**9
        if text == "abort":
            os.abort()
        if text == "exit":
            os._exit(3)
        if text == "raise":
            raise KeyError("lost")
        if text == "memory":
            return len(bytearray(1 << 40)) > 0
        if text == "write":
            with open(answer, "w") as file:
                file.write("x" * 100)
        if text == "child":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
            with os.fdopen(os.open(answer, os.O_WRONLY), "w") as pipe:
                pipe.write(str(child.pid))
            time.sleep(1000)
        if text == "print":
            print("true", flush=True)
            os.write(1, b"true\\n")
        while text == "print on":
            print("\\x1b[2J again", file=sys.stderr)
            time.sleep(0.001)
        if text == "torch":
            return "torch" in sys.modules
        return None if text == "nothing" else answer == 1
"""


@pytest.fixture
def unruly(tmp_path):
    """A grader of one worker with a task from outside that misbehaves on request."""
    task = outside(tmp_path, UNRULY, "Unruly")
    with Grader({"unruly": task}, timeout_s=DEADLINE_S, workers=1) as grader:
        yield grader


def outside(folder: Path, text: str, name: str, **settings) -> Task:
    (folder / "outside.py").write_text(text)
    return get_task(f"{folder}/outside.py:{name}", settings)


def finish(grader: Grader) -> list[Graded]:
    graded = []
    while grader.pending:
        graded += grader.poll(0.5)
    return graded


def hostile_answers() -> list[str]:
    rng = random.Random(0)
    wrap = "<answer> {} </answer>".format
    bodies = [
        "9**9**9**9",
        "10^{10^{10}}",
        "9" * 100_000,
        "1" + "0" * 5000 + " * 1",
        "__import__('os').system('touch pwned')",
        "exec(\"open('pwned', 'w')\")",
        "open('pwned','w').write('x')",
        "(" * 500_000 + ")" * 500_000,
        "[" * 1_000_000,
        "( " * 199 + "1" + " )" * 199,
        "((((((1",
        "1 + 2 )",
        "-1",
        "1 / ( 1 - 1 )",
        "\x00" * 1000,
        "1\x00+ 2 * 3",
        "\u0661 + \u0662 * \u0663",  # Arabic-Indic digits
        "\uff11 + \uff12 * \uff13",  # full-width digits
        "\u00b2",  # isdigit() but no int
        "1 2 3",
        "+ + +",
        "1e309",
        "nan",
        "\ud800",
        "Ann is Ann is a knight",
        "knight " * 200_000,
        "".join(chr(rng.randrange(32, 0x3000)) for _ in range(10_000)),
    ]
    whole = [
        "",
        "<answer>",
        "</answer>",
        "</answer><answer>",
        "<answer>" * 100_000,
        "</answer>" * 100_000,
        "\\boxed{" * 100_000,
        "\\boxed{" * 100_000 + "}" * 100_000,
        "\\boxed{9**9**9**9}",
        "\\boxed{__import__('os').system('touch pwned')}",
        "#### 6 or 7",
        "#### " + "9" * 100_000,
        "</think>" * 100_000,
        "<answer> \\boxed{6",
        "no tags at all",
    ]
    return [wrap(body) for body in bodies] + whole


def test_verdicts_come_in_order_and_match_the_graders():
    items = [
        ("arithmetic", "<answer> 7 </answer>", 7, 1.0),
        ("arithmetic", "<answer> 8 </answer>", 7, 0.0),
        (
            "countdown",
            "<answer> ( 5 - 2 ) * 7 </answer>",
            {"numbers": [2, 5, 7], "target": 21},
            1.0,
        ),
        ("countdown", "<answer> 5 * 7 </answer>", {"numbers": [2, 5, 7], "target": 35}, 0.0),
        (
            "knights_knaves",
            "<answer> Bob </answer>",
            {"people": ["Ann", "Bob"], "knights": ["Bob"]},
            1.0,
        ),
    ]
    with Grader() as grader:
        for key, (task, text, answer, _) in enumerate(items):
            grader.submit(key, task, text, answer)
        assert grader.pending == len(items)
        assert finish(grader) == [Graded(key, item[3]) for key, item in enumerate(items)]
        assert grader.pending == 0 and grader.poll() == []


def test_several_batches_keep_their_order():
    count = 2 * BATCH_ITEMS + 7
    with Grader() as grader:
        for key in range(count):
            grader.submit(key, "arithmetic", f"<answer> {key % 3} </answer>", 1)
        expected = [Graded(key, float(key % 3 == 1)) for key in range(count)]
        assert finish(grader) == expected


def test_hostile_text_gets_a_verdict_in_time_and_runs_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    answers = {
        "aime24": 6,
        "arithmetic": 6,
        "gsm8k": "6",
        "point24": {"numbers": [1, 1, 2, 12], "target": 24},
        "countdown": {"numbers": [1, 2, 3], "target": 7},
        "knights_knaves": {"people": ["Ann", "Bob"], "knights": ["Ann"]},
    }
    corpus = [(task, text) for text in hostile_answers() for task in answers]
    with Grader(timeout_s=DEADLINE_S) as grader:
        for key, (task, text) in enumerate(corpus):
            grader.submit(key, task, text, answers[task])
        start = time.monotonic()
        graded = finish(grader)
    assert time.monotonic() - start < 10 * DEADLINE_S
    # The graders are total, so the worker never even has to be killed: every verdict is a 0.
    wrong = [(corpus[g.key][0], corpus[g.key][1][:60], g) for g in graded if g.reward != 0.0]
    assert [g.key for g in graded] == list(range(len(corpus))) and not wrong
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["hang", "hang in C"])
def test_a_hanging_item_is_killed_and_the_rest_is_graded(unruly, text):
    unruly.submit(0, "unruly", "fine", 1)
    unruly.submit(1, "unruly", text, 1)
    unruly.submit(2, "unruly", "fine", 0)
    unruly.submit(3, "arithmetic", "<answer> 4 </answer>", 4)
    start = time.monotonic()
    first, hung, *others = finish(unruly)
    assert DEADLINE_S <= time.monotonic() - start < DEADLINE_S + 10
    assert first == Graded(0, 1.0)
    assert hung == Graded(1, None, "timed out after 2 s")
    assert others == [Graded(2, 0.0), Graded(3, 1.0)]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("abort", "the worker ended with signal 6"),
        ("exit", "the worker ended with exit code 3"),
        ("raise", "KeyError: 'lost'"),
        ("memory", "MemoryError: "),
        ("write", "PermissionError: the grading worker writes no files; a reward with process: tr"),
        ("nothing", "TypeError: expected grade of unruly to return a bool, found None"),
    ],
)
def test_a_dying_grader_costs_its_own_item_only(unruly, tmp_path, text, reason):
    answer = str(tmp_path / "written") if text == "write" else 1
    unruly.submit(0, "unruly", text, answer)
    unruly.submit(1, "unruly", "fine", 1)
    dead, alive = finish(unruly)
    assert not (tmp_path / "written").exists()
    assert dead.reward is None and dead.reason.startswith(reason)
    assert alive == Graded(1, 1.0)


def test_every_item_of_many_may_die(unruly):
    for key in range(6):
        unruly.submit(key, "unruly", "exit" if key % 2 else "fine", 1)
    assert [g.reward for g in finish(unruly)] == [1.0, None] * 3


def test_prints_of_a_grader_are_no_verdicts(unruly, capsys):
    unruly.submit(0, "unruly", "print", 0)
    unruly.submit(1, "unruly", "fine", 0)
    assert [g.reward for g in finish(unruly)] == [0.0, 0.0]
    assert capsys.readouterr().err == "true\n"


def test_what_is_printed_is_shown_up_to_a_limit_and_moves_no_deadline(unruly, capsys):
    unruly.submit(0, "unruly", "print on", 0)
    unruly.submit(1, "unruly", "print", 0)
    start = time.monotonic()
    late, fine = finish(unruly)
    assert late.reason == "timed out after 2 s" and fine.reward == 0.0
    assert time.monotonic() - start < DEADLINE_S + 10
    said = capsys.readouterr().err
    line = "\\x1b[2J again\n"  # what would clear a terminal is spelled out
    assert said.startswith(3 * line) and said.endswith("…\ntrue\n")
    assert PRINTED / 2 < len(said) < 2 * PRINTED


def test_children_of_a_killed_worker_die_with_it(unruly, tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    unruly.submit(0, "unruly", "child", str(fifo))
    assert finish(unruly)[0].reason == "timed out after 2 s"
    pid = int(os.read(reader, 100))
    os.close(reader)
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} outlived the worker that started it")


def test_the_deadline_holds_while_nobody_polls(unruly):
    """A late poll gives the verdicts that are ready and blames only the item that hangs."""
    for key, text in enumerate(["fine", "fine", "hang", "fine"]):
        unruly.submit(key, "unruly", text, 1)
    graded = unruly.poll()  # sends, and may have an answer already
    time.sleep(1.5 * DEADLINE_S)
    assert [g.reward for g in graded + finish(unruly)] == [1.0, 1.0, None, 1.0]


def test_a_worker_killed_while_idle_is_replaced(unruly):
    unruly.submit(0, "unruly", "fine", 1)
    assert finish(unruly) == [Graded(0, 1.0)]
    process = unruly._workers[0].process
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    unruly.submit(1, "unruly", "fine", 1)
    assert finish(unruly) == [Graded(1, 1.0)]


def test_libraries_load_before_the_clock_runs(unruly):
    """The first answer in LaTeX restarts the worker; what waits is graded all the same."""
    unruly.submit(0, "unruly", "fine", 1)
    early = unruly.poll()  # an idle machine answers within this call
    first = unruly._workers[0].process.pid
    for key in (1, 2):
        unruly.submit(key, "math", "\\boxed{\\frac{2}{4}}", "0.5")
    second = unruly._workers[0].process.pid
    unruly.submit(3, "unruly", "hang", 1)
    unruly.submit(4, "math", "\\boxed{2}", "3")
    graded = [g.reward for g in (*early, *finish(unruly))]
    assert graded == [1.0, 1.0, 1.0, None, 0.0] and first != second


def test_the_worker_does_not_load_torch(unruly):
    import torch  # noqa: F401  the parent has it

    unruly.submit(0, "unruly", "torch", None)
    assert finish(unruly) == [Graded(0, 0.0)]


def test_thousands_a_second():
    """A loose bound, far below what an idle core does, so that it holds on a busy one."""
    problem = next(get_task("countdown").problems("train", 0))
    text = countdown.solution(problem, random.Random(0), wrong=0.0)
    with Grader() as grader:
        for key in range(5000):
            grader.submit(key, "countdown", text, problem.answer)
        start = time.monotonic()
        assert sum(g.reward for g in finish(grader)) == 5000
        assert time.monotonic() - start < 5.0


def test_bad_input_is_refused_at_once():
    with Grader() as grader:
        with pytest.raises(ValueError, match="task: expected one of aime24, .* found 'chess'"):
            grader.submit(0, "chess", "", 1)
        with pytest.raises(TypeError, match="text: expected a str, found bytes"):
            grader.submit(0, "arithmetic", b"", 1)
        with pytest.raises(TypeError, match="JSON"):
            grader.submit(0, "arithmetic", "", {1, 2})
        assert grader.pending == 0
    with pytest.raises(RuntimeError, match="closed"):
        grader.submit(0, "arithmetic", "", 1)
    with pytest.raises(ValueError, match="timeout_s: expected a positive number, found 0"):
        Grader(timeout_s=0)
    with pytest.raises(ValueError, match="workers: expected a positive number, found 0"):
        Grader(workers=0)


def test_closing_leaves_no_process(unruly):
    pid = unruly._workers[0].process.pid
    unruly.submit(0, "unruly", "hang", 1)
    unruly.poll()
    unruly.close()
    assert unruly.pending == 0 and unruly.poll() == []
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
