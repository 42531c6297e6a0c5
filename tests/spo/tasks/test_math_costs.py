"""What a comparison costs, counted and not timed: no answer takes exponentially many steps."""

import pytest

from spo.tasks import answers
from spo.tasks.algebra import numbers, regions
from spo.tasks.algebra.same import equal
from spo.tasks.math import Math

CHAINS = {
    "and": " and ".join(rf"x\ne{k}" for k in range(24)),
    "minus": r"\setminus".join([r"\{1,2,3,4,5,6,7,8,9\}"] * 20),
    "cap": r"\cap".join([r"\mathbb{R}\setminus\{1,2,3,4,5,6\}"] * 14),
    "cup": r"\cap".join([r"(\{1\}\cup\{2\}\cup\{3\})"] * 15),
}


class TooMany(Exception):
    pass


@pytest.mark.parametrize("text", CHAINS.values(), ids=CHAINS)
def test_chains_of_sets_have_few_parts(text, monkeypatch):
    count, order = 0, regions._order

    def counted(a, b):
        nonlocal count
        count += 1
        if count > 20_000:
            raise TooMany
        return order(a, b)

    monkeypatch.setattr(regions, "_order", counted)
    assert not equal(text, "x>5")
    assert count > 100


@pytest.mark.parametrize("item", ["e^{%d}", "e^{x+%d}", "1/(x-x)+%d"])
def test_items_of_a_list_are_computed_once(item):
    items = [item % k for k in range(40)]
    numbers._outcome.cache_clear()
    equal(",".join(items), ",".join(reversed(items)))
    assert numbers._outcome.cache_info().misses <= 40 * numbers.DIGITS // 4


@pytest.mark.parametrize("filler", ["{", "%\n", "\\boxed{", "}"])
def test_a_box_is_looked_for_at_the_end_of_a_long_text(filler, monkeypatch):
    seen, without = [], answers._without_comments
    monkeypatch.setattr(
        answers, "_without_comments", lambda text: seen.append(len(text)) or without(text)
    )
    long = filler * (10**6 // len(filler))
    assert not Math().grade(long, "5")
    assert Math().grade(rf"{long} so \boxed{{5}}", "5")
    assert max(seen) <= 2 * answers._SEARCHED + 100
    assert not Math().grade(rf"\boxed{{5}} {long}", "5")


def test_verbatim_text_that_began_long_before_is_none():
    long = "x\n" * 60_000
    inside = "\\begin{verbatim}\n" + long + "\\boxed{5}\n"
    assert not Math().grade(inside, "5")
    assert Math().grade(inside + "\\end{verbatim}\n\\boxed{5}", "5")
    assert Math().grade("\\begin{verbatim}\n\\end{verbatim}\n" + long + "\\boxed{5}", "5")
