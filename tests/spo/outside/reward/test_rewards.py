"""Rewards from outside: every signature, in the worker and in this process, and what goes wrong."""

import dataclasses
import threading
import time
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from sentences import one_sentence

from spo.config.recipe import as_tree, load_recipe, save_recipe
from spo.loop import train
from spo.reward import reward_given, reward_of
from spo.signatures import Response
from spo.tasks.grading import Grader

FOLDER = Path(__file__).parent
FILE = f"{FOLDER / 'rewards.py'}"


def config(reward, *more):
    return load_recipe(None, [f"reward={yaml.safe_dump(reward, default_flow_style=True)}", *more])


def judged(reward, responses, **settings):
    """(reward, reason) of each response, by a grader as a run has it."""
    found = config({"terms": reward} | settings).reward
    with Grader(reward=found, timeout_s=found.timeout_s) as grader:
        for key, response in enumerate(responses):
            grader.submit_reward(key, response)
        done, end = [], time.monotonic() + 60
        while grader.pending:
            assert time.monotonic() < end
            done += grader.poll(0.1)
    assert sorted(g.key for g in done) == list(range(len(responses)))
    return sorted(done, key=lambda g: g.key)


ROW = {"data_source": "mine", "level": 2, "kind": "mine"}
HI = Response("say hi twice", "hi hi", "hi", ROW, [5, 6, 1])
CUT = Response("say hi twice", "oh", "hi", ROW | {"kind": "yours"}, [5] * 10, True)
CALLS = {  # function -> what it says of HI and of CUT
    "share": (1 / 3, 0.0),
    "shorter": (-0.3, -2.0),
    "trl": (1.0, 0.0),
    "trl_without_prompts": (5.0, 2.0),
    "trl_of_some": (1.0, None),
    "compute_score": (0.0, 0.0),
    "compute_scores": (0.0, 0.0),
    "judge": (0.5, 0.2),
    "judges": (0.5, 0.2),
    "of_columns": (2.0, 2.0),
}


@pytest.mark.parametrize("process", ["worker", "trainer"])
def test_every_signature_is_called_as_its_trainer_calls_it(process):
    cut = "sampling.truncated=reward"
    terms = [f"{FILE}:{name}" for name in CALLS if name != "trl_of_some"]
    found = config({"terms": terms, "process": process}, cut).reward
    with Grader(reward=found) as grader:
        for key, response in enumerate((HI, CUT)):
            grader.submit_reward(key, response)
        done = []
        while grader.pending:
            done += grader.poll(0.1)
    for graded, column in zip(sorted(done, key=lambda g: g.key), (0, 1), strict=True):
        expected = [CALLS[name][column] for name in CALLS if name != "trl_of_some"]
        assert list(graded.parts) == pytest.approx(expected)
        assert graded.reward == pytest.approx(sum(expected))


def test_weights_options_and_terms_that_do_not_apply():
    reward = reward_of(
        config(
            [
                {"function": f"{FILE}:trl_of_some", "weight": 3},
                {"function": f"{FILE}:shorter", "weight": 0.5, "options": {"most": 5}},
                {"rule": "exact", "weight": -1},
            ],
            "sampling.truncated=reward",
        ).reward
    )
    first, second = reward(HI), reward(CUT)
    assert first.reward == pytest.approx(3 - 0.3 - 0) and first.parts == (1.0, -0.6, 0.0)
    assert second.reward == pytest.approx(-1.5) and second.parts == (None, -3.0, 0.0)
    alone = reward_of(config(f"{FILE}:trl_of_some").reward)(CUT)
    assert alone.reward is None
    assert alone.reason == "no reward function applies to it: trl_of_some returned None"


def test_chats_are_given_as_trl_gives_them():
    row = ROW | {"prompt": [{"role": "user", "content": "say hi"}]}
    (graded,) = judged([f"{FILE}:trl_chat"], [Response("<user>say hi", "hello", None, row)])
    assert graded.reward == 5.0


