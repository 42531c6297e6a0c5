"""Sets of real numbers: intervals, unions, inequalities and set builders in one form."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from spo.tasks.algebra.node import Node, Unreadable, spread, symbols
from spo.tasks.algebra.numbers import decimal, same_value

_INFINITE = Node("inf")
_TURNED = re.compile(  # brackets that open to the other side: ]1,2[
    r"(?P<before>^|\\in|\\cup|\\cap|\\setminus|=)\s*(?P<open>[\[\]])(?P<ends>[^\[\]]*,[^\[\]]*)"
    r"(?P<close>[\[\]])(?=\s*(?:$|\\cup|\\cap|\\setminus))"
)
_DOUBLE_O = re.compile(r"(?<=[(\[\],+\- ])oo(?=[\s,)\]\[])")
_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


@dataclass(frozen=True)
class Part:
    """The numbers between two ends."""

    low: Node
    high: Node
    closed: tuple[bool, bool] = (False, False)

    @property
    def key(self) -> tuple[float, float]:
        return decimal(self.low), decimal(self.high)


@dataclass(frozen=True)
class Region:
    parts: tuple[Part, ...]
    name: str | None = None  # of the variable


_ALL = Part(Node("neg", (_INFINITE,)), _INFINITE)


def usual_brackets(text: str) -> str:
    """With ( for ] where an interval opens, ) for [ where it closes, and \\infty for oo."""

    def usual(match: re.Match[str]) -> str:
        before, left, ends, right = match.group("before", "open", "ends", "close")
        return f"{before}{'[('[left == ']']}{ends}{'])'[right == '[']}"

    return _TURNED.sub(usual, _DOUBLE_O.sub(r"\\infty ", text))


def region_of(node: Node) -> Region | None:
    """The set that an answer describes, None if it describes none. Raises Unreadable."""
    op = node.op
    if op == "seq" and len(node.args) == 2:
        low, high = node.args
        if symbols(low) - {"pi", "e"} or symbols(high) - {"pi", "e"}:
            return None
        closed = (node.value[0] == "[", node.value[1] == "]")
        return (
            Region((Part(low, high, closed),)) if Part(low, high).key[0] <= decimal(high) else None
        )
    if op == "reals":
        return Region((_ALL,))
    if op == "set" and node.args:
        return Region(tuple(Part(a, a, (True, True)) for arg in node.args for a in spread(arg)))
    if op == "set":
        return Region(())
    if op in ("union", "inter", "minus"):
        sides = [region_of(arg) for arg in node.args]
        if sides[0] is None or sides[1] is None:
            return None
        return _combined(op, sides[0], sides[1])
    if op == "built":
        return _built(node)
    if op == "rel":
        return _of_relation(node)
    if op == "items":
        return _of_items(node)
    return None


def same_region(a: Region, b: Region) -> bool:
    """Whether two sets are equal; variables with different names differ."""
    if None not in (a.name, b.name) and a.name != b.name:
        return False
    first, second = _merged(a.parts), _merged(b.parts)
    return len(first) == len(second) and all(map(_same_part, first, second))


def _same_part(a: Part, b: Part) -> bool:
    for side, (x, y) in enumerate(((a.low, b.low), (a.high, b.high))):
        ends = decimal(x), decimal(y)
        if math.inf in map(abs, ends):
            if ends[0] != ends[1]:
                return False
        elif a.closed[side] != b.closed[side] or not same_value(x, y):
            return False
    return True


def _order(a: Node, b: Node) -> int:
    """-1, 0 or 1 as a is below, equal to or above b."""
    x, y = decimal(a), decimal(b)
    if x == y or (math.isfinite(x) and abs(x - y) <= 1e-9 * max(abs(x), abs(y), 1e-300)):
        if x in (math.inf, -math.inf) or same_value(a, b):
            return 0
    return -1 if x < y else 1


def _merged(parts: tuple[Part, ...]) -> list[Part]:
    """In order; those that touch are joined, empty ones are left out."""
    merged: list[Part] = []
    for part in sorted(parts, key=lambda p: (p.key[0], not p.closed[0])):
        order = _order(part.low, part.high)
        if order > 0 or (order == 0 and not all(part.closed)):
            continue
        last = merged[-1] if merged else None
        touch = 1 if last is None else _order(part.low, last.high)
        if last is None or touch > 0 or (touch == 0 and not (part.closed[0] or last.closed[1])):
            merged.append(part)
            continue
        end = _order(part.high, last.high)
        high = part.high if end > 0 else last.high
        right = (end > 0 and part.closed[1]) or (end < 0 and last.closed[1])
        right = right or (end == 0 and (part.closed[1] or last.closed[1]))
        merged[-1] = Part(last.low, high, (last.closed[0], right))
    return merged


def _combined(op: str, a: Region, b: Region) -> Region:
    """Always merged: else a chain of sets has exponentially many parts."""
    name = a.name or b.name
    if op == "union":
        return Region(tuple(_merged(a.parts + b.parts)), name)
    first = _merged(a.parts)
    second = _merged(_complement(b.parts) if op == "minus" else b.parts)
    parts = []
    while first and second:  # both are in order: what ends first meets nothing more
        parts.append(_meet(first[0], second[0]))
        (first if _order(first[0].high, second[0].high) < 0 else second).pop(0)
    return Region(tuple(_merged(tuple(parts))), name)


def _meet(a: Part, b: Part) -> Part:
    low, high = _order(a.low, b.low), _order(a.high, b.high)
    left, right = (a if low > 0 else b), (a if high < 0 else b)
    closed = (
        a.closed[0] and b.closed[0] if low == 0 else left.closed[0],
        a.closed[1] and b.closed[1] if high == 0 else right.closed[1],
    )
    return Part(left.low, right.high, closed)


def _complement(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    gaps, low, closed = [], _ALL.low, False
    for part in _merged(parts):
        gaps.append(Part(low, part.low, (closed, not part.closed[0])))
        low, closed = part.high, not part.closed[1]
    gaps.append(Part(low, _INFINITE, (closed, False)))
    return tuple(gaps)


def _of_relation(node: Node) -> Region | None:
    """Of `x > 1`, `1 < x <= 3`, `x != 2` and `x in S`."""
    signs, sides = node.value, node.args
    if signs == ("in",):
        inner = region_of(sides[1])
        return (
            None
            if inner is None or not _is_variable(sides[0])
            else Region(inner.parts, _name(sides[0]))
        )
    if any(sign not in _FLIPPED for sign in signs) or signs == ("=",):
        return None
    places = [k for k, side in enumerate(sides) if _is_variable(side)]
    constants = [s for k, s in enumerate(sides) if k not in places]
    if len(places) != 1 or any(symbols(s) - {"pi", "e"} for s in constants):
        return None
    at = places[0]
    if len(signs) > 2 or (len(signs) == 2 and at != 1):
        return None
    parts: tuple[Part, ...] = (_ALL,)
    for k, sign in enumerate(signs):
        left, right = sides[k], sides[k + 1]
        sign, bound = (sign, right) if left is sides[at] else (_FLIPPED[sign], left)
        parts = tuple(_meet(x, y) for x in parts for y in _half(sign, bound))
    return Region(parts, _name(sides[at]))


def _half(sign: str, bound: Node) -> tuple[Part, ...]:
    if sign == "=":
        return (Part(bound, bound, (True, True)),)
    if sign == "!=":
        return _complement((Part(bound, bound, (True, True)),))
    if sign[0] == "<":
        return (Part(_ALL.low, bound, (False, sign == "<=")),)
    return (Part(bound, _INFINITE, (sign == ">=", False)),)


def _is_variable(node: Node) -> bool:
    return (node.op == "sym" and node.value not in ("pi", "e", "i")) or node.op == "call"


def _name(node: Node) -> str | None:
    return node.value if node.op == "sym" else None


def _of_items(node: Node) -> Region | None:
    """Inequalities: `or` joins them; `and` means both, and so do commas if that is possible."""
    regions = []
    for item in node.args:
        region = region_of(item) if item.op in ("rel", "union", "built") or regions else None
        if (
            region is None
            and item.op == "rel"
            and item.value == ("=",)
            and _is_variable(item.args[0])
        ):
            value = item.args[1]
            region = Region((Part(value, value, (True, True)),), _name(item.args[0]))
        if region is None:
            return None
        regions.append(region)
    if len({r.name for r in regions} - {None}) > 1:
        return None
    if node.value != "or":
        both = regions[0]
        for region in regions[1:]:
            both = _combined("inter", both, region)
        strict = all(i.op == "rel" and not {"=", "in"} & set(i.value) for i in node.args)
        if both.parts or (node.value == "and" and strict):
            return both
    total = regions[0]
    for region in regions[1:]:
        total = _combined("union", total, region)
    return total


def _built(node: Node) -> Region | None:
    head, condition = node.args
    name = head
    whole: Region | None = Region((_ALL,))
    if head.op == "rel" and head.value == ("in",):
        name, whole = head.args[0], region_of(head.args[1])
    if not _is_variable(name) or whole is None:
        return None
    if condition.op == "rel" and condition.value == ("=",) and condition.args[0] == name:
        value = condition.args[1]
        inner: Region | None = Region(tuple(Part(v, v, (True, True)) for v in spread(value)))
    else:
        inner = region_of(condition)
    if inner is None or inner.name not in (None, _name(name)):
        return None
    return Region(_combined("inter", whole, inner).parts)


def is_region_like(node: Node) -> bool:
    """Whether it can be nothing but a set of numbers."""
    if node.op == "rel":
        return any(s in ("<", ">", "<=", ">=", "!=", "in") for s in node.value)
    if node.op == "items":
        return any(map(is_region_like, node.args))
    return node.op in ("union", "inter", "minus", "built", "reals")


__all__ = ["Region", "Unreadable", "is_region_like", "region_of", "same_region", "usual_brackets"]
