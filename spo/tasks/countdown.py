"""Countdown: reach the target from the given numbers with + - * /, each number used exactly once.

The worked solutions make an attempt, check the result, and sometimes give up after a wrong one. A
policy that imitates them stops too early. Reinforcement learning must teach it to try again.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Annotated

from annotated_types import Ge, Le

from spo.tasks.answers import after_think, last_boxed
from spo.tasks.problem import Problem, answer_span, stream, tag

NAME = "countdown"
LARGEST = 20  # of the given numbers
VALUES = 101  # the worked solutions stay within the integers 0..100
ATTEMPTS = 4  # maximum number in a worked solution
WRONG, GIVE_UP = 0.4, 0.4  # probability that an attempt is wrong; that a wrong one is the last
VOCABULARY = (NAME, "make", "+", "-", "*", "/", "=", "(", ")", "no", *map(str, range(VALUES)))

MAX_LENGTH = 400  # characters of an answer; a bound on the evaluator's time

_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_LATEX = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])|\\[,;:! ()]|\$|~", " "),
        (r"\\(?:times|cdot|ast)(?![a-zA-Z])|\\\*|[\u00b7\u22c5\u2217]", "*"),
        (r"\\div(?![a-zA-Z])", "/"),
        (r"\s*\.\s*$", ""),
    )
)
_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])")
_SIGN = "minus"  # in front of a value
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, _SIGN: 3}
_ASCII = str.maketrans({"\u00d7": "*", "\u00f7": "/", "\u2212": "-"})  # times, divided by, minus

Step = tuple[int, str, int, int]  # left, operator, right, result


@dataclass(frozen=True)
class Countdown:
    """Problems with `numbers` numbers from 1 to 20; each has a solution."""

    numbers: Annotated[int, Ge(2), Le(4)] = 3

    def problems(self, split: str, seed: int) -> Iterator[Problem]:
        """Distinct problems; see `stream` for the splits.

        The numbers are in descending order, so another order makes no new problem.
        """
        return stream(NAME, split, seed, lambda rng: _draw(rng, self.numbers), lambda p: p.text)

    def grade(self, text: str, answer: object) -> bool:
        """True iff the last answer span, else the last box, makes the target.

        It must use each number exactly once. It may be in LaTeX, and the target may stand behind
        or before it: `(5 - 2) * 7 = 21`.
        """
        return solves(expression_of(text), answer)

    def answer(self, text: str) -> str | None:
        """The expression that `grade` reads, without spaces and without what it is equal to."""
        return plain(expression_of(text))


def expression_of(text: str, boxes_first: bool = False) -> str:
    """The expression in the last answer span or box, in plain text; empty if there is none."""
    text = after_think(text)
    span = answer_span(text)
    if span is None or boxes_first:
        box = last_boxed(text)
        span = box if box is not None else span
    elif (box := last_boxed(span)) is not None:
        span = box
    if span is None or len(span) > MAX_LENGTH:
        return ""
    for latex, sign in _LATEX:
        span = latex.sub(sign, span)
    while (divided := _FRACTION.sub(r"((\1)/(\2))", span)) != span:
        span = divided
    return span.strip()


def plain(expression: str) -> str | None:
    """The expression without spaces and without `= target`; None if it is empty."""
    first, sign, second = "".join(expression.split()).partition("=")
    return (second if sign and first.isdecimal() else first) or None


def _draw(rng: random.Random, count: int) -> Problem:
    while True:
        numbers = sorted((rng.randint(1, LARGEST) for _ in range(count)), reverse=True)
        targets = {plan[-1][3] for plan in plans(tuple(numbers))} - {0}
        if targets:
            target = rng.choice(sorted(targets))
            text = f"{NAME} {' '.join(map(str, numbers))} make {target}\n"
            return Problem(text, {"numbers": numbers, "target": target})


@lru_cache(maxsize=4096)
def plans(numbers: tuple[int, ...]) -> tuple[tuple[Step, ...], ...]:
    """Every way to combine all numbers, one operation per step, within the integers 0..100."""
    if len(numbers) == 1:
        return ((),)
    found = {}
    for i, a in enumerate(numbers):
        for j, b in enumerate(numbers):
            if i == j:
                continue
            rest = [n for k, n in enumerate(numbers) if k not in (i, j)]
            for step in _steps(a, b):
                for tail in plans(tuple(sorted([*rest, step[3]], reverse=True))):
                    found[(step, *tail)] = None  # a dict keeps the order, so that seeds reproduce
    return tuple(found)


def _steps(a: int, b: int) -> Iterator[Step]:
    if a >= b:  # another order of a sum or product is no new step
        if a + b < VALUES:
            yield a, "+", b, a + b
        if a * b < VALUES:
            yield a, "*", b, a * b
        yield a, "-", b, a - b
    if b > 0 and a % b == 0:
        yield a, "/", b, a // b


def _expression(plan: tuple[Step, ...]) -> str:
    """The plan as one expression; equal results are interchangeable."""
    ready: dict[int, list[str]] = {}
    expression = ""
    for position, (a, operator, b, value) in enumerate(plan):
        left = ready[a].pop() if ready.get(a) else str(a)
        right = ready[b].pop() if ready.get(b) else str(b)
        expression = f"{left} {operator} {right}"
        if position < len(plan) - 1:
            ready.setdefault(value, []).append(f"( {expression} )")
    return expression


def solution(
    problem: Problem, rng: random.Random, wrong: float = WRONG, give_up: float = GIVE_UP
) -> str:
    """Attempts; the last is the answer, right unless the solution gave up after a wrong one."""
    target = problem.answer["target"]
    every = plans(tuple(problem.answer["numbers"]))
    right = [plan for plan in every if plan[-1][3] == target]
    failing = [plan for plan in every if plan[-1][3] != target]
    lines, tried = [], 0
    while True:
        tried += 1
        is_wrong = tried < ATTEMPTS and bool(failing) and rng.random() < wrong
        plan = rng.choice(failing if is_wrong else right)
        lines += [f"{a} {operator} {b} = {value}" for a, operator, b, value in plan]
        if not is_wrong or rng.random() < give_up:
            return "\n".join([*lines, tag(_expression(plan))])
        lines[-1] += " no"


def solves(expression: str, answer: object) -> bool:
    """Whether an expression uses each of the answer's numbers exactly once and is its target."""
    if not isinstance(answer, dict) or not isinstance(numbers := answer.get("numbers"), list):
        return False
    tokens = _tokens(_without_target(expression, answer.get("target")))
    if sorted(t for t in tokens if t.isdecimal()) != sorted(map(str, numbers)):
        return False
    return (value := evaluate(tokens)) is not None and value == answer.get("target")


