"""Properties of the comparison of answers: what is accepted is equal, for whatever is written."""

import random
import re
import string
import time
from collections.abc import Iterator
from fractions import Fraction

import pytest
from test_math_kinds import RIGHT, WRONG

from spo.tasks.algebra.same import equal

# Answers that all differ, in classes of equal ones. One has a unit, as 5 agrees with all units.
CLASSES = [
    [r"x \in [-2,7]", "[-2,7]", r"-2\le x\le 7"],
    [r"x \in [-3,7]", "[-3,7]"],
    ["(-2,7)", "-2<x<7"],
    ["(-3,7)"],
    ["n=2,3,4"],
    ["n=1,2,3", r"n\in\{1,2,3\}"],
    ["(x,y)=(1,2)", r"x=1 \text{ and } y=2"],
    ["(x,y)=(1,3)"],
    [r"x=\pm 3"],
    [r"x=\pm 4"],
    [r"S=\{1,2\}"],
    [r"S=\{1,3\}"],
    [r"A=\begin{pmatrix}1&2\\3&4\end{pmatrix}"],
    [r"A=\begin{pmatrix}1&2\\3&5\end{pmatrix}"],
    ["y=2x+3", "y-2x=3"],
    ["y=2x-3"],
    ["x^2+y^2=4"],
    ["x^2+y^2=2"],
    ["x<3", r"(-\infty,3)"],
    ["x>3", r"(3,\infty)"],
    [r"x\le 3", r"(-\infty,3]"],
    [r"x\ne 3", r"\mathbb{R}\setminus\{3\}"],
    [r"x<3 \text{ or } x>5"],
    [r"\frac{1}{2^{99}}", "2^{-99}"],
    [r"\frac{1}{3^{50}}"],
    ["2^{2004}", "4^{1002}"],
    ["2^{2004}+1"],
    ["10^{-50}"],
    ["0", "0.0"],
    [r"\sqrt{2}"],
    ["1.41421356237309504880168872420969807856967187537694"],
    [r"e^{\pi\sqrt{163}}"],
    ["262537412640768744"],
    [r"\sqrt{x^2}", "|x|"],
    ["x"],
    ["-x"],
    ["x^2+1"],
    ["i"],
    ["-i"],
    [r"x=2 \text{ and } y=1"],
    [r"|x|=-1"],
    [r"\text{no solution}"],
    [r"\emptyset", r"\{\}"],
    [r"\infty"],
    [r"-\infty"],
    [r"5\text{ m}"],
    [r"\text{(A)}"],
    [r"\text{(B)}"],
    [r"3:30\text{ p.m.}"],
    [r"3:30\text{ a.m.}"],
    ["2516_8"],
    ["2516_9"],
]


def is_bare_list(text: str) -> bool:
    """Whether it leaves out its brackets, so that it may be a tuple or a set."""
    return re.fullmatch("[0-9]+[,\uff0c\u3001][0-9]+", text) is not None


def test_no_text_is_accepted_for_two_answers_that_differ():
    texts = [text for group in CLASSES for text in group]
    texts += [given for table in (RIGHT, WRONG) for _, given_ in table for given in given_]
    for text in texts:
        if is_bare_list(text):
            continue
        accepting = [group[0] for group in CLASSES if any(equal(text, answer) for answer in group)]
        assert len(accepting) <= 1, f"{text!r} is accepted for {accepting}"


@pytest.mark.parametrize("group", [group for group in CLASSES if len(group) > 1])
def test_equal_answers_are_accepted_for_each_other(group):
    assert all(equal(a, b) for a in group for b in group)


def written(rng: random.Random, value: Fraction) -> str:
    """One of the ways to write a rational number."""
    sign, above, below = "-" if value < 0 else "", abs(value.numerator), value.denominator
    scale = rng.randint(2, 9)
    ways = [
        rf"{sign}\frac{{{above}}}{{{below}}}",
        rf"{sign}\dfrac{{{above * scale}}}{{{below * scale}}}",
        f"{sign}{above}/{below}",
        rf"{sign}{above * scale}\div{below * scale}",
        rf"\frac{{{value.numerator - scale}}}{{{below}}}+\frac{{{scale}}}{{{below}}}",
        rf"x={sign}\tfrac{{{above}}}{{{below}}}",
    ]
    if above > below > 1:
        ways.append(rf"{sign}{above // below}\frac{{{above % below}}}{{{below}}}")
    if below in (1, 2, 4, 5, 10):
        ways.append(f"{float(value):g}" if above < 1000 else f"{float(value):.2f}")
    return rng.choice(ways)