def test_verl_s_extra_info_is_a_dict_even_where_the_data_have_none():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        return extra_info.get("bonus", 2.0)

    reward = reward_of(given(compute_score))
    assert [reward(one).reward for one in (HI, CUT)] == [2.0, 2.0]
    columns = {"extra_info": {"bonus": 3.0}}
    assert reward(Response("p", "r", None, columns)).reward == 3.0


@pytest.mark.parametrize("process", ["worker", "trainer"])
def test_a_function_that_fails_costs_its_own_response_only(process):
    texts = ["fine", "raise", "nan", "text", "none", "hang", "fine"]
    responses = [Response("p", text, None) for text in texts]
    found = judged([f"{FILE}:unruly"], responses, process=process, timeout_s=1.0)
    assert [g.reward for g in found] == [0.5, None, None, None, None, None, 0.5]
    reasons = [g.reason for g in found]
    assert reasons[1] == "KeyError: 'lost'" and "rewards.py" in found[1].trace
    assert "expected a number of unruly that is finite in float32, found nan" in reasons[2]
    assert "found 'much'" in reasons[3] and "applies" in reasons[4] and "timed out" in reasons[5]


NUMBERS = [1, 0.25, True, numpy.float32(0.5), numpy.int64(2), numpy.bool_(True), torch.tensor(0.5)]


@pytest.mark.parametrize("value", [*NUMBERS, {"score": 0.5}, {"score": None}, -3.4e38])
def test_numbers_of_any_kind_are_rewards(value):
    score = value["score"] if isinstance(value, dict) else value
    found = reward_of(given(lambda response: value))(HI)
    assert found.parts == (score,) and found.reward == (None if score is None else float(score))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("1.0", "finite in float32, found '1.0'"),
        (numpy.array(["1.0"])[0], "finite in float32, found"),
        (1e39, "finite in float32, found 1e+39"),
        (-float("inf"), "finite in float32, found -inf"),
        (
            {"acc": 1.0, "sc": 0.5},
            "'score' in the dict that <lambda> returns, found acc, sc",
        ),
        ({}, "'score' in the dict that <lambda> returns, found nothing"),
    ],
)
def test_what_is_no_reward_is_named(value, words):
    found = reward_of(given(lambda response: value))(HI)
    assert found.reward is None and found.reason is not None and words in found.reason


def test_a_sum_that_float32_cannot_hold_is_no_reward():
    config = given(lambda response: 3e38)
    twice = dataclasses.replace(config, terms=config.terms * 2)
    found = reward_of(twice)(HI)
    assert found.reward is None and found.parts == (3e38, 3e38)
    assert found.reason == "expected a weighted sum that is finite in float32, found 6e+38"


@pytest.mark.parametrize("shape", [lambda f: {f: 0.5}, lambda f: [(f, 0.5)], lambda f: (f, 0.5)])
def test_weights_of_a_python_caller_have_one_form(shape):
    with one_sentence(["expected {function: …, weight: 0.5} for a function with a weight, found"]):
        load_recipe(None, reward=reward_given(shape(lambda response: 1.0)))


def test_a_batch_that_fails_is_asked_again_one_by_one():
    asked = []

    def together(completions, **kwargs):
        asked.append(len(completions))
        if "bad" in completions:
            raise RuntimeError("bad")
        return [1.0] * len(completions)

    with Grader(reward=given(together, process="trainer", batch=4, parallel=1)) as grader:
        for key in range(8):
            grader.submit_reward(key, Response("p", "bad" if key == 5 else "good", None))
        done = []
        while grader.pending:
            done += grader.poll(0.1)
    assert asked == [4, 4, 1, 1, 1, 1]
    assert sorted(g.key for g in done if g.reward is None) == [5]


