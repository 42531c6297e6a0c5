"""Where the reasoning steps of a response end: with lines, or with sentences and lines."""

from __future__ import annotations

import re

# Inline math: on one line, no space inside its dollars and no digit behind, as money has them.
_MATH = re.compile(
    r"\$\$.*?\$\$|\\\[.*?\\\]|\\\(.*?\\\)|\\begin\{([^{}]*)\}.*?\\end\{\1\}|\[asy\].*?\[/asy\]"
    r"|(?<!\\)\$(?=\S)[^$\n]*(?<![\s\\])\$(?!\d)",
    re.DOTALL,
)
_LINE_END = re.compile(r"\n+")
_STEP_END = re.compile(
    r"\n+|(?<=[.!?])(?<!\b[A-Za-z]\.)(?<!\b[A-Za-z]{2}\.)(?=\s+[A-Z])"  # not after `e.g.` or `vs.`
)


def line_ends(text: str) -> list[int]:
    """Where lines end, behind the line break; a run of breaks is one."""
    return [match.end() for match in _LINE_END.finditer(text)]


def sentence_ends(text: str) -> list[int]:
    """Where lines and sentences end that no math goes on beyond, as VinePPO cuts MATH solutions
    (arXiv 2410.01679), but for its cuts inside of long steps.

    A sentence ends with `.`, `!` or `?` before a space and a capital or math; inside of math in
    dollars, brackets or an environment nothing ends.
    """
    return [match.end() for match in _STEP_END.finditer(_MATH.sub(_hidden, text))]


def _hidden(match: re.Match) -> str:
    """Capitals in place of math; a full stop that ends it stays: `$x = 5.$`."""
    stop = match[0].rstrip("$])\\ \n").endswith(".")
    return "X" * (len(match[0]) - stop) + "." * stop
