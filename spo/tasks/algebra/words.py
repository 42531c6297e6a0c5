"""Answers in words: names, the letter of a choice, times of day and dates."""

from __future__ import annotations

import re

_TEXT = re.compile(
    r"\\(?:text\w*|mbox|hbox|mathrm|mathbf|mathit|operatorname|emph|bf|rm)\s*\{([^{}]*)\}"
)
_MONTHS = (
    "january february march april may june july august september october november december".split()
)
_MONTH = "|".join([*_MONTHS, *(f"{m[:3]}\\.?" for m in _MONTHS)])
_DAYS = r"(mon|tues|wednes|thurs|fri|satur|sun)day"
_DATE = re.compile(
    rf"(?:{_DAYS},?\s*)?(?:({_MONTH})\s+([0-9]{{1,2}})|([0-9]{{1,2}})\s+(?:of\s+)?({_MONTH}))"
    r"(?:,?\s+([0-9]{4}))?",
    re.IGNORECASE,
)
_TIME = re.compile(
    r"([0-9]{1,2})\s*(?::\s*([0-9]{2}))?\s*(?:o'clock)?\s*(?:(a|p)\.?\s?m\.?|(noon|midnight))?",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"\(\s*([A-Z])\s*\)|([A-Z])\)")
_CHOSEN = re.compile(
    r"(?:\(\s*([A-Za-z])\s*\)|([A-Z])(?=\s*$|\s*[.):]))\s*[.):]?\s*(.*)", re.DOTALL
)
_WORDS = re.compile(r"[A-Za-z(][A-Za-z' .,()-]*")
_LETTERS = re.compile(r"[A-Z](?:\s*,\s*[A-Z])+")
_TOUCHED = re.compile(
    r"[A-Za-z](?:\s*-|\(|\.(?=\S)|'(?!(?:t|s|re|ll|ve)\b))|-\s*[A-Za-z]|[()]\s*[A-Za-z]"
    r"|(?<![A-Za-z])'[A-Za-z]|\.[A-Za-z]"
)
_NAMES = re.compile(r"(?:(?:[A-Z][a-z]{2,}|St|Mr|Ms|Dr|O|s)[-'. ]*)+")
_BRACKETED = re.compile(r"(?<![A-Za-z)])\(\s*([A-Z])\s*\)(?![A-Za-z(])")
_SHORT = frozenset("yes odd one two six ten all red".split())
_REALS = re.compile(r"(?:the set of )?all (?:real numbers|reals)", re.IGNORECASE)
_AND = re.compile(r"\s*[,;]\s*(?:and\b)?|\band\b")
_ORDINAL = re.compile(r"(?<=[0-9])\s*\^?\s*\{?\s*(?:st|nd|rd|th)\b(?:\s*\})?", re.IGNORECASE)


def bare(text: str, words: str = r"\1") -> str:
    """The text of a spelling without commands around words; `words`: what stands for these."""
    inner, count = _TEXT.subn(words, text)
    return bare(inner, words) if count else re.sub(r"\s+", " ", text).strip()


def is_words(text: str) -> bool:
    """Whether a spelling is a text, a name or the letter of a choice, not algebra."""
    plain = bare(text)
    match = _TEXT.fullmatch(text)
    if match and text.startswith("\\text") and match[1].strip().isalpha():
        return True
    if re.fullmatch(r"\(?[A-Z]\)?", plain) or _LETTERS.fullmatch(plain):
        return True
    if _is_formula(bare(text, " ")):
        return False
    return bool(_WORDS.fullmatch(plain) and re.search(r"[A-Za-z]{3}", plain)) and not _is_function(
        plain
    )


def _is_formula(text: str) -> bool:
    """Whether a sign of algebra touches letters, as in abc-d and f(abc), not in O'Brien."""
    return _TOUCHED.search(text) is not None and not _NAMES.fullmatch(text.strip())


def _is_function(plain: str) -> bool:
    return re.search(r"\b(?:sin|cos|tan|log|sqrt|pi|exp|inf|infinity|or)\b", plain) is not None


def with_signs(text: str) -> str:
    """A spelling in words with the sign that it stands for."""
    return r"\mathbb{R}" if _REALS.fullmatch(bare(text)) else text


