"""Pass@1 by hand, and shorter limits read off one rollout against rollouts of their own."""

import dataclasses
from itertools import combinations, islice

import pytest

from spo.config.policy import EMBEDDED, PolicyConfig
from spo.engines.hf import HFEngine
from spo.grow.evaluate import accuracies, majority, pass_at
from spo.grow.rollout import RolloutOptions
from spo.models.tokenizer import load_tokenizer
from spo.records import LENGTH, STOP, Completion, Prompt, Sampling
from spo.tasks import prompts
from spo.tasks.problem import tag

LIMITS = (8, 14, 20, 40)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PolicyConfig())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_shorter_limit_needs_no_rollout_of_its_own(tokenizer, grader, temperature):
    problems = list(islice(prompts("arithmetic", "test", 0, tokenizer), 24))
    engine = HFEngine(str(EMBEDDED), max_num_seqs=64, max_model_len=96)
    options = RolloutOptions(Sampling(3, temperature, (tokenizer.eos_token_id,)))
    samples = 1 if temperature == 0 else 3

    def measure(limits):
        return accuracies(problems, engine, grader, tokenizer.decode, options, limits, samples)

    together = measure(LIMITS)
    assert together == [measure((limit,))[0] for limit in LIMITS]
    engine.close()
    solved = [found.pass_at_1 for found in together]
    assert solved == sorted(solved) and solved[0] < solved[-1]
    cut = [found.truncated for found in together]
    assert cut == sorted(cut, reverse=True) and cut[0] > cut[-1]


class Scripted:
    """An engine that answers with fixed responses."""

    max_model_len, block_size, version, room = 100, 1, 0, 0

    def __init__(self, responses):
        self.responses, self.done = responses, []

    def submit(self, request):
        for i in range(request.n):
            ids, finish = self.responses.pop(0)
            self.done.append(Completion(request.key, i, ids, (-1.0,) * len(ids), finish, 0, 0))

    def poll(self):
        done, self.done = self.done, []
        return done

    def counters(self):
        return {}


def test_by_hand(tokenizer, grader):
    problems = list(islice(prompts("arithmetic", "test", 0, tokenizer), 3))
    texts = {10 + i: tag(str(p.answer)) for i, p in enumerate(problems)}  # token -> right answer
    responses = [
        *[((10, 1), STOP), ((10, 5, 5, 5), LENGTH)],  # right; its answer came, its end did not
        *[((5, 11, 1), STOP), ((5, 11, 1), STOP)],  # right twice, one token longer
        *[((10, 1), STOP), ((5, 5, 5, 1), STOP)],  # another problem's answer, none at all
    ]
    options = RolloutOptions(Sampling(0, 0.5, (1,)), truncated="penalty")

    def decode(ids):
        return " ".join(texts.get(i, "") for i in ids)

    def measured(prompts, *limits):
        engine = Scripted(list(responses))
        return accuracies(prompts, engine, grader, decode, options, limits, samples=2)

    (unclosed,) = measured([dataclasses.replace(p, opening="<think>") for p in problems], 4)
    assert unclosed.pass_at_1 == 0  # the prompt has opened what no response closes
    short, whole = measured(problems, 2, 4)
    # per problem: 1/2, 1, 0 and, cut after two tokens, 1/2, 0, 0
    assert (whole.pass_at_1, whole.stderr) == pytest.approx((0.5, 0.5 / 3**0.5))
    assert (short.pass_at_1, short.stderr) == pytest.approx((1 / 6, 1 / 6))
    assert (whole.truncated, short.truncated) == pytest.approx((1 / 6, 4 / 6))
    assert (whole.mean_tokens, short.mean_tokens) == pytest.approx((18 / 6, 12 / 6))
    assert (whole.problems, whole.samples, whole.temperature) == (3, 2, 0.5)


