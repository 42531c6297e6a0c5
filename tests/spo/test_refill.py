"""Dynamic sampling and the curriculum: exactly which prompts train, what they cost, resuming."""

import dataclasses
import json
from itertools import product

import pytest
import torch
from forests import stars
from sampling import canonical
from sentences import one_sentence
from solved import BROKEN, SOLVED, chosen, settings
from test_train import forest_bytes, weights

from spo.config.recipe import load_recipe
from spo.grow.curriculum import Curriculum, key_of, varies
from spo.grow.refill import refill
from spo.grow.stats import RolloutStats
from spo.learn.checkpoint import latest_checkpoint, load_state
from spo.loop import train
from spo.plan import describe
from spo.records import Forest, Prompt, select

BOTH = ["train.refill=100000", "data.difficulty=0.3"]


def run(folder, out, *more, resume=False):
    """The lines of the iterations, and the forest of each."""
    forests = []

    def keep(line):
        if line["stage"] == "train":
            forests.append(Forest.load(out / "forest-last.safetensors"))

    recipe = load_recipe(None, [*settings(folder), f"out={out}", *more])
    lines = train(recipe, resume=resume, report=keep)
    return [line for line in lines if line["stage"] == "train"], forests


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("refill")


@pytest.fixture(scope="module")
def whole(folder):
    """A run of four iterations with both settings: its lines and forests."""
    return run(folder, folder / "whole", *BOTH)


def test_the_first_prompts_that_vary_train_and_solved_ones_are_drawn_less(folder, whole):
    lines, forests = whole
    expected = chosen([*settings(folder), *BOTH])
    for line, forest, (prompts, refilled, _, passed, _) in zip(
        lines, forests, expected, strict=True
    ):
        assert list(forest.prompts) == prompts and varies(forest).all()
        assert (line["refilled"], line["drawn_less"]) == (refilled, passed)
        assert line["refill_tokens"] > 0 and line["grad_norm"] > 0
    assert sum(passed for *_, passed, _ in expected) > 0
    state = load_state(latest_checkpoint(folder / "whole"))
    assert state.prompt_cursor == sum(taken + passed for *_, taken, passed, _ in expected)
    assert state.zero_variance == expected[-1][-1] and len(state.zero_variance) == SOLVED
    drawn = {prompt.answer for prompts, *_ in expected for prompt in prompts}
    assert drawn == set(range(SOLVED, BROKEN))
    assert sum(line["dropped_prompts"] for line in lines) > 0  # these are replaced too


def test_a_run_with_both_resumes_bit_for_bit(folder, whole, tmp_path):
    run(folder, tmp_path, *BOTH, "train.iterations=2")
    lines, forests = run(folder, tmp_path, *BOTH, resume=True)
    assert all(a == b for a, b in zip(forests, whole[1][2:], strict=True))
    assert weights(tmp_path) == weights(folder / "whole")
    assert forest_bytes(tmp_path) == forest_bytes(folder / "whole")
    states = [load_state(latest_checkpoint(out)) for out in (tmp_path, folder / "whole")]
    assert states[0] == dataclasses.replace(states[1], seconds=states[0].seconds)
    timed = {key for key in lines[0] if key.startswith("time_") or "_per_s" in key} | {"seconds"}
    for mine, theirs in zip(lines, whole[0][2:], strict=True):
        assert mine.keys() == theirs.keys()
        assert all(mine[key] == theirs[key] for key in mine.keys() - timed)


def test_no_wave_begins_once_the_limit_is_reached(folder, whole, tmp_path):
    """One wave of two, of which one varies; the first tree that does not keeps the last place."""
    (plain,), (before,) = run(folder, tmp_path / "plain", "train.iterations=1")
    (line,), (forest,) = run(folder, tmp_path / "one", "train.iterations=1", "train.refill=1")
    kept = varies(before)
    first, second, third, _ = whole[1][0].prompts
    assert select(before, kept).prompts == (first, second)
    assert forest.prompts == (first, second, third, select(before, ~kept).prompts[0])
    assert line["refilled"] == 1 and line.keys() == plain.keys() | {"refilled", "refill_tokens"}
    own = [canonical(select(f, torch.tensor(rows))) for f, rows in
           ((forest, [True, True, False, False]), (before, kept.tolist()))]  # fmt: skip
    assert own[0] == own[1]
    state = load_state(latest_checkpoint(tmp_path / "one"))
    assert (state.prompt_cursor, state.zero_variance) == (6, [])
    assert state.generated_tokens == before.num_generated + line["refill_tokens"]


VARIES, SAME = [((4,), 1.0), ((5,), 0.0)], [((4,), 1.0), ((5,), 1.0)]


def grown(rows):
    """The trees of (prompt, whether it varies) rows, of one token per response."""
    forest = stars(*(VARIES if varied else SAME for _, varied in rows))
    prompts = tuple(Prompt((index,), index, "rows") for index, _ in rows)
    return dataclasses.replace(forest, prompts=prompts), [
        RolloutStats(trees=len(rows), generated_tokens=2 * len(rows))
    ]


def dealt(rows):
    """`refill`'s waves, from these rows; what each has asked for."""
    asked, left = [], list(rows)

    def more(count):
        asked.append(count)
        wave, left[:count] = left[:count], []
        return grown(wave) if wave else None

    return more, asked


