"""A position in the tokens of an answer."""

from __future__ import annotations

from typing import Any

from spo.tasks.algebra.node import Unreadable
from spo.tasks.algebra.tokens import Token

DEEPEST = 60  # calls within calls


class Reader:
    """What the parts of the parser share; each part calls rules of the others."""

    def __init__(self, tokens: list[Token]):
        self.tokens, self.at = tokens, 0
        self.deep = 0
        self.bars = 0  # open | that the next one closes

    # What the parser of lists gives.
    items: Any
    side: Any
    item: Any
    separator: Any

    # Rules of other parts: a list, one side of a relation, a relation, a formula by precedence.
    items: Any
    side: Any
    item: Any
    separator: Any
    sum: Any
    power: Any
    starts: Any
    base: Any
    argument: Any
    listed: Any

    def peek(self, ahead: int = 0) -> Token | None:
        at = self.at + ahead
        return self.tokens[at] if at < len(self.tokens) else None

    def is_next(self, *texts: str) -> bool:
        token = self.peek()
        return token is not None and token.kind in ("op", "cmd") and token.text in texts

    def expect(self, *texts: str) -> str:
        if not self.is_next(*texts):
            raise Unreadable(f"expected {texts[0]!r}")
        self.at += 1
        return self.tokens[self.at - 1].text