def same_words(given: str, answer: str, typed: bool = False) -> bool:
    """Case counts in single letters and abbreviations, as `A` is not `a`.

    Items keep their order, but for those with `and` between them. `typed`: the answer is a word
    for sure, not a product of letters; so is what stands in `\\text{}`.
    """
    typed = typed or _TEXT.search(answer) is not None
    raw = bare(given, " ") if typed else bare(given).rstrip(" .")
    given, answer = bare(given), bare(answer)
    if (choice := _CHOICE.fullmatch(answer)) is not None:
        return _chosen(given) == (choice[1] or choice[2])
    if _is_formula(_BRACKETED.sub(r"\1", raw)):
        return given.lower().split() == answer.lower().split()
    letters, mine = (re.sub("[^A-Za-z]", "", _AND.sub("", text)) for text in (answer, given))
    case = len(letters) <= 3 and letters.upper() == letters
    if not typed:  # abc is not ABC
        short = len(letters) <= 3 and letters.lower() not in _SHORT
        case |= short or any(len(w) > 1 and w.isupper() for w in (letters, mine))
    found, right = _items(given, case), _items(answer, case)
    if re.search(r"\band\b", answer) and not answer.startswith("("):
        return sorted(found) == sorted(right)
    return found == right


def _items(text: str, case: bool) -> list[str]:
    """The texts of a list: Ann and Bob."""
    items = [_letters(item) for item in _AND.split(text)]
    return [item if case else item.lower() for item in items if item]


def _letters(text: str) -> str:
    text = re.sub(r"^(?:the|an?)\s+(?=[a-z]{2})", "", text)
    return re.sub(r"""[\s.,()'"$*]|(?<=[A-Za-z])-(?=[A-Za-z])""", "", text)


def _chosen(given: str) -> str | None:
    """The letter of a choice, alone or in front of its text; None if there may be another."""
    if re.fullmatch(r"[A-Z]", given):
        return given
    match = _CHOSEN.fullmatch(given)
    if match is None:
        return None
    letter, rest = match[1] or match[2], match[3]
    others = re.search(r"\(\s*[A-Z]\s*\)|\b[A-Z][.)]|\b(?:or|and|not)\b|^\s*[,;/]|\b[A-E]\b", rest)
    return None if others else letter


def time_of(text: str) -> tuple[int, bool] | None:
    """Minutes since midnight, and whether the text says a.m., p.m., noon or midnight."""
    text = re.sub(r"^(?:12\s*)?(noon|midnight)$", r"12 \1", bare(text).lower())
    match = _TIME.fullmatch(text.replace(r"\,", " ").replace(" :", ":").strip(" ."))
    if match is None or not (match[2] or match[3] or match[4]):
        return None
    hour, minute = int(match[1]), int(match[2] or 0)
    half = (match[3] or {"noon": "p", "midnight": "a"}.get((match[4] or "").lower(), "")).lower()
    if hour > 23 or minute > 59 or (half and not 1 <= hour <= 12):
        return None
    hour = hour % 12 + 12 * (half == "p") if half else hour
    return 60 * hour + minute, bool(half)


def same_time(given: str, answer: str) -> bool | None:
    """None if the answer is no time of day."""
    right = time_of(answer)
    if right is None:
        return None
    found = time_of(given)
    if found is None:
        return False
    halves = found[1] and not right[1] and right[0] < 780  # 10 a.m. and 10 p.m. for 10:00
    return found[0] == right[0] or (halves and found[0] % 720 == right[0] % 720)


def date_of(text: str) -> tuple[int, int, int | None, str | None] | None:
    """Month, day, year, and the day of the week."""
    match = _DATE.fullmatch(_ORDINAL.sub("", bare(text)).strip(" ."))
    if match is None:
        return None
    week, first, day, other, second, year = match.groups()
    month = [m[:3] for m in _MONTHS].index((first or second).lower()[:3]) + 1
    return month, int(day or other), int(year) if year else None, week and week.lower()


def same_date(given: str, answer: str) -> bool | None:
    """None if the answer is no date. A year or a day of the week may be left out or added."""
    right = date_of(answer)
    if right is None:
        return None
    found = date_of(given)
    if found is None or found[:2] != right[:2]:
        return False
    return all(None in pair or len({*pair}) == 1 for pair in zip(found[2:], right[2:], strict=True))
