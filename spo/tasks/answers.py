"""Finds the answer in a response: the text after the thinking, the last box, exact numbers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

THINK, END_THINK = "<think>", "</think>"

_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox|[hv]?phantom)\s*\{|\\.|[{}]", re.DOTALL)
_HIDDEN = re.compile(  # to its end, or to that of the text
    r"<!--.*?(?:-->|\Z)"
    r"|\\iffalse(?![a-zA-Z]).*?(?:\\fi(?![a-zA-Z])|\Z)"
    r"|\\begin\{(verbatim\*?|Verbatim|lstlisting|minted|comment)\}.*?(?:\\end\{\1\}|\Z)"
    r"|\\(?:verb|lstinline)\*?([^\sa-zA-Z*{])[^\n]*?(?:\2|(?=\n)|\Z)",
    re.DOTALL,
)
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`'\n]*`", re.DOTALL)
_PERCENT = re.compile(r"(\S|^)(\s*)%")
_NOTE = re.compile(r"(?<!\\)%\s*[a-zA-Z].*")
_BOX_NEXT = re.compile(r"[\s$]*\\(?:boxed|fbox)(?![a-zA-Z])")
_BARE_BOX = re.compile(
    r"\\boxed(?:\s+([^\s{}$\\.,]+)|\s*(\\[dtc]?frac(?:\s*(?:[0-9]|\{[^{}]*\})){2}))"
)
_SEARCHED = 100_000  # characters at the end of a text, in which a box is looked for
_CHOICE = r"[,;/|&]|\\(?:lor|vee|land|wedge)\b|\b(?:and|or|alternatively|otherwise|vs|versus)\b"
_HEDGE = "maybe|perhaps|possibly|probably|else|even|also|either|both|it|could|might|may|be|is"
_BETWEEN = re.compile(  # boxes of one list
    rf"(?:[\s$().*_:!?%{{}}\u2013\u2014-]|\\[()\[\]{{}}\\%]|\\(?:text|mbox|mathrm|textrm|q?quad)\b"
    rf"|\b(?:{_HEDGE})\b|\b[a-z]\s*=|{_CHOICE})*",
    re.IGNORECASE,
)
_CHOOSE = re.compile(_CHOICE, re.IGNORECASE)
_SPACE = re.compile(r"\\[,!;: ]|~")
_NUMBER = re.compile(
    r"(?:\\?\$)*([-+]?)(?:\\?\$)*\s*"
    r"((?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)(?:\s*/\s*([0-9]+))?"
    r"\s*(?:\\?[%$])*\.?\$?"
)
_MAX_LENGTH = 100  # characters of a number


def after_think(text: str) -> str:
    """The text after the last `</think>`; the whole response if it does not think.

    Empty if thinking was opened and not closed: then there is no answer.
    """
    answer = text.rpartition(END_THINK)[2]
    return "" if THINK in answer else answer


def last_boxed(text: str) -> str | None:
    """The content of the last balanced `\\boxed{}` or `\\fbox{}`, or of the only box inside it.

    What is not shown holds no box: `\\verb` and verbatim blocks, comments of TeX and HTML,
    `\\iffalse`, `\\phantom`. A box in backticks counts if there is no other.
    `\\boxed 7` and `\\boxed\\frac12`, as in some published solutions, count if there is no box with
    braces. The time is linear in the text: one pass with a stack, even if boxes are left open.
    Only the last 100000 characters, from the beginning of their first line, are searched.
    """
    _, boxes = _shown_boxes(text)
    return boxes[-1].content if boxes else None


def boxed_answers(text: str) -> list[str]:
    """The content of the last box; of boxes that only signs and words of a list separate, of all.

    `\\boxed{1} or \\boxed{2}` is the list of both, no choice between two; so is `maybe` after the
    `or`. A content that is there twice counts once. Empty if there is no box.
    """
    text, boxes = _shown_boxes(text)
    if not boxes:
        return []
    found = {boxes[-1].content: None}
    for before, after in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        between = _SPACE.sub(" ", text[before.end : after.start])
        if not (_BETWEEN.fullmatch(between) and _CHOOSE.search(between)):
            break
        found[before.content] = None
    return list(reversed(found))


@dataclass(frozen=True)
class _Box:
    start: int  # of its command
    end: int
    content: str


def _shown_boxes(text: str) -> tuple[str, list[_Box]]:
    """The text that is shown and its outermost boxes, in order."""
    text = _HIDDEN.sub(" ", _end(text))
    text = "\n".join(line[: _comment(line)] for line in text.split("\n"))
    without = _CODE.sub(" ", text) if "`" in text else text
    boxes = _boxes(without)
    return (without, boxes) if boxes else (text, _boxes(text))


def _end(text: str) -> str:
    """The last characters of a long text; verbatim text that began before them still is."""
    if len(text) <= _SEARCHED:
        return text
    cut = len(text) - _SEARCHED
    opened, closed = (text.rfind(f"\\{mark}{{verbatim}}", 0, cut) for mark in ("begin", "end"))
    line = text.rfind("\n", max(cut - _SEARCHED, 0), cut) + 1  # a comment is cut off as a whole
    return "\\begin{verbatim}\n" * (opened > closed) + text[line or cut :]


def _boxes(text: str) -> list[_Box]:
    opened: list[tuple[int, int]] = []  # token and text starts of a box, (-1, -1) for other braces
    boxes: list[_Box] = []
    for match in _BOX_TOKEN.finditer(text):
        token = match[0]
        if token == "{":
            opened.append((-1, -1))
        elif token == "}":
            token_start, start = opened.pop() if opened else (-1, -1)
            if start < 0:
                continue
            inner = boxes[-1] if boxes and boxes[-1].start >= start else None
            while boxes and boxes[-1].start >= start:
                boxes.pop()
            if text.startswith(("boxed", "fbox"), token_start + 1):  # no phantom
                end = match.start()
                alone = inner and not (text[start : inner.start] + text[inner.end : end]).strip()
                content = inner.content if inner and alone else _without_comments(text[start:end])
                boxes.append(_Box(token_start, match.end(), content))
        elif len(token) > 2:  # an escaped character has two
            opened.append((match.start(), match.end()))
    return boxes or [
        _Box(bare.start(), bare.end(), "".join(bare.groups("")))
        for bare in _BARE_BOX.finditer(text)
    ]


def _without_comments(content: str) -> str:
    """The content of a box, without comments that end before it does."""
    if "%" not in content:
        return content.strip()
    *lines, last = content.split("\n")
    return "\n".join([*(_NOTE.sub("", line) for line in lines), last]).strip()


def _comment(line: str) -> int | None:
    r"""Where the comment of a line begins.

    At a `%` with nothing before it; or with a box behind it that it hides, and a space before it:
    directly behind it, or anywhere if there is a box before it. `the % change is \boxed{5}`,
    `50% of \boxed{5}` and `50 % \boxed{5}` have none.
    """
    boxed = line.find("\\boxed"), line.find("\\fbox")
    first = min((start for start in boxed if start >= 0), default=len(line))
    for match in _PERCENT.finditer(line):
        before, space = match.groups()
        if not before:
            return match.end() - 1
        if before == "\\" or not space and before != "}":
            continue  # \\% and 50%
        number, hides = before.isdigit() or before in ")]$", first < match.start()
        if _BOX_NEXT.match(line, match.end()):
            if hides or not number:
                return match.end() - 1
        elif hides and not number and before != "}":
            return match.end() - 1
    return None


def exact_number(text: str) -> Fraction | None:
    """The value of `text` if it is one number in ASCII digits, else None.

    Thousands separators, dollar and percent signs, LaTeX spaces, bold type and a full stop at the
    end are ignored: `-\\$1,234.50.` is -1234.5. Simple fractions such as `3/4` are numbers too.
    """
    if len(text) > _MAX_LENGTH:
        return None
    plain = _SPACE.sub("", text.strip().strip("*")).replace("{,}", ",").replace("\u2212", "-")
    match = _NUMBER.fullmatch(plain.strip())
    if match is None:
        return None
    sign, number, divisor = match.groups()
    if divisor is not None and int(divisor) == 0:
        return None
    value = Fraction(number.replace(",", "")) / int(divisor or 1)
    return -value if sign == "-" else value
