"""Finds the answer in a response: the text after the thinking, the last box, exact numbers."""

from __future__ import annotations

import re
from fractions import Fraction

THINK, END_THINK = "<think>", "</think>"

_BOX_TOKEN = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_VERB = re.compile(r"\\(?:verb|lstinline)\*?([^\sa-zA-Z*{])")
_VERBATIM = re.compile(r"\\(begin|end)\{verbatim\}")
_BARE_BOX = re.compile(
    r"\\boxed(?:\s+([^\s{}$\\.,]+)|\s*(\\[dtc]?frac(?:\s*(?:[0-9]|\{[^{}]*\})){2}))"
)
_JOINT, _MOST_BOXES = 60, 20  # characters between boxes that belong together; how many may
_LONGEST_BOX = 800
_SEARCHED = 100_000  # characters at the end of a text, in which a box is looked for
_JOINED = re.compile(
    r"(?<=\})[\s$]*(?:,[\s$]*)?(?:(?:\\(?:text|mbox|quad|qquad)\s*\{?\s*)?(?:and|or)\s*\}?|,)"
    r"[\s$]*(?:[a-zA-Z]\s*=\s*)?$"
)
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

    A box in `\\verb`, in a verbatim block or behind the `%` of a comment is none.
    `\\boxed 7` and `\\boxed\\frac12`, as in some published solutions, count if there is no box with
    braces. The time is linear in the text: one pass with a stack, even if boxes are left open.
    Only the last 100000 characters, from the beginning of their first line, are searched.
    """
    opened: list[tuple[int, int]] = []  # token and text starts of a box, (-1, -1) for other braces
    text = _without_comments(_end(text))
    held = covered = (-1, -1)  # span of the text found, and of the boxes around it
    for match in _BOX_TOKEN.finditer(text):
        token = match[0]
        if token == "{":
            opened.append((-1, -1))
        elif token == "}":
            token_start, start = opened.pop() if opened else (-1, -1)
            if start >= 0:
                around = text[start : covered[0]] + text[covered[1] : match.start()]
                if covered[0] < start or around.strip():
                    held = (start, match.start())
                covered = (token_start, match.end())
        elif len(token) > 2:  # an escaped character has two
            opened.append((match.start(), match.end()))
    if held[0] >= 0:
        return text[held[0] : held[1]].strip()
    bare = _BARE_BOX.findall(text)
    return "".join(bare[-1]) if bare else None


def boxed_answer(text: str) -> str | None:
    """The content of the last box; of boxes that only commas, `and` or `or` separate, all of them.

    `\\boxed{1} or \\boxed{2}` is the answer `1, 2`, no choice between two.
    """
    last = last_boxed(text)
    if last is None or text.count("\\boxed") < 2:
        return last
    found, end = [last], text.rfind("\\boxed")
    while (match := _JOINED.search(text[max(end - _JOINT, 0) : end])) is not None:
        end -= len(match[0])
        before = last_boxed(text[max(end - _LONGEST_BOX, 0) : end])
        start = text.rfind("\\boxed", 0, end)
        if before is None or text[start:end] != f"\\boxed{{{before}}}":
            break
        found.append(before)
        end = start
        if len(found) > _MOST_BOXES:
            return last
    return last if len(set(found)) < len(found) else ", ".join(reversed(found))


def _end(text: str) -> str:
    """The last characters of a long text; verbatim text that began before them still is."""
    if len(text) <= _SEARCHED:
        return text
    cut = len(text) - _SEARCHED
    opened, closed = (text.rfind(f"\\{mark}{{verbatim}}", 0, cut) for mark in ("begin", "end"))
    line = text.rfind("\n", max(cut - _SEARCHED, 0), cut) + 1  # a comment is cut off as a whole
    return "\\begin{verbatim}\n" * (opened > closed) + text[line or cut :]


def _without_comments(text: str) -> str:
    """Without what TeX does not typeset as mathematics: comments and verbatim text."""
    if "%" not in text and "\\verb" not in text and "verbatim" not in text:
        return text
    kept, inside = [], False
    for line in text.split("\n"):
        for match in _VERBATIM.finditer(line):
            inside = match[1] == "begin"
        if inside:
            continue
        kept.append(line[: _comment(line)])
    lines, end = [], 0
    for line in kept:
        parts, end = [], 0
        while match := _VERB.search(line, end):
            close = line.find(match[1], match.end())
            parts.append(line[end : match.start()])
            end = len(line) if close < 0 else close + 1
        lines.append("".join([*parts, line[end:]]))
    return "\n".join(lines)


def _comment(line: str) -> int | None:
    """Where the comment of a line begins: at a `%` that ends no number and no bracket."""
    for match in re.finditer(r"%", line):
        before = match.start() - 1
        if before >= 0 and not line[before].isspace():
            continue  # 50% and \\%
        while before >= 0 and line[before].isspace():
            before -= 1
        if before < 0 or not (line[before].isdigit() or line[before] in ")}]$"):
            return match.start()
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
