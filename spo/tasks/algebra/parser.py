"""From tokens to the tree of one answer: lists, relations and sets, above formulas."""

from __future__ import annotations

import re
from fractions import Fraction

from spo.tasks.algebra import units
from spo.tasks.algebra.formula import Formula
from spo.tasks.algebra.names import is_label
from spo.tasks.algebra.node import Node, Unreadable
from spo.tasks.algebra.tokens import tokens_of

_RELATIONS = {"=": "=", "<": "<", ">": ">", "le": "<=", "ge": ">=", "ne": "!=", "lt": "<"}
_RELATIONS |= {"gt": ">", "in": "in", "notin": "notin", "equiv": "equiv", "approx": "approx"}
_RELATIONS |= {"sim": "sim", "cong": "sim", "simeq": "approx", "doteq": "approx"}
_SETS = {"cup": "union", "cap": "inter", "setminus": "minus", "backslash": "minus"}
_CURRENCIES = ("dollar", "euro", "pound", "pounds", "yen", "rupee")
_CALLED = frozenset("apqsuPQRSTV")  # P(2) = 5; x(2) may be a product
_LONGEST = 64  # items of a list


def parse(text: str, thousands: bool = True) -> Node:
    """The tree of a spelling (see `spelled`).

    `thousands`: 1,000 outside of brackets is one number, not two. Raises Unreadable.
    """
    parser = Parser(tokens_of(text, thousands))
    node = parser.items()
    if parser.at < len(parser.tokens):
        raise Unreadable(f"expected the end, found {parser.tokens[parser.at].text!r}")
    return node


def _grouped(found: list[Node], between: list[str]) -> Node:
    """`p = 5, q = 2; p = 7, q = 2`: lists within a list."""
    groups = [[found[0]]]
    for sign, node in zip(between, found[1:], strict=False):
        if sign == ";":
            groups.append([])
        groups[-1].append(node)
    return Node("items", tuple(Node("seq", tuple(map(_unnamed, g)), "()") for g in groups), "or")


def _unnamed(node: Node) -> Node:
    named = node.op == "rel" and node.value == ("=",) and node.args[0].op == "sym"
    return node.args[1] if named else node