def surds(rng: random.Random) -> tuple[tuple[Fraction, Fraction, int], str]:
    """a + b * sqrt(n) with n square-free, and a way to write it."""
    a, b = (Fraction(rng.randint(-6, 6), rng.randint(1, 4)) for _ in range(2))
    n = rng.choice([2, 3, 5, 6, 7])
    first, second = written(rng, a).removeprefix("x="), written(rng, b).removeprefix("x=")
    k = rng.randint(1, 4)
    root = rng.choice([rf"\sqrt{{{n}}}", rf"\frac{{\sqrt{{{n * k * k}}}}}{{{k}}}", f"{n}^{{1/2}}"])
    return (a, b, n if b else 0), rng.choice(
        [rf"({first})+({second}){root}", rf"\left({second}\right)\cdot {root}+\left({first}\right)"]
    )


def polynomials(rng: random.Random) -> tuple[tuple[int, ...], str]:
    """(x - p)(x - q) * c, expanded or not."""
    p, q, c = (rng.randint(-5, 5) for _ in range(3))
    value = (c, -c * (p + q), c * p * q)
    ways = [f"{c}(x-({p}))(x-({q}))", f"({c})x^2+({-c * (p + q)})x+({c * p * q})"]
    return value, rng.choice(ways)


def lists(rng: random.Random) -> tuple[tuple, str]:
    numbers = [rng.randint(-3, 3) for _ in range(rng.randint(2, 3))]
    kind = rng.choice(["()", "[]", "{}"])
    if kind == "{}" or len(numbers) > 2:
        kind = rng.choice(["()", "{}"]) if kind == "[]" else kind
    text = ",".join(map(str, numbers))
    if kind == "{}":
        return ("{}", *sorted(numbers)), rf"\{{{text}\}}"
    return (kind, *numbers), f"{kind[0]}{text}{kind[1]}"


def cases(rng: random.Random, count: int) -> Iterator[tuple[bool, str, str]]:
    """Pairs of one kind, and whether they are equal, from numbers and not from the grader."""
    for _ in range(count):
        kind = rng.choice([surds, polynomials, lists, None])
        if kind is None:
            a, b = (Fraction(rng.randint(-12, 12), rng.randint(1, 6)) for _ in range(2))
            b = a if rng.random() < 0.4 else b
            yield a == b, written(rng, a), written(rng, b)
            continue
        state = rng.getstate()
        a, first = kind(rng)
        if rng.random() < 0.2:
            rng.setstate(state)
        b, second = kind(rng)
        yield a == b, first, second


def check(seed: int, count: int) -> None:
    rng = random.Random(seed)
    equals = 0
    for same, given, answer in cases(rng, count):
        assert equal(given, answer) is same, (given, answer, same)
        equals += same
    assert 0.05 * count < equals < 0.8 * count


def test_verdicts_are_those_of_exact_arithmetic():
    check(0, 1500)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_verdicts_are_those_of_exact_arithmetic_at_length(seed):
    check(seed, 10_000)


PIECES = [
    *r"\frac{1}{2} \sqrt \pi ^ _ ! + - * / = < > \le \in \cup ( ) [ ] \{ \} | , ; : % '".split(),
    *r"\text{ or } \text{ cm} \pm \infty \begin{pmatrix} \end{pmatrix} & \\ \binom \log".split(),
    *"x y i e 0 1 2 10 0.5 1,000 10^{10^{10}} 9^{9^{9^9}} 1000! and or to".split(),
    "\u00bd",
    "\u00b2",
    "\u221a",
    "\u200b",
    "\uff15",
    "\ud800",
    "\x00",
    " ",
]


def gibberish(rng: random.Random) -> str:
    pieces = [rng.choice(PIECES) for _ in range(rng.randint(1, 12))]
    letters = "".join(rng.choice(string.printable) for _ in range(rng.randint(0, 3)))
    return "".join([*pieces, letters]) if rng.random() < 0.5 else " ".join([letters, *pieces])


def fuzz(seed: int, count: int) -> None:
    """Whatever is written gets a verdict soon, and is accepted for one class of answers at most."""
    rng = random.Random(seed)
    for _ in range(count):
        text = gibberish(rng)
        groups = rng.sample(CLASSES, 3)
        start = time.process_time()
        accepting = [group[0] for group in groups if equal(text, rng.choice(group))]
        assert time.process_time() - start < 2.0, text
        assert len(accepting) <= 1, f"{text!r} is accepted for {accepting}"


def test_gibberish_gets_verdicts_in_time():
    fuzz(0, 1500)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_gibberish_gets_verdicts_in_time_at_length(seed):
    fuzz(seed, 20_000)
