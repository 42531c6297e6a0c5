"""Several grading workers: what hangs, stops or dies delays nobody else for long."""

import os
import signal
import time

import pytest
from test_grading import UNRULY, finish, outside

from spo.tasks.forms import RETRY, Hangs, form_of
from spo.tasks.grading import AGAIN, Graded, Grader
from spo.tasks.process import default_workers

DEADLINE_S = 1.0
LATE = "timed out after 1 s"


@pytest.fixture
def unruly(tmp_path):
    """A function that makes a grader with a task from outside that misbehaves on request."""
    task, made = outside(tmp_path, UNRULY, "Unruly"), []

    def make(workers: int | None = None, timeout_s: float = DEADLINE_S) -> Grader:
        made.append(Grader({"unruly": task}, timeout_s=timeout_s, workers=workers))
        return made[-1]

    yield make
    for grader in made:
        grader.close()


def test_a_form_that_hung_is_not_tried_again(unruly):
    """200 towers in a row cost two deadlines, not 200; other answers are graded."""
    grader = unruly()
    for key in range(200):
        grader.submit(key, "unruly", f"tower 9^{key}", 1)
    grader.submit(200, "unruly", "fine", 1)
    start = time.monotonic()
    graded = finish(grader)
    assert time.monotonic() - start < 4 * DEADLINE_S + 10
    reasons = [g.reason for g in graded]
    assert reasons.count(LATE) <= 2 * default_workers()
    assert set(reasons[:200]) == {LATE, AGAIN} and graded[200] == Graded(200, 1.0)


def test_one_hang_does_not_speak_for_answers_with_other_numbers(unruly):
    grader = unruly(workers=1)
    for key, text in enumerate(["tower 9^9", "slow 1", "tower 9^9"]):
        grader.submit(key, "unruly", text, 1)
    assert [g.reason for g in finish(grader)] == [LATE, None, AGAIN]


def test_hangs_are_counted_by_form():
    hangs = Hangs()
    for key in range(4):
        hangs.hung(form_of("t", f"\\boxed{{{key}}}", "1"))
        for _ in range(2):
            hangs.graded(form_of("t", f"\\boxed{{{key}0}}", "1"))
    assert not hangs.is_known(form_of("t", "\\boxed{77}", "1"))  # most of this form are fine
    assert hangs.is_known(form_of("t", "\\boxed{2}", "1"))
    assert not hangs.is_known(form_of("t", "Again: \\boxed{2}", "1"))
    hangs.hung(form_of("t", "And again: \\boxed{2}", "1"))
    assert hangs.is_known(form_of("t", "Again: \\boxed{2}", "1"))
    assert not hangs.is_known(form_of("t", "\\boxed{2}", "2"))
    for key in range(2):
        hangs.hung(form_of("t", f"\\boxed{{9^{{{key}}}}}", "1"))
    assert hangs.is_known(form_of("t", "\\boxed{8^{77}}", "5"))
    assert not hangs.is_known(form_of("other", "\\boxed{8^{77}}", "5"))


def test_one_stall_takes_no_reward_of_others():
    """Neither of the same box in another text, nor of what was graded before."""
    hangs, before = Hangs(), form_of("t", "so \\boxed{7}", "7")
    hangs.graded(before)
    hangs.hung(before)
    assert not hangs.is_known(before)
    hangs.hung(form_of("t", "so \\boxed{x}", "7"))
    assert not hangs.is_known(form_of("t", "thus \\boxed{x}", "7"))


def test_a_form_that_hung_is_tried_again_once_in_a_while():
    hangs = Hangs()
    forms = [form_of("t", f"{key} \\boxed{{{key}}}", "7") for key in range(4 * RETRY + 2)]
    hangs.hung(forms[0])
    hangs.hung(forms[1])
    known = [hangs.is_known(form) for form in forms[2:]]
    assert known == [*[True] * 2 * RETRY, False, *[True] * (2 * RETRY - 1)]
    hangs.graded(forms[2 * RETRY])
    assert not hangs.is_known(form_of("t", "\\boxed{5}", "7"))


def test_after_several_hangs_the_limit_is_what_others_need():
    hangs = Hangs(timeout_s=5.0)
    hangs.graded(form_of("t", "fine", "1"), 0.2)
    limits = []
    for key in "abcd":
        hangs.hung(form_of("t", key, "1"))
        limits.append(hangs.limit_s)
    assert limits == [5.0, 5.0, 5.0, 2.0]


