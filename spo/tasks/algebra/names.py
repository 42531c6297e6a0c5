"""Names before a sign of equality: `x`, `f(x)`, `m + n`, `AB`, `Area`."""

from __future__ import annotations

from spo.tasks.algebra import units
from spo.tasks.algebra.node import Node, symbols

_CONSTANTS = {"pi", "e", "i"}
_LABELS = frozenset(
    "a an the of is are in for to by and with from at all our your my its his her their this that"
    " so thus hence therefore final answer answers result results required desired requested"
    " total overall combined sum difference product quotient ratio value values amount quantity"
    " number numbers count cost costs price prices profit revenue salary wage pay income savings"
    " money change rate speed velocity distance length lengths width height depth base radius"
    " diameter circumference perimeter area surface volume weight mass density temperature time"
    " duration age ages year date day probability chance average mean median mode range variance"
    " deviation standard expected maximum minimum max min largest smallest greatest least highest"
    " lowest longest shortest first last next slope intercept intercepts vertex center centre focus"
    " directrix axis domain range period amplitude frequency determinant rank trace coefficient"
    " coefficients constant terms degree roots zeros solution solutions sequence term remainder"
    " gcd lcm gcf greatest common divisor denominator numerator percent percentage force energy"
    " work power current voltage resistance score hypotenuse leg legs angle angles side sides"
    " measure dimensions coordinates point interval set shaded region equation function formula"
    " expression needed left remaining used sold bought made paid spent earned saved per each"
    " new original initial".split()
)
_OPERATIONS = frozenset("square cube root multiple factor triple".split())
_LONGEST = 8  # words of a label


def is_label(text: str) -> bool:
    """Whether words may stand before a sign of equality or a colon: they leave the value alone.

    `Area`, `The number of apples`, but neither `not the answer` nor `half of it`.
    """
    found = text.split()
    return 0 < len(found) <= _LONGEST and all(map(_is_harmless, found))


def _is_harmless(word: str) -> bool:
    lower = word.lower()
    if (
        len(word) == 1
        or lower in _LABELS
        or (word.isupper() and len(word) <= 4 and units.is_harmless(word))
    ):
        return True
    return units.known(word) and units.is_harmless(word) and lower not in _OPERATIONS


def is_name(node: Node) -> bool:
    """Whether it may stand before a sign of equality and be no part of the answer.

    Names are letters, f(x), dy/dx, tuples of names, and sums of products of letters, each once:
    `m + n`, `AB`; neither `-x` nor `x^2`, whose value is another one than that of the name.
    """
    if node.op == "word":
        return is_label(str(node.value))
    if node.op == "seq":
        return bool(node.args) and all(map(is_name, node.args))
    if _is_derivative(node):
        return True
    first, *others = _parts(node, "add")
    others = [term.args[0] if term.op == "neg" else term for term in others]
    terms = [_parts(term, "mul") for term in (first, *others)]
    if len({*map(frozenset, terms)}) < len(terms):
        return False
    return all(len({*term}) == len(term) and all(map(_is_letter, term)) for term in terms)


def is_own_name(node: Node, value: Node) -> bool:
    """Whether the data's answer may be given without what stands before its sign of equality.

    The data's own words are a name, and so are its formulas of letters for a number: `|AB| = 1`.
    """
    if node.op == "word" or is_name(node):
        return True
    if node.op == "mul" and node.args[0].op == "sym":  # x2, P(2)
        return all(is_name(arg) or arg.op == "num" for arg in node.args)
    plain = not symbols(value) - _CONSTANTS
    return plain and node.op in ("div", "ratio", "func") and _has_letters_only(node)


def _has_letters_only(node: Node) -> bool:
    if node.op == "pow":
        return _has_letters_only(node.args[0])
    return _is_letter(node) or (bool(node.args) and all(map(_has_letters_only, node.args)))


def _is_letter(node: Node) -> bool:
    return node.op == "call" or (node.op == "sym" and node.value not in _CONSTANTS)


def _parts(node: Node, op: str) -> list[Node]:
    """The terms of a sum or the factors of a product."""
    if node.op != op:
        return [node]
    return [part for arg in node.args for part in _parts(arg, op)]


def _is_derivative(node: Node) -> bool:
    """dy/dx"""
    parts = [arg for arg in node.args if arg.op == "mul" and arg.args[0] == Node("sym", value="d")]
    return node.op == "div" and len(parts) == 2 and all(p.args[1].op == "sym" for p in parts)


def name_of(node: Node) -> str:
    """The name as a text that tells names apart."""
    if node.op in ("sym", "word"):
        return str(node.value)
    return f"{node.value or ''}({','.join(map(name_of, node.args))})"
