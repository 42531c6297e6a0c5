"""Functions that a Python caller gives: which are the same, and that each of a list is called."""

import copy
import functools
import math
import os
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy
import pytest
import torch

from spo.config.recipe import load_recipe
from spo.fingerprint import fingerprint, unread
from spo.reward import reward_given, reward_of
from spo.signatures import Response


def typed(code):
    """What a name `f` stands for after code without a file."""
    exec(code, names := {})
    return names["f"]


def scaled(weight, *held):
    def reward(response):
        return weight * len(response) + 0 * len(held)

    return reward


class Judge:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, response):
        return self.weight * len(response)


def test_a_function_that_is_defined_again_is_another_only_if_it_does_something_else():
    plain = "def f(response):\n    return 0.5 * len(response)\n"
    kinds = [
        plain,
        plain.replace("0.5", "0.25"),
        plain.replace("len", "sum"),
        plain.replace("(response):", "(response, most=1):"),
        plain.replace("(response):", "(response, most=2):"),
        plain.replace("0.5", "(lambda: 0.5)()"),
        plain.replace("0.5", "(lambda: 0.25)()"),
        "import functools\n@functools.cache\n" + plain.replace("0.5", "0.75"),
        "f = lambda response: 0.5",
        "f = lambda response: 0.25",
        "class F:\n    def __call__(self, response):\n        return 1.5\nf = F()",
        "class F:\n    def __call__(self, response):\n        return 1.25\nf = F()",
    ]
    prints = [fingerprint(typed(code)) for code in kinds]
    assert len(set(prints)) == len(kinds)
    assert prints == [fingerprint(typed(f"\n\n{code}")) for code in kinds]
    assert fingerprint(scaled(1)) != fingerprint(scaled(2))
    assert fingerprint(scaled(1, object())) == fingerprint(scaled(1, object()))  # a model, perhaps
    share = functools.partial(scaled(1), most=3)
    assert len({fingerprint(f) for f in (share, share.func, functools.partial(share, 4))}) == 3


def decorated(factor, function):
    @functools.wraps(function)
    def wrapper(response):
        return factor * function(response)

    return wrapper


def with_option(value):
    def reward(response, *, option=value):
        return float(len(str(option)))

    return reward


def plain(response):
    return 1.0


def other(response):
    return 2.0


class Plain:
    """Of this module, held by another."""

    def __init__(self, weight):
        self.weight = weight


VALUES = [
    *(1, 1.0, True, None, (), [], {}, "1", b"1", [1, 2], [2, 1], (1, 2), {1: 2}, {1: 3}),
    *({1, 2}, frozenset({1, 3}), numpy.int64(1), numpy.float32(1), numpy.arange(3)),
    *(numpy.arange(3) + 1, torch.tensor(0.5), torch.tensor([0.5]), Path("a"), re.compile("a")),
    *(re.compile("a", re.I), plain, other, Plain, Plain(1), Plain([1]), [Plain({"a": 1})]),
    *(Judge(1), Judge(1).__call__, Judge(2).__call__, functools.partial(plain), len, math.sqrt),
]


@pytest.mark.parametrize(
    "made",
    [
        with_option,
        Judge,
        lambda value: Judge(value).__call__,
        lambda value: scaled(value),
        lambda value: functools.partial(plain, value),
        lambda value: functools.partial(plain, extra=value),
        lambda value: decorated(value, plain),
    ],
)
def test_whatever_a_function_holds_tells_it_from_others(made):
    prints = [fingerprint(made(value)) for value in VALUES]
    assert len(set(prints)) == len(VALUES)
    assert prints == [fingerprint(made(copy.deepcopy(value))) for value in VALUES]
    assert unread(made(VALUES)) == []


def test_what_a_function_wraps_and_what_wraps_it():
    functions = [plain, other, decorated(1, plain), decorated(2, plain), decorated(1, other)]
    functions += [functools.cache(plain), functools.cache(other)]
    assert len({fingerprint(f) for f in functions}) == len(functions)


def test_globals_that_a_function_names():
    code = "{}\ndef helper(x):\n    return {}\ndef f(response):\n    return W + helper(response)"
    prints = [fingerprint(typed(code.format(*v))) for v in (("W=1", 1), ("W=2", 1), ("W=1", 2))]
    assert len(set(prints)) == 3
    cached = [typed(f"CACHE = {held}\ndef f(response):\n    return CACHE") for held in ([], [1])]
    assert fingerprint(cached[0]) == fingerprint(cached[1])  # a call may have filled it


def test_circles_and_masses_end():
    circle, deep = [], []
    circle.append(circle)
    for _ in range(2000):
        deep = [deep]
    assert fingerprint(scaled(circle)) != fingerprint(scaled(deep))
    assert (unread(scaled(circle)), unread(scaled(deep))) == ([], ["values too deep"])
    many = list(range(20_000))
    assert unread(scaled(many)) == ["many values"]
    assert fingerprint(scaled(many)) == fingerprint(scaled(list(many)))


def test_a_function_is_never_replaced_in_silence():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        judge = Judge(threading.Lock())
        names = [reward_given(judge), reward_given(judge), reward_given(scaled(3))]
        assert reward_given(scaled(3)) == names[2]  # it does the same
        assert reward_given(judge.__call__) == reward_given(judge.__call__)
    with pytest.warns(UserWarning, match="Judge#.* replaces an earlier one, .* compared .lock."):
        assert reward_given(Judge(threading.Lock())) == names[0]


def test_another_process_finds_the_same():
    code = "import dataclasses, fractions, functools\nfrom spo.fingerprint import fingerprint\n"
    code += "import re, numpy\nnames = {}\n"
    code += 'exec(\'f = lambda response: response in {"a", "b", "c", "d"}\', names)\n'
    code += "@dataclasses.dataclass\nclass Held:\n    words: set\n    thing: object\n"
    code += "    def __call__(self, response, *, by={'x': numpy.arange(3)}):\n        return 1\n"
    code += "held = Held({'a', 'b', 'c'}, [object(), fractions.Fraction(1, 2), names['f']])\n"
    code += "print(*map(fingerprint, [names['f'], held, held.__call__, functools.cache(held)]))"
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(said) == 1 and said != {b""}


def test_each_function_of_a_list_is_called():
    """Equal ones may differ in what they hold."""
    held = [Judge(1), Judge(2), functools.partial(Judge.__call__, Judge(3)), scaled(4), scaled(5)]
    held += [lambda response: 6 * len(response), lambda response: 7 * len(response)]
    recipe = load_recipe(None, reward=reward_given(held))
    result = reward_of(recipe.reward)(Response("p", "four", None))
    assert result.parts == (4, 8, 12, 16, 20, 24, 28)


def test_a_part_of_an_async_function_is_awaited():
    async def judge(response, weight):
        return weight * len(response)

    recipe = load_recipe(None, reward=reward_given(functools.partial(judge, weight=2)))
    assert reward_of(recipe.reward)(Response("p", "four", None)).reward == 8
    assert recipe.reward.terms[0].name == "judge"