def test_a_pause_of_the_worker_is_no_deadline(unruly):
    """A machine that stood still for longer has spent nothing, and the right answer counts."""
    grader = unruly(workers=1)
    grader.submit(0, "unruly", "slow", 1)
    grader.poll()
    group = grader._workers[0].process.pid
    os.killpg(group, signal.SIGSTOP)
    time.sleep(1.5 * DEADLINE_S)  # this process stands still, too
    assert grader.poll() == []
    os.killpg(group, signal.SIGCONT)
    assert finish(grader) == [Graded(0, 1.0)]


def test_the_pool_works_at_the_same_time(unruly):
    grader = unruly(workers=2, timeout_s=3.0)
    for key, text in enumerate(["hang", "fine", "hang in C", "fine"]):
        grader.submit(key, "unruly", text, 1)
    while not all(worker.sent for worker in grader._workers):  # both hang, at the same time
        assert not grader.poll(0.05)
    assert [g.reward for g in finish(grader)] == [None, 1.0, None, 1.0]


def test_verdicts_keep_their_order_over_workers(unruly):
    grader = unruly(workers=3)
    for key in range(300):
        grader.submit(key, "unruly", "exit" if key % 97 == 5 else "fine", key % 2)
    found = finish(grader)
    assert [g.key for g in found] == list(range(300))
    assert [g.reward for g in found] == [
        None if key % 97 == 5 else float(key % 2) for key in range(300)
    ]


def test_closing_ends_all_workers(unruly):
    grader = unruly()
    pids = [worker.process.pid for worker in grader._workers]
    assert len(pids) == default_workers() >= 2
    grader.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


ESCAPES = """
import os, signal, time
from dataclasses import dataclass

@dataclass(frozen=True)
class Escapes:
    def problems(self, split, seed):
        yield from ()

    def grade(self, text, answer):
        if text == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if text == "fork":
            os.fork()  # both return
        if text == "fork and exit" and os.fork() > 0:
            os._exit(3)
        if "exit" in text:
            time.sleep(1000)  # with the pipe open
        if text == "close input":
            os.close(0)
        if text.startswith("close all"):
            os.closerange(0, 100)
        if text == "close all and sleep":
            time.sleep(1000)
        if text.startswith("write"):
            for pipe in range(3, 20):
                try:
                    os.write(pipe, text.removeprefix("write ").encode() + b"\\n")
                except OSError:
                    pass
        return answer == 1
"""
END_3 = "the worker ended with exit code 3"
NONSENSE = "the worker said what is no verdict"


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        ("fork", [None]),
        ("close input", [None]),
        ("stop", [LATE]),
        ("fork and exit", [END_3]),
        ("close all", ["the worker ended with exit code 1"]),
        ("close all and sleep", ["the worker closed its pipe"]),
        ("write not JSON", [NONSENSE]),
        ("write 7", [NONSENSE]),
        ("write [[", [NONSENSE]),
        ("write true", [NONSENSE]),  # else the item after it would have its verdict
    ],
)
def test_what_a_grader_does_to_its_process_ends_no_run(tmp_path, text, reasons):
    task = outside(tmp_path, ESCAPES, "Escapes")
    with Grader({"escapes": task}, timeout_s=DEADLINE_S, workers=1) as grader:
        grader.submit(0, "escapes", text, 1)
        assert [g.reason for g in finish(grader)] == reasons
        for key in (1, 2):
            grader.submit(key, "escapes", "fine", 1)
            assert finish(grader) == [Graded(key, 1.0)]


def test_a_worker_killed_while_it_starts_is_replaced(unruly):
    grader = unruly(workers=2)
    for worker in grader._workers:
        grader._replace(worker)
        os.killpg(grader._workers[0].process.pid, signal.SIGKILL)
    for key in range(8):
        grader.submit(key, "unruly", "fine", 1)
    assert [g.reward for g in finish(grader)] == [1.0] * 8


def test_workers_that_never_start_end_the_run_and_say_how(unruly, monkeypatch):
    grader = unruly(workers=1)
    new = grader._new

    def killed():
        worker = new()
        os.killpg(worker.process.pid, signal.SIGKILL)
        return worker

    monkeypatch.setattr(grader, "_new", killed)
    grader._replace(grader._workers[0])
    grader.submit(0, "unruly", "fine", 1)
    with pytest.raises(RuntimeError, match="did not start; it said: nothing; .* with signal 9"):
        finish(grader)
