"""Functions that a Python caller gives: which are the same, and that each of a list is called."""

import functools
import os
import subprocess
import sys

from spo.config.recipe import load_recipe
from spo.fingerprint import fingerprint
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


def test_another_process_finds_the_same():
    code = "from spo.fingerprint import fingerprint\nnames = {}\n"
    code += 'exec(\'f = lambda response: response in {"a", "b", "c", "d"}\', names)\n'
    code += "print(fingerprint(names['f']))"
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
