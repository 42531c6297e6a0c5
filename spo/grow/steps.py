"""Where the reasoning steps of a response end: with lines, or with sentences and lines."""

from __future__ import annotations

import re

# Display math has at most 1000 characters, so that what is opened and never closed costs little.
# Inline math: on one line, no space inside its dollars and no digit behind, as money has them.
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
    """Where lines end, behind the line break; a run of breaks is one."""
    return [match.end() for match in _LINE_END.finditer(text)]


def sentence_ends(text: str) -> list[int]:
    """Where lines and sentences end that no math goes on beyond, as VinePPO cuts MATH solutions
    (arXiv 2410.01679), but for its cuts inside of long steps.

    A sentence ends with `.`, `!` or `?` before a space and a capital or math, but for some
    abbreviations; inside of math in brackets, an environment, or dollars without spaces at their
    inner sides nothing ends.
    """
    return [match.end() for match in _STEP_END.finditer(_MATH.sub(_hidden, text))]


def _hidden(match: re.Match) -> str:
    """Capitals in place of math; a full stop that ends it stays: `$x = 5.$`."""
    stop = match[0].rstrip("$])\\ \n").endswith(".")
    return "X" * (len(match[0]) - stop) + "." * stop
