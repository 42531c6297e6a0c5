"""The answers that tasks find in responses, for majority votes; and the worker that finds them."""

import pytest
from test_grading import finish, hostile_answers, outside

from spo.tasks import get_task
from spo.tasks.grading import Grader

FOUND = [
    ("arithmetic", "<answer> 07 </answer>", "7"),
    ("arithmetic", "<answer> seven </answer>", None),
    ("countdown", "<answer> ( 5 - 2 ) * 7 </answer>", "(5-2)*7"),
    ("countdown", "<answer> </answer>", None),
    ("knights_knaves", "<answer> Bob and ann </answer>", "ann bob"),
    ("knights_knaves", "<answer> Ann is a knave, Bob is a knight </answer>", "bob"),
    ("knights_knaves", "<answer> Ann is a knave </answer>", "none"),
    ("knights_knaves", "<answer> none </answer>", "none"),
    ("knights_knaves", "Ann", None),
    ("point24", r"\boxed{24 = \frac{8}{3 - 8 / 3}}", "((8)/(3-8/3))"),
    ("point24", "nothing", None),
    ("gsm8k", "#### 10\nso\n#### $1,000.0", "1000"),
    ("gsm8k", "1000", None),
    ("gsm8k", "<think> #### 5", None),
    ("math", r"\boxed{\frac12}", "1/2"),
    ("math", r"\boxed{0.5}", "1/2"),
    ("math", r"\boxed{50\%}", "50%"),
    ("math", r"\boxed{x + 1} so \boxed{x+1}", "x+1"),
    ("math", r"\boxed{}", None),
    ("aime24", r"\boxed{m + n = 073}", "73"),
    ("aime24", r"\boxed{m}", None),
]


@pytest.mark.parametrize(("task", "text", "answer"), FOUND)
def test_answers_are_found_and_equal_ones_are_equal_texts(task, text, answer):
    assert get_task(task).answer(text) == answer


def test_the_worker_finds_them_also_in_hostile_text():
    asked = [(task, text) for task, text, _ in FOUND if task != "math"]
    texts = [(name, text) for text in hostile_answers() for name in ("arithmetic", "countdown")]
    with Grader({name: get_task(name) for name, _ in asked}) as grader:
        found = grader.answers([*asked, *texts])
        assert found[: len(asked)] == [answer for task, _, answer in FOUND if task != "math"]
        assert len(found) == len(asked) + len(texts)
        grader.submit(9, "arithmetic", "<answer> 7 </answer>", 7)
        with pytest.raises(RuntimeError, match="no item in the grader, found 1"):
            grader.answers(asked)
        assert [(one.key, one.reward) for one in finish(grader)] == [(9, 1.0)]


ODD = """
import time
from dataclasses import dataclass

@dataclass(frozen=True)
class Odd:
    def problems(self, split, seed):
        yield from ()

    def grade(self, text, answer):
        return text == answer

    def answer(self, text):
        if text == "hang":
            time.sleep(1000)
        return {"raise": lambda: 1 / 0, "number": lambda: 7}.get(text, lambda: text or None)()
"""


def test_an_answer_that_fails_does_not_vote_and_many_stop_the_run(tmp_path):
    with Grader({"odd": outside(tmp_path, ODD, "Odd")}, timeout_s=1.0) as grader:
        texts = ["a", "hang", "raise", "", "b", "c", "number"]
        found = grader.answers([("odd", text) for text in texts])
        assert found == ["a", None, None, None, "b", "c", None]
        with pytest.raises(RuntimeError, match="failed on 2 of 3 responses: ZeroDivisionError"):
            grader.answers([("odd", text) for text in ("raise", "number", "a")])
        assert grader.answers([]) == []
        grader.submit(1, "odd", "a", "a")
        assert [one.reward for one in finish(grader)] == [1.0]