def test_problems_that_do_not_fit_are_left_out_and_counted(grader, tiny_model):
    engine = HFEngine(tiny_model, max_num_seqs=8)
    problems = [Prompt(ids, 7, "arithmetic") for ids in ((5, 9), (5,) * 110, (5, 9, 3))]
    options = RolloutOptions(Sampling(3))
    with pytest.warns(UserWarning, match="exceed the context of 128 with"):
        short, long = accuracies(problems, engine, grader, str, options, (8, 20))
    assert (short.too_long, short.problems, long.problems) == (1, 2, 2)
    (all_fit,) = accuracies(problems, engine, grader, str, options, (8,))
    assert (all_fit.too_long, all_fit.problems) == (0, 3)


@pytest.mark.parametrize(
    ("n", "right", "k", "share"),
    [(5, 2, 1, 0.4), (5, 2, 2, 0.7), (5, 2, 4, 1.0), (4, 0, 2, 0.0), (3, 3, 3, 1.0)],
)
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one(n, right, k, share):
    subsets = list(combinations([i < right for i in range(n)], k))
    assert pass_at(n, right, k) == pytest.approx(share)
    assert share == pytest.approx(sum(map(any, subsets)) / len(subsets))


@pytest.mark.parametrize(
    ("samples", "score"),
    [
        ([("7", 1.0), ("8", 0.0), ("7", 1.0)], 1.0),
        ([("7", 1.0), ("8", 0.0), ("8", 0.0)], 0.0),
        ([("7", 1.0), (None, 0.0), (None, 0.0)], 1.0),  # those without an answer do not vote
        ([("7", 1.0), ("8", 0.0)], 0.5),  # a tie is shared, whatever the order
        ([("8", 0.0), ("9", 0.0), ("7", 1.0)], 1 / 3),
        ([("7", 1.0), ("7", 0.0), ("8", 0.0)], 0.5),  # the grader tells equal texts apart
        ([(None, 0.0)], 0.0),
    ],
)
def test_majority_votes_by_hand(samples, score):
    assert majority(samples) == pytest.approx(score)


def test_pass_at_k_and_votes_of_a_rollout_by_hand(tokenizer, grader):
    problems = list(islice(prompts("arithmetic", "test", 0, tokenizer), 2))
    right = [tag(str(p.answer)) for p in problems]
    wrong = [tag(str((p.answer + 1) % 20)) for p in problems]
    texts = dict(
        enumerate([*right, *wrong, "none"], 10)
    )  # 10, 11 right; 12, 13 wrong; 14 no answer
    responses = [
        *[((10, 1), STOP), ((12, 1), STOP), ((5, 10, 1), STOP), ((14, 1), STOP), ((10,), LENGTH)],
        *[((13, 1), STOP), ((13, 1), STOP), ((11, 1), STOP), ((5, 11, 1), STOP), ((14, 1), STOP)],
    ]

    def decode(ids):
        return " ".join(texts.get(i, "") for i in ids)

    options = RolloutOptions(Sampling(0, 0.5, (1,)))

    def measured(votes):
        engine = Scripted(list(responses))
        return accuracies(problems, engine, grader, decode, options, (2, 3), 5, votes)

    short, whole = measured(votes=True)
    assert whole.pass_at == pytest.approx({1: 0.4, 2: 0.7, 4: 1.0, 5: 1.0})  # 2 of 5 right, twice
    assert whole.pass_at[1] == whole.pass_at_1
    assert short.pass_at == pytest.approx({1: 0.2, 2: 0.4, 4: 0.8, 5: 1.0})  # 1 of 5, twice
    assert set(whole.pass_at_stderr.values()) == {0.0}
    # 7 wins by two votes; two against two. Cut after two tokens: a tie; two wrong against one.
    assert (whole.majority, short.majority) == pytest.approx(((1 + 0.5) / 2, (0.5 + 0) / 2))
    assert whole.majority_stderr == pytest.approx(0.25)
    assert list(whole.figures("sampled")) == [
        *("sampled", "sampled_stderr", "pass_at_2", "pass_at_2_stderr"),
        *("pass_at_4", "pass_at_4_stderr", "pass_at_5", "pass_at_5_stderr"),
        *("majority", "majority_stderr"),
    ]
    alone = measured(votes=False)[1]
    assert alone.majority is None and alone.pass_at == whole.pass_at
