"""Whether a given answer is the right one: texts first, then the trees of both."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from spo.tasks.algebra import words
from spo.tasks.algebra.names import is_name, is_own_name, name_of
from spo.tasks.algebra.node import Node, Unreadable, operations, spread
from spo.tasks.algebra.numbers import proportion, same_value
from spo.tasks.algebra.parser import parse
from spo.tasks.algebra.quantity import has_decimals, rounds, same_quantity, same_ratio
from spo.tasks.algebra.regions import is_region_like, region_of, same_region, usual_brackets
from spo.tasks.algebra.spelling import spelled

MAX_LENGTH = 600  # characters of an answer; the longest of MATH has about 200
MAX_DEPTH = 16  # of brackets

# Letters with a space before them may be units: 5 m/s, but 10 - 4 m has a variable.
_LETTER_UNIT = re.compile(
    r"(-?(?:[0-9.,]|\\frac\{[0-9]+\}\{[0-9]+\}|\{,\})+) "
    r"([mgshLN](?:\s*\^\s*\{?[23]\}?)?(?:\s*/\s*(?:s|h|min|hr|m|L)(?:\s*\^\s*\{?[23]\}?)?)?)"
)
_EMPTY = re.compile(r"\\(?:text|mbox|math)[a-z]*(?![a-zA-Z])|[{}\s]")  # what shows nothing
_COMMAS = re.compile(r"(?<![0-9,])[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])")


def equal(given: str, answer: str, simplified: bool = False) -> bool:
    """Whether `given` is the right answer; both in LaTeX or plain text, neither in a box.

    `simplified`: only if it also takes no more operations to work out than `answer`, and has no
    functions (sines, logarithms, factorials) that `answer` lacks.
    """
    if len(given) > MAX_LENGTH or _depth(given) > MAX_DEPTH:
        return False
    given, answer = (words.with_signs(spelled(text)) for text in (given, answer))
    if not all(_EMPTY.sub("", text) for text in (given, answer)):
        return False
    if _plain(given) == _plain(answer):
        return True
    for same in (words.same_time, words.same_date):
        if (verdict := same(given, answer)) is not None:
            if verdict or not re.fullmatch("[0-9:]+", answer):
                return verdict
    if words.is_words(answer):
        return words.same_words(given, answer)
    return _same_texts(given, answer, simplified)


def _same_texts(given: str, answer: str, simplified: bool) -> bool:
    for right in _readings(answer):
        for found in _readings(given):
            try:
                if same(found, right):
                    return not simplified or _is_worked_out(found, right)
            except (Unreadable, RecursionError, ArithmeticError):
                continue
    return False


def _is_worked_out(given: Node, answer: Node) -> bool:
    """Whether it has no more operations than the answer, and no functions but those of it."""
    used, known = (
        {n.value for n in node.walk() if n.op == "func"} | {n.op for n in node.walk()} & {"fact"}
        for node in (given, answer)
    )
    return used <= known and _work(given) <= _work(answer)


def _work(node: Node) -> int:
    """Operations of the value; what stands before the last sign of equality is no part of it."""
    if node.op in ("items", "seq", "set"):
        return sum(map(_work, node.args))
    if node.op == "rel" and set(node.value) <= {"=", "approx"}:
        ends = [side for side in (node.args[-1], node.args[0]) if not is_name(side)]
        return _work(ends[0] if ends else node.args[-1])
    return operations(node)


def _readings(text: str) -> Iterator[Node]:
    """Where commas between three digits may separate thousands or items, both."""
    text = usual_brackets(re.sub(r"\\mathbb\s*([A-Z])(?![a-zA-Z])", r"\\mathbb{\1}", text))
    commas = _COMMAS.search(text)
    for thousands in (True, False) if commas else (True,):
        if not thousands and re.search(r",00", commas[0] if commas else ""):
            return
        try:
            yield parse(text, thousands)
        except (Unreadable, RecursionError):
            continue
    if match := _LETTER_UNIT.fullmatch(text):
        with suppress(Unreadable):
            yield parse(rf"{match[1]}\text{{{match[2]}}}")


def _plain(text: str) -> str:
    """The text without spaces, except between digits: `1 2` is not 12."""
    return re.sub(r"(?<![0-9A-Za-z])\s|\s(?![0-9A-Za-z])", "", text)


def same(given: Node, answer: Node) -> bool:
    """Whether two trees are the same answer. Raises Unreadable for what has no value."""
    if given == answer:
        return True
    if is_region_like(given) or is_region_like(answer):
        regions = region_of(given), region_of(answer)
        if regions[0] is not None and regions[1] is not None:
            return same_region(regions[0], regions[1])
    found, right = _listed(given), _listed(answer)
    if len(right.values) == 1 and len(found.values) == 1:
        return _same_item(found.values[0], right.values[0])
    if len(found.values) == 1:
        return not right.braces and _same_tuple(found.values[0], right)
    if len(right.values) == 1:
        return not found.braces and _same_tuple(right.values[0], found, True)
    if (found.braces or right.braces) and len({*found.names, *right.names} - {None}) > 1:
        return False
    return _same_lists(found, right)


@dataclass(frozen=True)
class _List:
    values: list[Node]
    names: list[str | None]  # that each is given
    braces: bool = False  # whether they are a set


def _listed(node: Node) -> _List:
    """The items of a list or set; of anything else itself."""
    items, braces = [node], node.op == "set"
    if node.op in ("items", "set"):
        items = list(node.args)
    if node.op == "rel" and node.value in (("=",), ("in",)) and is_name(node.args[0]):
        inner, name = node.args[1], name_of(node.args[0])
        if inner.op == "set" or len(spread(inner)) > 1:
            inside = _listed(inner)
            return _List(inside.values, [name] * len(inside.values), inside.braces)
    if len(items) == 1 and items[0].op == "set" and node.op != "set":
        items, braces = list(items[0].args), True
    values: list[Node] = []
    names: list[str | None] = []
    spreads = [one for item in items for one in spread(item)]
    if len(spreads) == 1:
        return _List(spreads, [None], braces)
    for item in spreads:
        if item.op == "rel" and set(item.value) == {"="} and is_name(item.args[0]):
            if not all(same_value(side, item.args[-1]) for side in item.args[1:-1]):
                raise Unreadable("sides that differ")
            values.append(item.args[-1])
            names.append(name_of(item.args[0]))
        else:
            values.append(item)
            names.append(None)
    return _List(values, names, braces)


def _same_lists(given: _List, answer: _List) -> bool:
    found, right = given.values, answer.values
    if len(found) != len(right):
        return False
    mine, own = set(given.names) - {None}, set(answer.names) - {None}
    if len(mine) > 1 and len(own) > 1:

        def pair(x: tuple, y: tuple) -> bool:
            return x[0] == y[0] and _same_item(x[1], y[1])

        named = list(zip(given.names, found, strict=True))
        return _matches(named, list(zip(answer.names, right, strict=True)), pair)
    if len(mine) > 1 or len(own) > 1:  # values without names stand in the order of the names
        if (mine and own) or not _in_order(given.names if mine else answer.names):
            return False
        return all(map(_same_item, found, right))
    if mine and own and mine != own:
        return False
    return _matches(found, right, _same_item)


def _same_tuple(one: Node, others: _List, is_answer: bool = False) -> bool:
    """A tuple against values that stand in no brackets. Names in `one` that `is_answer` count."""
    if one.op == "rel" and one.value == ("=",) and one.args[0].op == "seq":
        names = [name_of(arg) for arg in one.args[0].args]
        if None not in others.names and sorted(names) == sorted(map(str, others.names)):
            values = [others.values[others.names.index(name)] for name in names]
            return _same_tuple(one.args[1], _List(values, [None] * len(values)))
        if set(others.names) == {None} and (is_answer or _in_order(names)):
            return _same_tuple(one.args[1], others)
    if one.op != "seq" or one.value != "()" or len(one.args) != len(others.values):
        return False
    if len(set(others.names) - {None}) > 1 and not _in_order(others.names):
        return False
    return all(map(_same_item, one.args, others.values))


def _in_order(names: Sequence[str | None]) -> bool:
    """Whether values without names can stand for them: (2, 1) are no x = 1, y = 2."""
    known = [name for name in names if name is not None]
    if not len(known) == len(names) == len(set(known)):
        return False
    return known == sorted(known) or not set(known) <= set("abcuvwxyz")


def _is_named_in_order(node: Node) -> bool:
    """Whether it is no tuple of names in another order than the usual one."""
    return node.op != "seq" or not is_name(node) or _in_order(list(map(name_of, node.args)))


def _matches(found: Sequence, right: Sequence, pair: Callable[..., bool]) -> bool:
    """Whether each matches one of the others, in any order."""
    left = list(right)
    for one in found:
        place = next((k for k, other in enumerate(left) if pair(one, other)), None)
        if place is None:
            return False
        del left[place]
    return not left


def _same_item(given: Node, answer: Node) -> bool:
    """Two items of lists."""
    if given == answer:
        return True
    if given.op == "rel" or answer.op == "rel":
        return _same_relation(given, answer)
    if answer.op in ("items", "set") or given.op in ("items", "set"):
        return (
            given.op in ("items", "set") and answer.op in ("items", "set") and same(given, answer)
        )
    if answer.op in ("matrix", "row", "seq", "mod", "union", "minus", "inter", "built"):
        kind = given.op == answer.op and given.value == answer.value
        if kind and answer.op in ("matrix", "row") and answer.value == "det":
            return False
        return (
            kind
            and len(given.args) == len(answer.args)
            and all(map(_same_item, given.args, answer.args))
        )
    if given.op == "word" or answer.op == "word":
        return _same_word(given, answer)
    if given.op == "ratio" or answer.op == "ratio":
        return same_ratio(given, answer)
    return same_quantity(given, answer)


def _same_word(given: Node, answer: Node) -> bool:
    if given.op not in ("word", "sym") or answer.op not in ("word", "sym"):
        return False
    return words.same_words(str(given.value), str(answer.value), typed=True)


def _same_relation(given: Node, answer: Node) -> bool:
    if answer.op != "rel":
        return _is_named_in_order(given.args[0]) and _is_value(given, answer)
    if "approx" in answer.value:  # what it is exactly stands before
        exact = answer.value.index("approx")
        sides = answer.args[: exact + 1]
        left = Node("rel", sides, answer.value[:exact]) if exact else sides[0]
        return set(answer.value) <= {"=", "approx"} and _same_item(given, left)
    signs = set(answer.value)
    if given.op != "rel":
        last = answer.args[-1]
        named = is_own_name(answer.args[0], last)
        return signs in ({"="}, {"in"}) and named and same(given, last)
    if signs == {"="} and set(given.value) == {"="}:
        return _same_equation(given, answer)
    if len(given.value) != len(answer.value):
        return False
    if len(answer.value) == 1:
        return _same_inequality(given, answer)
    turned = Node("rel", given.args[::-1], tuple(map(_turned, given.value[::-1])))
    return any(
        g.value == answer.value and all(map(_same_item, g.args, answer.args))
        for g in (given, turned)
    )


def _turned(sign: str) -> str:
    return sign.translate(str.maketrans("<>", "><"))


def _is_value(given: Node, answer: Node) -> bool:
    """Whether every side of `x = 2 + 3 = 5`, except for the name, is the answer.

    Behind a sign of approximation the value may be rounded to the digits that are written.
    """
    sides, signs = list(given.args), list(given.value)
    if set(signs) - {"=", "approx", "in"}:
        return False
    if is_name(sides[0]):
        sides, signs = sides[1:], signs[1:]
    elif is_name(sides[-1]) and sides[-1].op == "sym":
        sides, signs = sides[:-1], signs[:-1]
    exact = [sides[0]] + [s for s, sign in zip(sides[1:], signs, strict=True) if sign != "approx"]
    rounded = [s for s, sign in zip(sides[1:], signs, strict=True) if sign == "approx"]
    if all(same(side, answer) for side in exact):
        return all(rounds(answer, side) for side in rounded)
    if not rounded or not has_decimals(answer):
        return False
    return all(same(side, answer) for side in rounded) and all(rounds(s, answer) for s in exact)


def _same_equation(given: Node, answer: Node) -> bool:
    for node in (given, answer):  # each side in the middle must be worth the last one
        if not all(same_value(side, node.args[-1]) for side in node.args[1:-1]):
            return False
    (a, *_, b), (c, *_, d) = given.args, answer.args
    if (is_name(a) and is_name(c)) or (a == c and a.op == "word"):
        if a == c or name_of(a).replace(" ", "") == name_of(c).replace(" ", ""):
            return same(b, d)
        if {a.op, c.op} == {"sym", "call"} and same(b, d):  # y = and f(x) =
            return "y" in (name_of(a), name_of(c)) and "'" not in name_of(a) + name_of(c)
    if is_name(b) and is_name(c) and b == c:
        return same(a, d)
    return proportion(_difference(a, b), _difference(c, d)) != 0


def _same_inequality(given: Node, answer: Node) -> bool:
    sign, other = given.value[0], answer.value[0]
    first, second = _difference(*given.args), _difference(*answer.args)
    if sign[0] not in "<>" or other[0] not in "<>":
        return sign == other and all(map(_same_item, given.args, answer.args))
    if _turned(sign) == other:
        return proportion(first, second) < 0
    return sign == other and proportion(first, second) > 0


def _difference(a: Node, b: Node) -> Node:
    return Node("add", (a, Node("neg", (b,))))


def _depth(text: str) -> int:
    """Depth of nested brackets, closed or not."""
    depth = deepest = 0
    for bracket in re.findall(r"[(\[{)\]}]", text):
        depth = depth + 1 if bracket in "([{" else max(depth - 1, 0)
        deepest = max(deepest, depth)
    return deepest