def test_what_varies_is_what_comes_first_in_the_order():
    """Of every outcome of seven prompts, however the waves fall."""
    for outcome in product([False, True], repeat=7):
        rows = list(enumerate(outcome))
        more, asked = dealt(rows[3:])
        forest, (every, costs), figures = refill(grown(rows[:3]), more, 3, 10**9)
        varied = [i for i, varied in rows if varied][:3]
        taken = varied[-1] + 1 if len(varied) == 3 else 7
        taken = max(taken, 3)
        others = [i for i in range(taken) if i not in varied]
        expected = [*varied, *others][:3]
        assert [p.answer for p in forest.prompts] == expected
        assert [p.answer for p in every.prompts] == list(range(taken))
        assert figures["refilled"] == sum(i >= 3 for i in expected)
        assert figures["refill_tokens"] == 2 * (taken - 3)
        assert sum(cost.trees for cost in costs) == taken and max(asked, default=0) <= 3


def test_an_iteration_that_lost_prompts_is_filled_and_prompts_that_cost_nothing_end_it():
    rows = list(enumerate([True, False, False, False, True]))
    more, asked = dealt(rows[1:])
    forest, _, figures = refill(grown(rows[:1]), more, 3, 4)  # two of its three were dropped
    assert asked == [2] and [p.answer for p in forest.prompts] == [0, 1, 2]
    assert figures == {"refilled": 2, "refill_tokens": 4}
    empty, nothing = select(grown(rows[:1])[0], torch.tensor([False])), RolloutStats(too_long=3)
    asked = []
    forest, (_, costs), figures = refill(
        (empty, [nothing]), lambda count: asked.append(count) or (empty, [nothing]), 3, 10**9
    )
    assert forest.prompts == () and asked == [3] and len(costs) == 2
    assert figures == {"refilled": 0, "refill_tokens": 0}
    first = grown(rows)
    assert refill(first, more, 5, None) == (first[0], first, {})


def test_a_tree_varies_if_two_of_its_finite_rewards_differ():
    nan = float("nan")
    rewards = [(1, 1), (0.5, 0.5, 0.75), (nan, nan), (nan, 1), (0, nan, -1)]
    forest = stars(*([((4,), float(r)) for r in leaves] for leaves in rewards))
    assert varies(forest).tolist() == [False, True, False, False, True]
    assert varies(select(forest, torch.zeros(5, dtype=torch.bool))).tolist() == []


def test_one_visit_decides_and_later_rewards_restore_a_prompt():
    prompts = [Prompt((index % 4,), index % 4, "rows") for index in range(4000)]
    order = Curriculum(prompts, 0.25, seed=3)
    first = [next(order) for _ in range(4)]
    assert first == prompts[:4] and order.update(grown([(1, False), (2, False)])[0]) == {
        "drawn_less": 0
    }
    counts = [0] * 4
    for _ in range(1000):
        counts[next(order).answer] += 1
    passed = order.update(grown([(2, True)])[0])["drawn_less"]
    seen = 4 + 1000 + passed
    assert abs(passed - 0.75 * (seen - 4) / 2) < 5 * (0.25 * 0.75 * (seen - 4) / 2) ** 0.5
    assert abs(counts[0] - counts[3]) <= 1 and counts[1] < counts[0] / 2 > counts[2] > 0
    assert order.zero_variance == {key_of(prompts[1])}
    # Another one that goes on from there draws the same.
    other = Curriculum(prompts[seen:], 0.25, 3, seen, order.zero_variance)
    rest = list(order)
    assert list(other) == rest and order.update(grown([])[0]) == other.update(grown([])[0])
    assert [p.answer for p in rest if p.answer != 1] == [
        p.answer for p in prompts[seen:] if p.answer != 1
    ]
    assert list(Curriculum(prompts, None, 3, 0, order.zero_variance)) == prompts


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.refill=9", "train.stream_depth=1"], ["train.refill", "stream_depth=0", "found 1"]),
        (["data.difficulty=0.5", "train.stream_depth=2"], ["data.difficulty", "found 2"]),
        (
            ["train.refill=9", "shape={kind: star, group_size: 1}", "credit.type=gae"],
            ["shape.kind=star", "several responses", "train.refill", "found one"],
        ),
        (
            ["data.difficulty=0.5", "shape={kind: star, group_size: 1}", "credit.type=gae"],
            ["several responses", "data.difficulty", "found one"],
        ),
        (["train.refill=0"], ["train.refill", "0"]),
        (["data.difficulty=1"], ["data.difficulty", "less than 1"]),
        (["data.difficulty=0"], ["data.difficulty", "0.001"]),
    ],
)
def test_settings_that_cannot_work_are_refused(overrides, words):
    with one_sentence(words):
        load_recipe(None, overrides)


def test_problems_that_are_generated_are_never_drawn_less():
    with one_sentence(["data.difficulty", "arithmetic reads no data set", "0.5"]):
        describe(load_recipe(None, ["data.difficulty=0.5"]))


def test_a_dry_run_counts_replacements():
    star = ["train.prompts=2", "sampling.max_new_tokens=100", "shape={kind: star, group_size: 8}"]
    text = describe(load_recipe(None, [*star, "train={refill: 500, prompts: 2}"]))
    assert "  2,100 tokens of replacements, train.refill=500 and the last wave\n" in text
    assert "  at most 370,000 tokens\n" in text  # 100 iterations of 2 * 8 * 100 + 2,100
    assert "replacements" not in describe(load_recipe(None, star))


def test_checkpoints_of_before_have_no_prompts_of_zero_variance(folder, whole, tmp_path):
    saved = json.loads((latest_checkpoint(folder / "whole") / "state.json").read_text())
    del saved["zero_variance"]
    (tmp_path / "state.json").write_text(json.dumps(saved))
    assert load_state(tmp_path).zero_variance == []
