"""Numbers with units, percent signs, bases and ratios; and numbers that are rounded."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction

from spo.tasks.algebra.exact import rational
from spo.tasks.algebra.names import is_name
from spo.tasks.algebra.node import Node, Unreadable, is_literal
from spo.tasks.algebra.numbers import decimal, same_value
from spo.tasks.algebra.parser import parse
from spo.tasks.algebra.spelling import spelled
from spo.tasks.algebra.units import Unit, unit_of


def number_of(text: str, percent: bool = True) -> Fraction | None:
    """The number that a text is, without its unit: 5 of `5 dollars` and `x = 5`; else None.

    It must be written as one number: `2 + 3` and `10/2` are none. Of an equation all sides but the
    name must be that number. `percent`: 5% is 5, else none.
    """
    with suppress(Unreadable, RecursionError):
        node = parse(spelled(text))
        sides = [node]
        if node.op == "rel" and set(node.value) == {"="}:
            sides = list(node.args[1:] if is_name(node.args[0]) else node.args)
        if not percent and any(part.op == "pct" for part in node.walk()):
            return None
        values = {_written(side) for side in sides}
        return values.pop() if len(values) == 1 else None
    return None


def _written(node: Node) -> Fraction | None:
    node, unit = without_unit(node)
    if unit is not None and unit.changes:
        return None
    if node.op == "pct":
        node = node.args[0]
    return rational(node) if is_literal(node) and node.op != "div" else None


def same_ratio(given: Node, answer: Node) -> bool:
    if given.op == answer.op and len(given.args) == len(answer.args):
        first, second = given.args, answer.args
        if any(rational(side) == 0 for side in (*first, *second)):
            return False
        return all(
            same_value(Node("mul", (first[0], y)), Node("mul", (second[0], x)))
            for x, y in zip(first[1:], second[1:], strict=True)
        )
    plain = [n if n.op != "ratio" else Node("div", n.args) for n in (given, answer)]
    return all(len(n.args) == 2 or n.op != "div" for n in plain) and same_value(plain[0], plain[1])


def same_quantity(given: Node, answer: Node) -> bool:
    """Numbers and formulas with units and percent signs."""
    if given.op == "based" or answer.op == "based":
        return _same_numeral(given, answer)
    given, mine = without_unit(given)
    answer, own = without_unit(answer)
    if mine is not None and mine.changes - (own.changes if own else frozenset()):
        return False
    if given.op == "pct" or answer.op == "pct":
        return _same_percent(given, answer)
    if mine is None or own is None:
        return same_value(given, answer)
    if not mine.agrees(own):
        return False
    if mine.size == own.size or mine.quantities != own.quantities:
        return same_value(given, answer)
    scale = Node("num", value=mine.size / own.size)
    return same_value(Node("mul", (given, scale)), answer)


def without_unit(node: Node) -> tuple[Node, Unit | None]:
    if node.op == "deg":
        return node.args[0], unit_of([("degree", 1)])
    return (node.args[0], node.value) if node.op == "unit" else (node, None)


def _same_numeral(given: Node, answer: Node) -> bool:
    """The base may be left out, as the problem names it; then the digits count, not the value."""
    if answer.op != "based":
        return same_value(given, answer)
    digits, base = answer.value
    if given.op != "based":
        return given.op == "num" and str(given.value) == digits
    return given.value == (digits, base)


def _same_percent(given: Node, answer: Node) -> bool:
    """50% is 50 and 0.5. Of a number without the sign, one above 1 is a percentage itself."""
    if given.op == answer.op:
        return same_value(given.args[0], answer.args[0])
    if answer.op == "pct":
        return same_value(given, answer.args[0]) or same_value(given, answer)
    value = rational(answer)
    if value is None:
        return False
    return same_value(given.args[0] if abs(value) > 1 else given, answer)


def has_decimals(node: Node) -> bool:
    node = node.args[0] if node.op in ("unit", "neg", "pct") else node
    return node.op == "num" and _places(node.value) not in (None, 0)


def _places(value: Fraction) -> int | None:
    """Digits behind the point; None if they do not end."""
    return next((k for k in range(30) if 10**k % value.denominator == 0), None)


def rounds(exact: Node, rounded: Node) -> bool:
    exact = exact.args[0] if exact.op == "unit" else exact
    rounded = rounded.args[0] if rounded.op == "unit" else rounded
    value = rational(rounded)
    places = None if value is None else _places(value)
    if value is None or places is None:
        return False
    return abs(decimal(exact) - float(value)) <= 0.5000001 * 10.0**-places
