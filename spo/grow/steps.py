"""Where the reasoning steps of a response end: with lines, or with sentences and lines."""

from __future__ import annotations

import re

# Display math has at most 1000 characters, so that math that is never closed costs little time.
# Inline math is on one line, with no space inside its dollars and no digit after it, unlike money.
_MATH = re.compile(
    r"\$\$.{0,1000}?\$\$|\\\[.{0,1000}?\\\]|\\\(.{0,1000}?\\\)"
    r"|\\begin\{([^{}]{0,40})\}.{0,1000}?\\end\{\1\}|\[asy\].{0,1000}?\[/asy\]"
    r"|(?<!\\)\$(?=\S)(?:[^$\n\\]|\\.)*(?<!\s)\$(?!\d)",
    re.DOTALL,
)
_LINE_END = re.compile(r"\n+")
_ABBREVIATIONS = ("e.g.", "i.e.", "vs.", "cf.", "Mr.", "Mrs.", "Dr.", "No.", "Fig.", "Eq.")
_STEP_END = re.compile(
    r"\n+|(?<=[.!?])"
    + "".join(rf"(?<!\b{re.escape(word)})" for word in _ABBREVIATIONS)
    + r"(?=\s+[A-Z])"
)


def line_ends(text: str) -> list[int]:
    """Where lines end, after the line break; a run of breaks counts as one."""
    return [match.end() for match in _LINE_END.finditer(text)]


def sentence_ends(text: str) -> list[int]:
    """Where lines and sentences end outside math: VinePPO's cuts of MATH solutions (arXiv
    2410.01679), without its cuts inside long steps.

    A sentence ends with `.`, `!` or `?` before a space and a capital or math, except after some
    abbreviations. Nothing ends inside math: in brackets, in an environment, or between dollars
    without spaces at their inner sides.
    """
    return [match.end() for match in _STEP_END.finditer(_MATH.sub(_hidden, text))]


def _hidden(match: re.Match) -> str:
    """Capitals of the length of the math; a full stop at its end is kept: `$x = 5.$`."""
    stop = match[0].rstrip("$])\\ \n").endswith(".")
    return "X" * (len(match[0]) - stop) + "." * stop