def _without_target(expression: str, target: object) -> str:
    """The expression, where `= target` follows it or `target =` precedes it."""
    sides = [side.strip() for side in expression.split("=")]
    if len(sides) == 2 and str(target) in sides:
        return sides[0] if sides[1] == str(target) else sides[1]
    return expression


def _tokens(expression: str) -> list[str]:
    """Numbers, operators and brackets of an expression; empty if it holds anything else."""
    if len(expression) > MAX_LENGTH:
        return []
    expression = expression.translate(_ASCII)
    tokens, end = [], 0
    while end < len(expression):
        match = _TOKEN.match(expression, end)
        if match is None:
            return []
        tokens.append(match[1])
        end = match.end()
    return tokens


def evaluate(tokens: list[str]) -> Fraction | None:
    """Exact value of an infix expression; None if it is malformed or divides by zero.

    It uses two stacks instead of recursion, so that deep nesting is no problem.
    """
    values: list[Fraction] = []
    operators: list[str] = []
    expect_value = True
    for token in [*tokens, None]:
        if expect_value and token == "-":
            operators.append(_SIGN)
        elif token == "(" if expect_value else token in _PRECEDENCE:
            while not expect_value and _binds(operators, token):
                if not _reduce(values, operators.pop()):
                    return None
            operators.append(token)
            expect_value = True
        elif expect_value:
            if token is None or not token.isdecimal():
                return None
            values.append(Fraction(int(token)))
            expect_value = False
        else:  # a closing bracket or the end: reduce back to the opening bracket
            while operators and operators[-1] != "(":
                if not _reduce(values, operators.pop()):
                    return None
            if (token == ")") != bool(operators) or token not in (")", None):
                return None
            if operators:
                operators.pop()
    return values[0]


def _binds(operators: list[str], token: str) -> bool:
    """Whether the operator on the stack must be applied before `token`."""
    return bool(operators) and _PRECEDENCE.get(operators[-1], 0) >= _PRECEDENCE[token]


def _reduce(values: list[Fraction], operator: str) -> bool:
    right = values.pop()
    if operator == _SIGN:
        values.append(-right)
        return True
    left = values.pop()
    if operator == "/" and right == 0:
        return False
    if operator == "+":
        left += right
    elif operator == "-":
        left -= right
    else:
        left = left * right if operator == "*" else left / right
    values.append(left)
    return True
