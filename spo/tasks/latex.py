"""Makes LaTeX answers comparable: removes spaces, wrappers, units and separators without meaning.

math-verify reads most LaTeX, but reads some of it too generously: `6 = 5` as 5, `(1,2)` as the set
{1, 2}, `1 2` as 3, `13_8` as 13. This module decides such cases before math-verify is called.
"""

from __future__ import annotations

import re

from spo.tasks.answers import exact_number

SCALES = {
    "dozen": "12",
    "hundred": "10^{2}",
    "thousand": "10^{3}",
    "million": "10^{6}",
    "billion": "10^{9}",
    "trillion": "10^{12}",
}

_END = r"(?![a-zA-Z])"  # of a command
_DEGREES = rf"(?:\^\s*\{{?\s*\\circ\s*\}}?|\\degree{_END}|\u00b0)"
_REPLACED = [
    (re.compile(pattern), new)
    for pattern, new in (
        (rf"\\(?:displaystyle|textstyle|left|right|[bB]igg?[lr]?){_END}", ""),
        (r"(?<!\\)\\[()]|(?<!\\)\$", ""),  # math delimiters
        (r"\\(?:text)?color\s*\{\w*\}", ""),
        (rf"\\[dtc]frac{_END}", r"\\frac"),
        (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (rf"\\(sin|cos|tan)\s*[({{]?([0-9.]+){_DEGREES}\s*[)}}]?", r"\\\1(\\frac{\2\\pi}{180})"),
        (rf"\\(?:varnothing|O){_END}", r"\\emptyset"),
        (rf"\\(?:leqslant|leq){_END}", r"\\le"),
        (rf"\\(?:geqslant|geq){_END}", r"\\ge"),
        (r"\{\s*,\s*\}|,\s*\\!\s*", ","),
        (rf"\\q?quad{_END}", ", "),
        (r"(?<!\\)\\[,;:! ]|~|\u00a0|\u2009", " "),
        (_DEGREES, ""),
        ("\u2212", "-"),
        ("\u221e", r"\\infty "),
        ("\u03c0", r"\\pi "),
        ("\u00d7", r"\\times "),
        (r"\u221a\(?([0-9]+)\)?", r"\\sqrt{\1}"),
        (r"(?<![0-9._^])([0-9]{1,3}) (?=[0-9]{3}(?![0-9]))", r"\1"),  # 10 000
    )
]
_TEXT = re.compile(
    r"\\(text(?:bf|it|rm|normal)?|mbox|hbox|mathrm|mathbf)\s*\{([^{}]*)\}(\s*\^\s*\{?[0-9]\}?)?"
)
_MEANS = re.compile(
    r"(?<![\^{])[0-9]|\b(?:or|and|not|maybe|if|either|odd|even|[ap]\.?m)\b", re.IGNORECASE
)
_ITEM = re.compile(r"(?:^|[,;(\[{]|\b(?:or|and)\s*\})\s*$")
_SCALE = re.compile(rf"([0-9])\s*(?:\\text\s*\{{)?\s*({'|'.join(SCALES)})\b([^{{}}]*\}})?")
_REPEATING = re.compile(r"([0-9]{0,12})\.([0-9]{0,12})\\overline\s*\{([0-9]{1,12})\}")
_RELATION = re.compile(rf"[=<>]|\\(?:le|ge|ne|neq|lt|gt|in|equiv|sim){_END}")
_NAMED = re.compile(r"(^|,)\s*[a-zA-Z](?:_\{?\w\}?)?\s*=\s*")
_NUMERIC = re.compile(
    rf"\\(?:frac|sqrt|pi|cdot|times|infty|pm|binom|log|ln|sin|cos|tan|text){_END}"
)
_DECIMAL = re.compile(r"(?<![0-9_.])([0-9]*)\.([0-9]+)(?![0-9.])")
_UNIT_WORD = (
    r"(?:dollars?|cents?|pounds?|euros?|percent|degrees?|radians?|people|persons?|men|women|children"
    r"|students?|boys|girls|ways|times|seconds?|minutes?|hours?|days?|weeks?|months?|years?"
    r"|(?:kilo|centi|milli)?met(?:er|re)s?|inch(?:es)?|feet|foot|yards?|miles?|acres?|(?:kilo|milli)?grams?"
    r"|ounces?|tons?|(?:milli)?lit(?:er|re)s?|gallons?|quarts?|pints?|cups?|units?|points?|coins?"
    r"|apples?|books?|cards?|balls?|marbles?|numbers?|integers?|values?|solutions?|pairs?"
    r"|[kcm]?m|in|ft|yd|mi|[km]?g|lbs?|oz|m?L|s|min|hr?|mph)"
)
_UNIT = re.compile(
    rf"(.*[0-9])\s+(?:(?:square|cubic|sq\.?)\s+)?{_UNIT_WORD}(?:(?:/|\s+per\s+){_UNIT_WORD})?"
    r"(?:\s*\^\s*\{?[23]\}?)?",
    re.IGNORECASE,
)
_BASED = re.compile(r"([0-9A-Fa-f]+)(?:_\s*\{?\s*([0-9]{1,2})\s*\}?)?")
_SIMPLE_FRACTION = re.compile(r"(-?)\\frac\s*\{(-?)([0-9]+)\}\s*\{([0-9]+)\}")
_SYMBOLS = frozenset("abcdefijknpqrtuvwxyzABCDEFGHIMOPQRSTUXYZ")  # \mathrm{m} is a metre
_WORDS = re.compile(r"[A-Za-z(][A-Za-z' .,()-]*")
_CLOSES = {"(": ")]", "[": ")]", "\\{": ("\\}",)}


def clean(text: str) -> str:
    """The answer without formatting; words in it become separators or are removed."""
    for pattern, new in _REPLACED:
        text = pattern.sub(new, text)
    text = _SCALE.sub(lambda m: rf"{m[1]} \cdot {SCALES[m[2]]}", text.strip())
    text = _TEXT.sub(_inline, text)
    text = re.sub(r",?\s*\b(?:or|and)\b", ",", text)
    text = _REPEATING.sub(_fraction, text)
    text = _SIMPLE_FRACTION.sub(r"\1\2\3/\4", text) if _SIMPLE_FRACTION.fullmatch(text) else text
    text = re.sub(r"^\s*\\approx\s*|\\approx.*$|[.;,:\s\\]+$", "", text)
    return re.sub(r"\s+", " ", text).strip()


def _inline(match: re.Match) -> str:
    """Keep words that begin an item or have a meaning; others are units and are removed."""
    command, words, power = match[1], match[2], match[3] or ""
    symbol = command.startswith("math") and words.strip() in _SYMBOLS
    item = _ITEM.search(match.string[: match.start()])
    if item or symbol or _MEANS.search(words):
        return f"{words}{power}"
    return " "


def _fraction(match: re.Match) -> str:
    """0.1\\overline{6} is 15/90."""
    whole, fixed, repeated = match.groups()
    value = int(whole + fixed + repeated) - int(whole + fixed or "0")
    return rf"\frac{{{value}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"


def is_text(text: str) -> bool:
    """Whether an answer, before `clean`, is only letters in `\\text{}`."""
    match = _TEXT.fullmatch(text.strip())
    return match is not None and match[1].startswith("text") and match[2].strip().isalpha()


def without_unit(text: str) -> str:
    """`18.90` of `18.90 dollars`, `5` of `5 m/s`; `5 pi` and `5 squared` as they are."""
    match = _UNIT.fullmatch(text)
    return text if match is None or exact_number(match[1]) is None else match[1]


def exact_decimals(text: str) -> str:
    """Decimals as fractions: math-verify rounds decimals, and takes 0.3333333 for a third.

    Percents stay: math-verify only knows them as numbers.
    """
    if "%" in text:
        return text
    return _DECIMAL.sub(lambda m: rf"\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)


def multiplicities(text: str) -> list[int] | None:
    """How often each number occurs in a list of numbers, in ascending order of the numbers.

    math-verify takes lists for sets. [1] for one number, also with separators; None for other text.
    """
    if exact_number(text) is not None:
        return [1]
    numbers = [exact_number(item) for item in text.split(",")]
    distinct = {number for number in numbers if number is not None}
    return None if None in numbers else [numbers.count(number) for number in sorted(distinct)]


def plain(text: str) -> str:
    """The text without spaces, except between digits: `1 2` is not 12."""
    return re.sub(r"(?<![0-9])\s|\s(?![0-9])", "", text)


def is_words(text: str) -> bool:
    """Whether an answer is text or the letter of a choice, which is not compared as algebra."""
    choice = re.fullmatch(r"\(?[A-Z]\)?", text)
    return bool(choice or _WORDS.fullmatch(text) and re.search(r"[A-Za-z]{3}", text))


def words(text: str) -> str:
    """Text in lower case without spaces and punctuation."""
    return re.sub(r"[\s.,()'-]", "", text).lower()


def with_base(text: str, base: str | None = None) -> tuple[str, str] | None:
    """Digits and base of a numeral such as `1A_{16}`; `base` is the base if it names none."""
    match = _BASED.fullmatch(text)
    if match is None or (named := match[2] or base) is None:
        return None
    return match[1].upper(), named


def in_base_ten(text: str) -> str:
    """The value of a numeral that names its base; other text and impossible digits as they are."""
    match = _BASED.fullmatch(text)
    if match is None or match[2] is None or not 2 <= int(match[2]) <= 36:
        return text
    digits, base = match[1].upper(), int(match[2])
    return str(int(digits, base)) if all(int(d, 36) < base for d in digits) else text


def has_relation(text: str) -> bool:
    """Whether the text is an equation, an inequality or a membership."""
    return _RELATION.search(text) is not None


def sides(text: str) -> list[str]:
    """The sides of an equation that give an answer: `2 + 3` and `5` of `x = 2 + 3 = 5`.

    Each must be right, so `6 = 5` cannot bet on both. Names are removed, in lists too: `x=1, x=2`.
    """
    text = re.sub(rf"^\s*[a-zA-Z]\s*\\in{_END}", "", _NAMED.sub(r"\1 ", text))
    first, *others = (side.strip() for side in text.split("="))
    if others and re.search("[a-zA-Z]", _NUMERIC.sub("", first)):
        return others
    return [first, *others]


def _outer(text: str) -> tuple[str, str] | None:
    """The brackets around a whole list, `("(", "]")` of `(1, 2]`; None if there are none."""
    depth, comma = 0, False
    tokens = list(re.finditer(r"\\[{}]|[()\[\],]", text))
    for token in tokens:
        if token[0] == ",":
            comma |= depth == 1
        else:
            depth += 1 if token[0] in _CLOSES else -1
            if depth == 0 and token.end() < len(text):
                return None
    if not comma or depth or tokens[0].start() > 0 or tokens[0][0] not in _CLOSES:
        return None
    return tokens[0][0], tokens[-1][0]


def same_brackets(given: str, answer: str) -> bool:
    """Whether two lists in brackets are in the same ones; true if either has none."""
    outer = _outer(given), _outer(answer)
    return None in outer or outer[0] == outer[1]


def bracketed(given: str, answer: str) -> str:
    """A bare list `1, 2` in parentheses if the answer is a tuple, so that its order counts."""
    if _outer(answer) == ("(", ")") and "," in given and _outer(given) is None:
        return f"({given})"
    return given


def has_loose_digits(text: str) -> bool:
    """Whether two numbers are separated by spaces only."""
    return re.search(r"(?<![0-9_^])[0-9]+\s+[0-9]", text) is not None
