"""Several grading workers: what hangs, stops or dies delays nobody else for long."""

import os
import signal
import time

import pytest
from test_grading import UNRULY, finish, outside

from spo.tasks.forms import Hangs, form_of
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
    assert hangs.is_known(form_of("t", "Again: \\boxed{2}", "1"))
    assert not hangs.is_known(form_of("t", "\\boxed{2}", "2"))
    for key in range(2):
        hangs.hung(form_of("t", f"\\boxed{{9^{{{key}}}}}", "1"))
    assert hangs.is_known(form_of("t", "\\boxed{8^{77}}", "5"))
    assert not hangs.is_known(form_of("other", "\\boxed{8^{77}}", "5"))


def test_after_several_hangs_the_limit_is_what_others_need():
    hangs = Hangs(timeout_s=5.0)
    hangs.graded(form_of("t", "fine", "1"), 0.2)
    limits = []
    for key in "abcd":
        hangs.hung(form_of("t", key, "1"))
        limits.append(hangs.limit_s)
    assert limits == [5.0, 5.0, 5.0, 2.0]


def test_a_pause_of_the_worker_is_no_deadline(unruly):
    """Stopped for longer than the deadline it has spent nothing, and the right answer counts."""
    grader = unruly(workers=1)
    grader.submit(0, "unruly", "slow", 1)
    grader.poll()
    group = grader._workers[0].process.pid
    os.killpg(group, signal.SIGSTOP)
    end = time.monotonic() + 1.5 * DEADLINE_S
    while time.monotonic() < end:
        assert grader.poll(0.1) == []
    os.killpg(group, signal.SIGCONT)
    assert finish(grader) == [Graded(0, 1.0)]


def test_the_pool_works_at_the_same_time(unruly):
    grader = unruly(workers=2, timeout_s=3.0)
    for key, text in enumerate(["hang", "fine", "hang in C", "fine"]):
        grader.submit(key, "unruly", text, 1)
    start = time.monotonic()
    assert [g.reward for g in finish(grader)] == [None, 1.0, None, 1.0]
    assert 3.0 <= time.monotonic() - start < 6.0  # not one after the other


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
