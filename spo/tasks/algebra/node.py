"""The tree of an answer, and how it is shortened to what can be compared."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any


class Unreadable(ValueError):
    """The text is no mathematics that this package reads, or a value that it does not compute."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operation.

    `op` says how `args` and `value` are meant: num (value: Fraction), sym and word (value: name),
    add, mul, div, pow, neg, pct, deg, fact, func (value: its name), call (a letter's function),
    root, pm and mp (one or two args), seq (value: its brackets), set, matrix (rows), row, rel
    (value: its signs), items (a list without brackets), union, minus, inter, built (set builder),
    inf, reals, unit (value: a `Unit`), based (value: digits and base), ratio, approx.
    """

    op: str
    args: tuple[Node, ...] = ()
    value: Any = None

    def walk(self) -> Iterator[Node]:
        """This node and all below it."""
        todo: list[Node] = [self]
        while todo:
            node = todo.pop()
            yield node
            todo.extend(node.args)


def num(value: int | Fraction) -> Node:
    return Node("num", value=Fraction(value))


def symbols(node: Node) -> set[str]:
    """Names of the variables; those of functions have `()` behind them."""
    names = {n.value for n in node.walk() if n.op == "sym"}
    return names | {f"{n.value}()" for n in node.walk() if n.op == "call"}


def spread(node: Node) -> list[Node]:
    """The expressions that one with plus-minus signs stands for.

    Several plus-minus signs vary on their own; with a minus-plus they all go together.
    """
    signs = [n for n in node.walk() if n.op in ("pm", "mp")]
    if not signs:
        return [node]
    if len(signs) > 3:
        raise Unreadable("too many plus-minus signs")
    if any(n.op == "mp" for n in signs):
        return [_chosen(node, [k] * len(signs))[0] for k in (1, -1)]
    choices = [[]]
    for _ in signs:
        choices = [[*c, k] for c in choices for k in (1, -1)]
    return [_chosen(node, list(choice))[0] for choice in choices]


def _chosen(node: Node, choice: list[int]) -> tuple[Node, list[int]]:
    sign = 0
    if node.op in ("pm", "mp"):
        sign, choice = choice[0] * (1 if node.op == "pm" else -1), choice[1:]
    args = []
    for arg in node.args:
        arg, choice = _chosen(arg, choice)
        args.append(arg)
    if sign:
        last = args[-1] if sign > 0 else Node("neg", (args[-1],))
        return (last if len(args) == 1 else Node("add", (args[0], last))), choice
    return Node(node.op, tuple(args), node.value), choice


def is_literal(node: Node) -> bool:
    """Whether it is one number as written: 5, -2.5, 3/4, 50%."""
    if node.op in ("neg", "pct", "deg") and len(node.args) == 1:
        return is_literal(node.args[0])
    if node.op == "div":
        return all(arg.op == "num" for arg in _bare(node))
    return node.op == "num"


def _bare(node: Node) -> list[Node]:
    return [arg.args[0] if arg.op == "neg" else arg for arg in node.args]


def operations(node: Node) -> int:
    """How many operations a reader has to carry out; signs, fractions and factors are free."""
    if is_literal(node):
        return 0
    own = int(node.op in ("add", "mul", "div", "pow", "fact", "func", "call", "root", "pm", "mp"))
    if node.op == "mul" and any(is_literal(arg) for arg in node.args):
        own = 0
    return own + sum(map(operations, node.args))