def given(function, **settings):
    from spo import named

    name = named.keep(function, "of-this-test")
    return config({"terms": [{"function": name}]} | settings).reward


@pytest.mark.parametrize("process", ["worker", "trainer"])
def test_a_function_of_this_program_is_called(process):
    offset = 0.25
    with Grader(reward=given(lambda response: len(response) + offset, process=process)) as grader:
        grader.submit_reward(0, Response("p", "four", None))
        while not (done := grader.poll(0.1)):
            pass
    assert done[0].reward == 4.25


def test_a_traceback_of_the_worker_shows_the_lines_of_this_program():
    def helper(word):
        raise LookupError(word)  # there

    def calls(response):
        return [helper(word) for word in response.split()]  # here

    with Grader(reward=given(calls)) as grader:
        grader.submit_reward(0, Response("p", "four", None))
        while not (done := grader.poll(0.1)):
            pass
    assert done[0].reason == "LookupError: four"
    assert f'File "{__file__}", line' in done[0].trace and ", in calls" in done[0].trace
    assert "[helper(word) for word in response.split()]  # here" in done[0].trace
    assert "raise LookupError(word)  # there" in done[0].trace


def test_what_a_function_imports_when_it_is_called_may_be_heavy():
    def heavy(response):
        import torch

        return float(torch.ones(len(response)).sum())

    with Grader(reward=given(heavy), timeout_s=60) as grader:
        grader.submit_reward(0, Response("p", "four", None))
        while not (done := grader.poll(0.1)):
            pass
    assert (done[0].reward, done[0].reason) == (4.0, None)


def test_what_cannot_be_sent_to_the_worker_says_where_it_can_run():
    lock = threading.Lock()

    def holds(response):
        with lock:
            return 1.0

    with one_sentence(["holds cannot be sent to the grading worker", "reward.process=trainer"]):
        Grader(reward=given(holds))


BAD = {
    "3": ["reward: expected", "found 3"],
    "[]": ["reward.terms", "at least one"],
    "nothing": ["reward.function", "module:Name"],
    "boxed": ["reward.terms.0: boxed is a rule: write {rule: boxed}"],
    "./none.py:f": ["reward.function", "no file"],
    f"{FILE}:none": ["reward.function", "has no function none"],
    f"{FILE}:NOT_A_FUNCTION": ["to be a function, found 3"],
    f"{FILE}:positional": ["can be given by name", "response cannot"],
    f"{FILE}:any_positional": ["can be given by name", "*everything cannot"],
    f"{{'{FILE}:share': 0.5}}": ["expected {function: …, weight: 0.5}", "share': 0.5}"],
    f"[['{FILE}:share', 0.5]]": ["reward.terms: expected {function: …, weight: 0.5}", "0.5]"],
    f"[{{'{FILE}:share': 0.5}}]": ["expected {function: …, weight: 0.5}", "share': 0.5}"],
    f"['{FILE}:share', 0.5]": ["expected {function: …, weight: 0.5}", "0.5]"],
    "{rule: none}": ["reward.rule", "boxed, number"],
    "{rule: boxed, function: a:b}": ["either function or rule"],
    "{weight: 2}": ["either function or rule, found neither"],
    "{rule: overlong}": ["overlong", "max_tokens"],
    "{rule: overlong, options: {max_tokens: 4, buffer_tokens: 9}}": ["at most max_tokens=4"],
    "{rule: format, options: {pattern: (}}": ["not a regular expression"],
    "{rule: exact, weight: .nan}": ["weight"],
    "{rule: exact, batch: 4}": ["reward.batch: expected 1 in the worker"],
    "{rule: overlong, options: {max_tokens: 9, buffer_tokens: 4}}": [
        "truncated=reward, found zero"
    ],
    f"{{function: '{FILE}:shorter', options: {{least: 3}}}}": ["has no parameter least"],
}


