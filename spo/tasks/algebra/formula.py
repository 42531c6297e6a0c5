"""Formulas by precedence: sums, products, powers."""

from __future__ import annotations

from dataclasses import replace

from spo.tasks.algebra.brackets import Brackets
from spo.tasks.algebra.functions import FENCES, Functions, times
from spo.tasks.algebra.node import Node, Unreadable, num
from spo.tasks.algebra.reader import DEEPEST
from spo.tasks.algebra.tokens import FUNCTIONS, GREEK, Token

_TIMES = ("*", "cdot", "times", "ast", "bullet")


class Formula(Functions, Brackets):
    """The rules of operators, and of what they join."""

    def sum(self) -> Node:
        self.deep += 1
        if self.deep > DEEPEST:
            raise Unreadable("too deep")
        node = self.product()
        while self.is_next("+", "-", "pm", "mp"):
            sign = self.tokens[self.at].text
            self.at += 1
            right = self.product()
            if sign in ("pm", "mp"):
                node = Node(sign, (node, right))
            elif sign == "-" and right.op == "set" and node.op in ("reals", "seq", "set", "minus"):
                node = Node("minus", (node, right))
            else:
                right = right if sign == "+" else Node("neg", (right,))
                node = Node("add", (node, right))
        self.deep -= 1
        return self.divided(node)

    def divided(self, above: Node) -> Node:
        """With what stands below it: a \\over b, n \\choose k."""
        if not self.is_next("over", "choose"):
            return above
        sign = self.expect("over", "choose")
        node = Node("div") if sign == "over" else Node("func", value="binom")
        return replace(node, args=(above, self.sum()))

    def product(self) -> Node:
        node = self.signed()
        while True:
            if self.is_next(*_TIMES):
                self.at += 1
                node = times(node, self.signed())
            elif self.is_next("/", "div"):
                if (token := self.peek(1)) is not None and token.kind == "word":
                    return node  # a unit
                self.at += 1
                node = Node("div", (node, self.signed()))
            elif self.starts():
                numbers = [token.kind == "num" for token in self.tokens[self.at - 1 : self.at + 1]]
                if all(numbers) and not (_is_power(node) and self._is_raised()):
                    raise Unreadable("two numbers with a space between them")
                mixed = numbers[0] and self.is_next("{")
                right = self.power()
                if mixed and right.op == "div" and all(arg.op == "num" for arg in right.args):
                    raise Unreadable("a fraction in braces behind a number")
                node = times(node, right)
            else:
                return node

    def _is_raised(self) -> bool:
        """Whether the number that follows has an exponent: 2^6 3^5."""
        token = self.peek(1)
        return token is not None and token.text == "^"

    def signed(self) -> Node:
        sign, marks = 1, []
        while self.is_next("-", "+", "pm", "mp"):
            text = self.tokens[self.at].text
            self.at += 1
            sign = -sign if text == "-" else sign
            if text in ("pm", "mp"):
                marks.append(text)
        node = self.power()
        if sign < 0:
            node = Node("neg", (node,))
        for mark in marks:
            node = Node(mark, (node,))
        return node

    def starts(self) -> bool:
        """Whether a factor follows without a sign."""
        token = self.peek()
        if token is None or token.kind in ("join", "word", "end"):
            return False
        if token.kind in ("num", "let", "begin"):
            return True
        if token.kind == "op":
            return token.text in ("(", "[", "{") or (token.text in ("|", "\\|") and not self.bars)
        if token.text == "frac":
            first, second = self.peek(1), self.peek(2)
            word = second is not None and second.kind == "word"
            return not (first is not None and first.text == "{" and word)
        known = ("sqrt", "pi", "binom", "infty", "operatorname", "emptyset", "langle", "reals")
        return (
            token.text in FUNCTIONS
            or token.text in GREEK
            or token.text in FENCES
            or (token.text in known)
        )

    def power(self) -> Node:
        """A base with what stands behind it."""
        self.deep += 1
        if self.deep > DEEPEST:
            raise Unreadable("too deep")
        node = self.base()
        while True:
            if self.is_next("!"):
                self.at += 1
                if self.is_next("!"):
                    raise Unreadable("a double factorial")
                node = Node("fact", (node,))
            elif self.is_next("^"):
                self.at += 1
                node = self.raised(node)
            elif self.is_next("%"):
                self.at += 1
                node = Node("pct", (node,))
            elif self.is_next("'") and node.op == "sym":
                self.at += 1
                node = Node("sym", value=f"{node.value}'")
            elif (
                self.is_next("(")
                and node.op == "sym"
                and node.value[:1] in "fghFG"
                and (not self.tokens[self.at].spaced)
            ):
                self.at += 1
                args = self.listed(")")
                node = Node("call", args, node.value)
            elif self.is_next("(") and _is_inverse(node):
                self.at += 1
                node = Node("call", self.listed(")"), f"{node.args[0].value}^-1")
            elif self.is_next("_"):
                self.at += 1
                node = self.indexed(node)
            else:
                self.deep -= 1
                return node

    def raised(self, node: Node) -> Node:
        if self.is_next("circ", "prime"):
            return self.marked(node)
        if self.is_next("{"):
            first, second = self.peek(1), self.peek(2)
            if first and second and first.text in ("circ", "prime") and second.text == "}":
                self.at += 1
                node = self.marked(node)
                self.expect("}")
                return node
        return Node("pow", (node, self.argument()))

    def marked(self, node: Node) -> Node:
        mark = self.expect("circ", "prime")
        if mark == "circ":
            return Node("deg", (node,))
        if node.op != "sym":
            raise Unreadable("a prime behind no letter")
        return Node("sym", value=f"{node.value}'")

    def indexed(self, node: Node) -> Node:
        """A letter with its index is another letter; a number with one names its base."""
        start = self.at
        below = self.argument() if not self._is_text_group() else self._text_group()
        if node.op == "num" and below.op == "num" and below.value.denominator == 1:
            digits = self.tokens[start - 2].text
            return Node("based", value=(digits.upper(), int(below.value)))
        if node.op == "sym":
            name = "".join(t.text for t in self.tokens[start : self.at] if t.text not in "{}")
            return Node("sym", value=f"{node.value}_{name}")
        raise Unreadable("an index behind neither a letter nor a number")

    def _is_text_group(self) -> bool:
        token = self.peek(1) if self.is_next("{") else self.peek()
        return token is not None and token.kind == "word"

    def _text_group(self) -> Node:
        braced = self.is_next("{")
        self.at += braced
        while (token := self.peek()) is not None and token.kind == "word":
            self.at += 1
        if braced:
            self.expect("}")
        return Node("word", value="")

    def base(self) -> Node:
        token = self.peek()
        if token is None:
            raise Unreadable("expected a value, found the end")
        self.at += 1
        if token.kind == "num":
            return self.number(token)
        if token.kind == "let":
            return Node("sym", value=token.text)
        if token.kind == "begin":
            return self.environment(token.text)
        if token.kind == "op" or token.text in ("langle", "lbrace"):
            return self.bracketed(token.text)
        if token.kind == "cmd":
            return self.command(token.text)
        raise Unreadable(f"expected a value, found {token.text!r}")

    def number(self, token: Token) -> Node:
        """A number, or a mixed one with the fraction behind it."""
        assert token.value is not None
        whole = num(token.value)
        if token.value.denominator > 1:
            return whole
        start = self.at
        following = self.peek()
        fraction: Node | None = None
        if following is not None and following.kind == "num" and following.spaced:
            below = self.peek(2)
            slash = self.peek(1)
            if (
                slash is not None
                and slash.text == "/"
                and below is not None
                and below.kind == "num"
            ):
                fraction = Node("div", (num(following.value or 0), num(below.value or 0)))
                self.at += 3
        elif self.is_next("frac"):
            try:
                self.at += 1
                fraction = Node("div", (self.argument(True), self.argument(True)))
            except Unreadable:
                fraction = None
        if fraction is not None and all(a.op == "num" for a in fraction.args):
            above, below = (a.value for a in fraction.args)
            if above.denominator == below.denominator == 1 and 0 <= above < below:
                return num(token.value + above / below)
        self.at = start
        return whole

    def argument(self, digit: bool = False) -> Node:
        """What stands in braces, or one token; of a command (`digit`) one digit: \\frac12."""
        if self.is_next("{"):
            self.at += 1
            node = self.side()
            self.expect("}")
            return node
        token = self.peek()
        if digit and token is not None and token.kind == "num" and len(token.text) > 1:
            if not token.text.isdigit():
                raise Unreadable("expected braces")
            first, rest = token.text[0], token.text[1:]
            self.tokens = list(self.tokens)
            self.tokens[self.at] = Token("num", rest, False, num(int(rest)).value)
            return num(int(first))
        if self.is_next("-", "+"):
            negative = self.expect("-", "+") == "-"
            node = self.argument(digit)
            return Node("neg", (node,)) if negative else node
        if token is not None and token.kind == "num":
            self.at += 1
            return num(token.value or 0)
        return self.base()


def _is_power(node: Node) -> bool:
    return node.op == "pow" or (node.op == "mul" and _is_power(node.args[-1]))


def _is_inverse(node: Node) -> bool:
    """Whether it is f^{-1}, which an argument follows."""
    if node.op != "pow" or node.args[1] != Node("neg", (num(1),)):
        return False
    return node.args[0].op == "sym" and node.args[0].value in ("f", "g", "h")
