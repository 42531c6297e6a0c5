"""Commands and functions: fractions, roots, sines, floors."""

from __future__ import annotations

from spo.tasks.algebra.node import Node, Unreadable, num
from spo.tasks.algebra.reader import Reader
from spo.tasks.algebra.tokens import FUNCTIONS, GREEK

FENCES = {"lfloor": ("rfloor", "floor"), "lceil": ("rceil", "ceil"), "lvert": ("rvert", "abs")}
FENCES |= {"lVert": ("rVert", "abs")}
_MANY = ("gcd", "lcm", "max", "min")


class Functions(Reader):
    """The rules of commands."""

    def command(self, name: str) -> Node:
        if name == "frac":
            return self.fraction()
        if name == "sqrt":
            index = num(2)
            if self.is_next("["):
                self.at += 1
                index = self.sum()
                self.expect("]")
            token = self.peek()
            plain = token is not None and token.kind == "op" and token.text == "("
            return Node("root", (self.base() if plain else self.argument(True), index))
        if name == "binom":
            return Node("func", (self.argument(True), self.argument(True)), "binom")
        if name in ("pi", "infty", "reals", "emptyset"):
            return {
                "pi": Node("sym", value="pi"),
                "infty": Node("inf"),
                "reals": Node("reals"),
                "emptyset": Node("set"),
            }[name]
        if name in GREEK:
            return Node("sym", value=name)
        if name in FENCES:
            close, function = FENCES[name]
            node = self.sum()
            self.expect(close)
            return Node("func", (node,), function)
        if name in FUNCTIONS:
            return self.function(name)
        raise Unreadable(f"the command {name!r}")

    def fraction(self) -> Node:
        if self.is_next("("):  # frac(1)(2)
            raise Unreadable("a fraction without braces")
        above = self.argument(True)
        return Node("div", (above, self.argument(True)))

    def function(self, name: str) -> Node:
        power: Node | None = None
        base: Node | None = None
        while self.is_next("^", "_"):
            mark = self.expect("^", "_")
            if mark == "^":
                power = self.argument()
            else:
                base = self.argument()
        if base is not None and name not in ("log", "lg"):
            raise Unreadable("an index behind a function")
        inverse = power is not None and power.op == "neg" and power.args[0] == num(1)
        if inverse and name in ("sin", "cos", "tan"):
            name, power = f"arc{name}", None
        if self.is_next("(", "{"):
            close = ")" if self.expect("(", "{") == "(" else "}"
            args = self.listed(close)
        else:
            args = (self.juxtaposed(),)
        if len(args) != 1 and name not in _MANY:
            raise Unreadable(f"{len(args)} arguments of {name}")
        node = Node("func", (*args, base) if base is not None else args, name)
        if self.is_next("^") and self.tokens[self.at - 1].text not in (")", "}"):
            raise Unreadable("a power of a function's argument")
        return node if power is None else Node("pow", (node, power))

    def juxtaposed(self) -> Node:
        """The argument of a function without brackets: the factors up to the next sign."""
        negative = self.is_next("-")
        self.at += negative
        node = self.power()
        while self.starts() and not self.is_next("(", "[", *FUNCTIONS):
            node = times(node, self.power())
        if self.is_next("/"):  # sin x/2 is read in two ways
            following = self.peek(1)
            if following is not None and following.kind == "num":
                self.at += 1
                node = Node("div", (node, self.power()))
        return Node("neg", (node,)) if negative else node


def times(left: Node, right: Node) -> Node:
    """A product; one with a matrix is taken entry by entry."""
    if left.op == "matrix" or right.op == "matrix":
        matrix, factor = (left, right) if left.op == "matrix" else (right, left)
        if factor.op == "matrix":
            raise Unreadable("a product of matrices")
        return _scaled(matrix, factor)
    return Node("mul", (left, right))


def _scaled(matrix: Node, factor: Node) -> Node:
    rows = tuple(
        Node("row", tuple(Node("mul", (factor, entry)) for entry in row.args))
        for row in matrix.args
    )
    return Node("matrix", rows, matrix.value)