@pytest.mark.parametrize("text", BAD)
def test_a_bad_reward_is_one_sentence(text):
    with one_sentence(BAD[text]):
        load_recipe(None, [f"reward={text}"])


def test_a_function_of_another_process_is_named_when_it_is_asked():
    found = load_recipe(None, ["reward=python:lost#123"]).reward  # a report needs no function
    with one_sentence(["lost#123 was given in Python", "give the same one again"]):
        Grader(reward=found)


def test_cut_responses_need_somebody_to_ask():
    with one_sentence(["sampling.truncated=reward: expected a reward"]):
        load_recipe(None, ["sampling.truncated=reward"])


def test_a_column_that_the_data_lack_is_named():
    reward = reward_of(config(f"{FILE}:of_columns").reward)
    reward.check({"level": 1}, has_answer=True)
    with one_sentence(["of_columns needs level", "response", "columns: kind, other"]):
        reward.check({"kind": 1, "other": 2}, has_answer=True)


def optional(response, answer=7):
    return float(answer)


@pytest.mark.parametrize(
    ("reward", "parameter"),
    [
        *(({"rule": rule}, "answer") for rule in ("number", "boxed", "exact", "answer")),
        (f"{FILE}:share", "answer"),
        (f"{FILE}:trl", "answer"),
        (f"{FILE}:compute_score", "ground_truth"),
        (f"{FILE}:compute_scores", "ground_truths"),
    ],
)
def test_data_without_an_answer_are_refused_where_it_is_needed(reward, parameter):
    found = reward_of(config(reward).reward)
    found.check({"level": 2}, has_answer=True)
    with one_sentence([f"needs {parameter}; besides", "columns: level", "data.columns.answer"]):
        found.check({"level": 2}, has_answer=False)
    silent = dataclasses.replace(HI, has_answer=False)  # of a mixture's other data set
    assert parameter in str(found(silent).reason)


def test_a_default_stands_for_an_answer_that_the_data_lack():
    found = reward_of(given(optional))
    found.check({}, has_answer=False)
    assert found(Response("p", "r", None, has_answer=False)).reward == 7
    assert found(Response("p", "r", 3)).reward == 3
    columns = {"solution": 5, "answer": 6}  # a column of that name is one
    assert found(Response("p", "r", None, columns, has_answer=False)).reward == 6


def test_a_saved_recipe_names_the_file_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER)
    recipe = load_recipe(None, ["reward=./rewards.py:share"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    assert as_tree(recipe)["reward"]["terms"][0]["function"] == f"{FILE}:share"


def test_a_run_trains_on_it_and_is_evaluated_by_the_tasks_own_test(tmp_path):
    """Rewards for length alone: Pass@1 stays that of the task, responses that are cut are asked."""
    recipe = config(
        [{"function": f"{FILE}:shorter", "weight": 2.0}, f"{FILE}:share"],
        "engine={name: hf, max_num_seqs: 32, max_model_len: 96}",
        "shape={kind: star, group_size: 4}",
        "sampling={max_new_tokens: 24, truncated: reward}",
        "train={iterations: 1, prompts: 4, minibatches: 1}",
        "eval.problems=8",
        f"out={tmp_path}",
    )
    start, line, end = train(recipe)
    assert 0 <= start["greedy"] <= 1 and start["problems"] == 8
    assert -3.4 <= line["reward_shorter"] < 0 and 0 < line["reward_share"] <= 1
    assert line["invalid_gradings"] == 0
    from spo import Forest

    forest = Forest.load(tmp_path / "forest-first.safetensors")
    leaves = forest.is_leaf
    sizes = forest.cu_tokens.diff()[leaves]
    cut = (forest.finish[leaves] == 2).float()
    low, high = 2 * (-sizes / 10 - cut), 2 * (-sizes / 10 - cut) + 1
    assert (forest.rewards[leaves] >= low - 1e-5).all()
    assert (forest.rewards[leaves] <= high + 1e-5).all()
