"""Cuts the spelling of an answer into numbers, letters, words, commands and signs."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from spo.tasks.algebra import units
from spo.tasks.algebra.node import Unreadable

DIGITS = 600  # of a number
EXPONENT = 400  # of a number such as 1e-7

TEXT = frozenset(
    "text textbf textit textrm textsf texttt textnormal textsc textup mbox hbox mathrm operatorname"
    " emph mathsf mathnormal".split()
)
_PLAIN = frozenset("mathbf mathit boldsymbol bm pmb boxed fbox underline ensuremath".split())
_DECORATED = frozenset(
    "vec hat overrightarrow overline bar widehat tilde mathcal mathbb mathfrak mathscr dot".split()
)
FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log lg exp abs floor ceil"
    " gcd lcm max min arg Re Im cis det".split()
)
_SPOKEN = ("cis", "sin", "cos", "tan", "log", "ln")  # in \\text{}, where `min` is a minute
ARCS = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi"
    " rho sigma tau phi varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell"
    " clubsuit heartsuit spadesuit triangle angle square".split()
)
_ASCII = {"infinity": "infty", "inf": "infty", "sqrt": "sqrt", "pi": "pi", "cup": "cup"} | ARCS
_ASCII |= {"union": "cup", "infty": "infty", "frac": "frac"}
_SYMBOLS = frozenset("abcdefijknpqrtuvwxyzABCDEFGHIMOPQRSTUXYZ")  # \mathrm{m} is a metre

_ATTACHED = frozenset("cm mm km kg ft lb oz hr mph ml mL".split())  # 5cm

_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\(?:overline|bar|dot)\s*\{?([0-9]+)\}?")
_THOUSANDS = re.compile(r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])(?:\.[0-9]+)?")
_NUMBER = re.compile(
    r"(?:[0-9]{1,3}(?:\{,\}[0-9]{3})+(?![0-9])|[0-9]{1,3}(?: [0-9]{3})+(?![0-9])|[0-9]+)"
    r"(?:\.[0-9]+)?|\.[0-9]+"
)
_POWER = re.compile(r"[eE]([+-]?[0-9]+)(?![A-Za-z0-9.])")
_COMMAND = re.compile(r"\\([a-zA-Z]+|\\|\{|\}|\||.)")
_LETTERS = re.compile(r"[A-Za-z]+")
_NAME = re.compile(r"\s*\{\s*([a-zA-Z*]+)\s*\}")
_COLUMNS = re.compile(r"\s*\{[lcr| ]*\}")


@dataclass(frozen=True, slots=True)
class Token:
    kind: str  # num, let, word, cmd, join (and, or), begin, end (of an environment), op
    text: str
    spaced: bool = False  # something separates it from the token before
    value: Fraction | None = None
    typed: bool = False  # a word in \\text{}, not among the letters of a formula


def tokens_of(text: str, thousands: bool) -> list[Token]:
    """The tokens of a spelling. `thousands`: outside of brackets 1,000 is one number, not two.

    Raises Unreadable for signs that no answer has.
    """
    found: list[Token] = []
    _cut(text, found, thousands, words=False)
    return found


def _cut(text: str, found: list[Token], thousands: bool, words: bool) -> None:
    at, depth = 0, 0
    while at < len(text):
        spaced = text[at] in " \t\n"
        if spaced:
            at += 1
            if at == len(text):
                return
            if text[at] == " ":
                continue
        sign = text[at]
        if sign.isascii() and (sign.isdigit() or sign == "."):
            at = _number(text, at, found, spaced, thousands and depth == 0)
        elif sign.isascii() and sign.isalpha():
            match = _LETTERS.match(text, at)
            assert match is not None
            at = match.end()
            _letters(match[0], text, at, found, spaced, words)
        elif sign == "\\":
            at = _command(text, at, found, spaced, thousands)
        elif sign in "+-*/^_=<>()[]{}|,;:!%'&?":
            depth += (sign in "([") - (sign in ")]")
            found.append(Token("op", sign, spaced))
            at += 1
        else:
            raise Unreadable(f"the sign {sign!r}")


def _number(text: str, at: int, found: list[Token], spaced: bool, thousands: bool) -> int:
    if match := _REPEATING.match(text, at):
        whole, fixed, repeated = match.groups()
        if len(match[0]) > DIGITS:
            raise Unreadable("a long number")
        above = int(whole + fixed + repeated) - int(whole + fixed or "0")
        value = Fraction(above, int("9" * len(repeated) + "0" * len(fixed)))
        found.append(Token("num", match[0], spaced, value))
        return match.end()
    match = (thousands and _THOUSANDS.match(text, at)) or _NUMBER.match(text, at)
    if not match:
        if re.match(r"\.\s*\.", text[at:]):
            raise Unreadable("an ellipsis")
        return at + 1  # a full stop
    if len(match[0]) > DIGITS:
        raise Unreadable("a long number")
    value, end = Fraction(re.sub(r"[{}, ]", "", match[0])), match.end()
    if (power := _POWER.match(text, end)) and len(power[1]) < 5 and abs(int(power[1])) <= EXPONENT:
        value, end = value * Fraction(10) ** int(power[1]), power.end()
    found.append(Token("num", text[at:end], spaced, value))
    return end


def _letters(run: str, text: str, end: int, found: list[Token], spaced: bool, words: bool) -> None:
    """Words in text; in formulas names of functions, units and other long words, else letters."""
    before = found[-1] if found else None
    lower = run.lower()
    if lower in ("and", "or"):
        found.append(Token("join", lower, spaced))
        return
    if before is not None and before.kind == "num" and run in _ATTACHED:
        found.append(Token("word", run, spaced))
        return
    behind = before is not None and (before.kind == "word" or (before.kind == "num" and spaced))
    if words:
        found.append(Token("word", run, spaced, typed=True))
    elif run in _ASCII or run in FUNCTIONS or run in GREEK:
        found.append(Token("cmd", _ASCII.get(run, run), spaced))
    elif run == "in" and before is not None and re.match(r"\s*(?:[(\[]|\\math)", text[end:]):
        found.append(Token("cmd", "in", spaced))
    elif (
        (behind and len(run) > 1 and (units.known(run) or lower in units.MEANS or len(run) > 2))
        or (behind and before is not None and before.kind == "word" and len(run) > 1)
        or (len(run) > 2 and (units.known(run) or lower in units.MEANS))
        or (len(run) > 3 and (run[1:].islower() or run.isupper()))
    ):
        found.append(Token("word", run, spaced))
    else:
        found.extend(Token("let", c, spaced and k == 0) for k, c in enumerate(run))


def _command(text: str, at: int, found: list[Token], spaced: bool, thousands: bool) -> int:
    match = _COMMAND.match(text, at)
    if match is None:
        raise Unreadable("a backslash at the end")
    name, end = match[1], match.end()
    if name in TEXT or name in _PLAIN or name in _DECORATED:
        start = re.compile(r"\s*\{").match(text, end)
        if start is None:  # \mathbf x
            if name in TEXT or name in _PLAIN:
                return end
            raise Unreadable(f"\\{name} without braces")
        close = _closing(text, start.end())
        inside = text[start.end() : close].strip()
        if name in _DECORATED:
            _decorated(name, inside, found, spaced)
        elif inside in FUNCTIONS and (inside in _SPOKEN or name in ("mathrm", "operatorname")):
            found.append(Token("cmd", inside, spaced))
        elif name in _PLAIN or (name in ("mathrm", "operatorname") and _is_formula(inside)):
            found.append(Token("op", "{", spaced))
            _cut(inside, found, thousands, words=False)
            found.append(Token("op", "}"))
        else:
            count = len(found)
            _cut(inside, found, thousands, words=True)
            if len(found) > count:
                first = found[count]
                found[count] = replace(first, spaced=True)
        return close + 1
    if name in ("begin", "end"):
        match = _NAME.match(text, end)
        if match is None:
            raise Unreadable(f"\\{name} without a name")
        found.append(Token(name, match[1].rstrip("*"), spaced))
        columns = _COLUMNS.match(text, match.end()) if match[1] == "array" else None
        return columns.end() if columns and name == "begin" else match.end()
    kind = "op" if name in ("\\", "{", "}", "|") else "cmd"
    found.append(Token(kind, "\\" + name if kind == "op" else name, spaced))
    return end


def _is_formula(inside: str) -> bool:
    return inside in _SYMBOLS or bool(re.fullmatch(r"[0-9.,+-]+", inside))


def _decorated(name: str, inside: str, found: list[Token], spaced: bool) -> None:
    if name == "mathbb" and inside == "R":
        found.append(Token("cmd", "reals", spaced))
    elif re.fullmatch(r"[A-Za-z0-9_{}' \\]+", inside):
        mark = {"overrightarrow": "vec", "bar": "overline", "widehat": "hat"}.get(name, name)
        found.append(Token("let", f"{mark} {inside}", spaced))
    else:
        raise Unreadable(f"\\{name} over more than a name")


def _closing(text: str, at: int) -> int:
    """Where the brace that is open at `at` closes."""
    depth = 1
    for match in re.compile(r"\\.|[{}]").finditer(text, at):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    raise Unreadable("a brace that is not closed")
