"""Names before a sign of equality: `x`, `f(x)`, `m + n`, `AB`."""

from __future__ import annotations

from spo.tasks.algebra.node import Node, symbols


def is_name(node: Node, answer: Node | None = None) -> bool:
    """Whether it may stand before a sign of equality and be no part of the answer.

    Beside an `answer` without variables, formulas of names without numbers are names, too.
    """
    if node.op == "word":
        return True
    if not symbols(node) - {"pi", "e", "i"}:
        return False
    if node.op in ("seq", "mul"):
        first, *others = node.args
        return is_name(first, answer) and all(
            is_name(arg, answer) or (arg.op == "num" and first.op == "sym") for arg in others
        )
    if node.op in ("sym", "call") or _is_derivative(node):
        return True
    if answer is None or symbols(answer) - {"pi", "e", "i"}:
        return False
    if node.op == "pow":  # a^2 + b^2 = 25, but not x^2 - 25 = 0
        return is_name(node.args[0], answer)
    return bool(node.args) and all(is_name(arg, answer) for arg in node.args)


def _is_derivative(node: Node) -> bool:
    """dy/dx"""
    parts = [arg for arg in node.args if arg.op == "mul" and arg.args[0] == Node("sym", value="d")]
    return node.op == "div" and len(parts) == 2 and all(p.args[1].op == "sym" for p in parts)


def name_of(node: Node) -> str:
    """The name as a text that tells names apart."""
    if node.op in ("sym", "word"):
        return str(node.value)
    return f"{node.value or ''}({','.join(map(name_of, node.args))})"