class Parser(Formula):
    """What stands above formulas."""

    def items(self) -> Node:
        """A list, or its only item."""
        found: list[Node] = []
        joins: set[str] = set()
        between: list[str] = []
        while True:
            while (sign := self.separator()) is not None:
                joins.add(sign)
            if self.is_end():
                break
            found.append(self.item())
            if len(found) > _LONGEST:
                raise Unreadable("a long list")
            if (sign := self.separator()) is None:
                break
            joins.add(sign)
            between.append(sign)
        if not found:
            raise Unreadable("expected an answer, found nothing")
        if len(found) == 1:
            return found[0]
        if ";" in joins and "," in joins:
            return _grouped(found, between)
        return Node("items", tuple(found), next((j for j in ("or", "and") if j in joins), ","))

    def separator(self) -> str | None:
        """Skip one separator of a list, and say which."""
        token = self.peek()
        if token is None:
            return None
        if token.kind == "join" or token.text in (",", ";", "quad", "qquad", "\\\\"):
            if token.kind in ("join", "op", "cmd"):
                self.at += 1
                return token.text
        return None

    def is_end(self) -> bool:
        token = self.peek()
        return (
            token is None
            or token.text in (")", "]", "}", "\\}", "rangle", "&")
            or (token.kind == "end" or (token.text in ("|", "mid", ":") and self.bars > 0))
        )

    def item(self) -> Node:
        """A chain of relations, or one side."""
        sides, signs = [], []
        if self.relation():  # a sign in front: `= 5`
            sign = self.take_relation()
            if sign not in ("=", "approx"):
                raise Unreadable("a relation without a left side")
        sides.append(self.side())
        while self.relation():
            signs.append(self.take_relation())
            sides.append(self.side())
        node = Node("rel", tuple(sides), tuple(signs)) if signs else sides[0]
        token = self.peek()
        if token is not None and token.text in ("pmod", "bmod", "mod"):
            self.at += 1
            node = Node("mod", (node, self.argument()))
        return node

    def relation(self) -> bool:
        token = self.peek()
        return token is not None and token.kind in ("op", "cmd") and token.text in _RELATIONS

    def take_relation(self) -> str:
        self.at += 1
        return _RELATIONS[self.tokens[self.at - 1].text]

    def side(self) -> Node:
        """Sets joined by their signs, a ratio, or one value with its unit."""
        node = self.value()
        while (token := self.peek()) is not None and token.kind == "cmd" and token.text in _SETS:
            self.at += 1
            node = Node(_SETS[token.text], (node, self.value()))
        parts = [node]
        while (token := self.peek()) is not None and not self.bars:
            if token.text != ":" and not (token.kind == "word" and token.text == "to"):
                break
            self.at += 1
            parts.append(self.value())
        if len(parts) > 1 and parts[0].op == "word":  # a label
            value = parts[-1] if len(parts) == 2 else Node("ratio", tuple(parts[1:]))
            named = is_label(parts[0].value)
            return value if named else Node("rel", (parts[0], value), ("=",))
        return Node("ratio", tuple(parts)) if len(parts) > 1 else node

    def base(self) -> Node:
        """What `Formula` reads, angles such as ABC, and P(2) before a sign of equality."""
        ahead = [token.text for token in self.tokens[self.at : self.at + 5]]
        corners = "".join(ahead[1:4])
        if ahead[:1] == ["angle"] and len(ahead) > 3 and re.fullmatch("[A-Z]{3}", corners):
            self.at += 4
            return Node("sym", value=f"angle {min(corners, corners[::-1])}")
        if len(ahead) == 5 and ahead[0] in _CALLED and [ahead[1], *ahead[3:]] == ["(", ")", "="]:
            self.at += 2
            return Node("call", self.listed(")"), ahead[0])
        return super().base()

    def value(self) -> Node:
        """A formula with the unit in front of or behind it, or words."""
        token = self.peek()
        if token is not None and token.kind == "word":
            return self.words()
        sign = 1
        if token is not None and token.text == "-" and self.is_currency(1):
            self.at, sign = self.at + 1, -1
        if self.is_currency():
            name = self.tokens[self.at].text
            self.at += 1
            node = self.scaled(self.sum())
            self.unit()  # `$5 million dollars`
            node = node if sign > 0 else Node("neg", (node,))
            return Node("unit", (node,), units.unit_of([(name, 1)]))
        node = self.scaled(self.sum())
        if node.op == "deg" and (token := self.peek()) is not None and token.text in ("C", "F"):
            self.at += 1
            name = "celsius" if token.text == "C" else "fahrenheit"
            return Node("unit", node.args, units.unit_of([(name, 1)]))
        if (found := self.unit()) is not None:
            node = Node("unit", (node.args[0] if node.op == "unit" else node,), found)
            if found.quantities and (token := self.peek()) is not None and token.kind == "num":
                return self.smaller(node, found)
        return node

    def smaller(self, node: Node, unit: units.Unit) -> Node:
        """With the smaller unit behind it: 1 hour 30 minutes."""
        other = self.value()
        if other.op != "unit" or other.value.quantities != unit.quantities:
            raise Unreadable("two numbers with different units")
        scale = Node("num", value=unit.size / other.value.size)
        large = Node("mul", (node.args[0], scale))
        return Node("unit", (Node("add", (large, other.args[0])),), other.value)

    def is_currency(self, ahead: int = 0) -> bool:
        token = self.peek(ahead)
        return token is not None and token.kind == "cmd" and token.text in _CURRENCIES

    def scaled(self, node: Node) -> Node:
        """With the word behind it: 5 million, 50 percent."""
        while (token := self.peek()) is not None and token.kind == "word":
            word = token.text.lower()
            if word in units.SCALES:
                node = Node("mul", (node, Node("num", value=Fraction(units.SCALES[word]))))
            elif word in ("percent", "pct"):
                node = Node("pct", (node,))
            else:
                break
            self.at += 1
        return node

    def words(self) -> Node:
        """Words that stand alone, such as a name."""
        found = []
        while (token := self.peek()) is not None and token.kind in ("word", "let"):
            if token.kind == "let" and not token.spaced:
                break
            found.append(token.text)
            self.at += 1
        return Node("word", value=" ".join(found))

    def unit(self) -> units.Unit | None:
        """The unit that follows; None if none does."""
        factors: list[tuple[str, int]] = []
        start, sign, square = self.at, 1, 1
        while (token := self.peek()) is not None:
            word = token.text.lower()
            if token.kind == "word" and word in ("square", "sq", "cubic"):
                square = 3 if word == "cubic" else 2
                self.at += 1
            elif token.kind == "word" and word == "per" or (token.text == "/" and factors):
                sign = -1
                self.at += 1
            elif token.kind == "word" and word == "to":  # a ratio
                break
            elif token.kind == "word" and word in units.FILLERS:
                self.at += 1
            elif token.kind == "word" or (token.kind == "let" and sign < 0 and token.text in "msh"):
                if not (token.typed or units.known(token.text) or word in units.MEANS):
                    raise Unreadable(f"the word {word!r}")
                self.at += 1
                factors.append((token.text, sign * square * self.unit_power()))
                square = 1
            elif token.kind == "cmd" and token.text in ("dollar", "euro", "pound", "yen"):
                self.at += 1
                factors.append((token.text, sign))
            elif token.kind == "cmd" and token.text == "frac" and self.is_unit_fraction():
                self.at += 1
                factors += self.unit_group(1) + self.unit_group(-1)
            elif token.text in ("cdot", "times", "*", "(", ")") and factors and self.is_word(1):
                self.at += 1
            else:
                break
        if square > 1 and not factors:
            factors.append(("unit", square))
        if self.at == start:
            return None
        if (found := units.unit_of(factors)) is None:
            raise Unreadable("words behind a number that are no unit")
        return found

    def is_word(self, ahead: int = 0) -> bool:
        token = self.peek(ahead)
        return token is not None and token.kind == "word"

    def is_unit_fraction(self) -> bool:
        first, second = self.peek(1), self.peek(2)
        return first is not None and first.text == "{" and second is not None and self.is_word(2)

    def unit_group(self, sign: int) -> list[tuple[str, int]]:
        self.expect("{")
        found = []
        while (token := self.peek()) is not None and token.kind == "word":
            self.at += 1
            found.append((token.text, sign * self.unit_power()))
        self.expect("}")
        return found

    def unit_power(self) -> int:
        token = self.peek()
        if token is None or token.text != "^":
            return 1
        self.at += 1
        power = self.argument()
        negative = power.op == "neg"
        power = power.args[0] if negative else power
        if power.op != "num" or power.value not in (1, 2, 3, 4):
            raise Unreadable("the power of a unit")
        return int(power.value) * (-1 if negative else 1)
