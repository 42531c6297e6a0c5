"""What stands between brackets: groups, tuples, intervals, sets, absolute values, matrices."""

from __future__ import annotations

from spo.tasks.algebra.node import Node, Unreadable
from spo.tasks.algebra.reader import Reader

_MATRICES = ("pmatrix", "bmatrix", "matrix", "smallmatrix", "vmatrix", "array", "Bmatrix")
_LISTS = ("cases", "aligned", "align", "gathered", "split")


class Brackets(Reader):
    """The rules of brackets and environments."""

    def listed(self, close: str) -> tuple[Node, ...]:
        bars, self.bars = self.bars, 0
        node = self.items()
        self.expect(close)
        self.bars = bars
        return node.args if node.op == "items" else (node,)

    def bracketed(self, opened: str) -> Node:
        """Groups, tuples, intervals, sets and absolute values."""
        if opened in ("|", "\\|"):
            self.bars += 1
            node = self.sum()
            self.bars -= 1
            self.expect("|", "\\|")
            return Node("func", (node,), "abs")
        bars, self.bars = self.bars, 0
        if opened in ("(", "["):
            node = self.items()
            close = self.expect(")", "]")
            self.bars = bars
            brackets = opened + close
            if node.op == "items":
                return Node("seq", node.args, brackets)
            if brackets not in ("()", "[]"):
                raise Unreadable("brackets that do not match")
            return node if node.op not in ("rel", "word") else Node("seq", (node,), brackets)
        if opened in ("\\{", "lbrace"):
            node = self.braced()
        elif opened == "langle":
            node = Node("seq", self.listed("rangle"), "()")
        elif opened == "{":
            node = self.items()
            self.expect("}")
            node = Node("set", node.args) if node.op == "items" else node
        else:
            raise Unreadable(f"expected a value, found {opened!r}")
        self.bars = bars
        return node

    def braced(self) -> Node:
        if self.is_next("\\}", "rbrace"):
            self.at += 1
            return Node("set")
        self.bars = 1
        head = self.items()
        if self.is_next("|", "mid", ":"):
            self.at += 1
            self.bars = 0
            node = Node("built", (head, self.items()))
        else:
            node = Node("set", head.args if head.op == "items" else (head,))
        self.expect("\\}", "rbrace")
        return node

    def environment(self, name: str) -> Node:
        rows: list[list[Node]] = [[]]
        if name not in (*_MATRICES, *_LISTS):
            raise Unreadable(f"the environment {name!r}")
        while (token := self.peek()) is not None and token.kind != "end":
            if token.text == "\\\\":
                rows.append([])
                self.at += 1
            elif token.text == "&" or (name in _LISTS and token.text in (",", ";")):
                self.at += 1
            elif name in _LISTS:
                rows[-1].append(self.item())
            else:
                rows[-1].append(self.side())
        if self.peek() is None:
            raise Unreadable("an environment that is not closed")
        self.at += 1
        rows = [row for row in rows if row]
        if not rows or len({len(row) for row in rows}) > 1:
            raise Unreadable("rows of different length")
        if name in _LISTS:
            return Node("items", tuple(row[0] for row in rows), "and")
        kind = "det" if name == "vmatrix" else None
        return Node("matrix", tuple(Node("row", tuple(row)) for row in rows), kind)
