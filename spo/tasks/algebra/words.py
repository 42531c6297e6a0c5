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
_REALS = re.compile(r"(?:the set of )?all (?:real numbers|reals)", re.IGNORECASE)
_AND = re.compile(r"\s*[,;]\s*(?:and\b)?|\band\b")
_ORDINAL = re.compile(r"(?<=[0-9])\s*\^?\s*\{?\s*(?:st|nd|rd|th)\b(?:\s*\})?", re.IGNORECASE)


def bare(text: str) -> str:
    """The text of a spelling without commands around words."""
    return re.sub(r"\s+", " ", _TEXT.sub(r"\1", text)).strip()


def is_words(text: str) -> bool:
    """Whether a spelling is a text, a name or the letter of a choice, not algebra."""
    plain = bare(text)
    match = _TEXT.fullmatch(text)
    if match and text.startswith("\\text") and match[1].strip().isalpha():
        return True
    choice = re.fullmatch(r"\(?[A-Z]\)?", plain)
    long = re.search(r"[A-Za-z]{3}", plain)
    return bool(choice or (_WORDS.fullmatch(plain) and long and not _is_function(plain)))


def _is_function(plain: str) -> bool:
    return re.search(r"\b(?:sin|cos|tan|log|sqrt|pi|exp|inf|infinity|or)\b", plain) is not None


def with_signs(text: str) -> str:
    """A spelling in words with the sign that it stands for."""
    return r"\mathbb{R}" if _REALS.fullmatch(bare(text)) else text


def same_words(given: str, answer: str) -> bool:
    """Case counts in single letters and abbreviations, as `A` is not `a`."""
    given, answer = bare(given), bare(answer)
    if (choice := _CHOICE.fullmatch(answer)) is not None:
        return _chosen(given) == (choice[1] or choice[2])
    letters = re.sub("[^A-Za-z]", "", _AND.sub("", answer))
    short = len(letters) <= 3 and letters.upper() == letters
    return _items(given, short) == _items(answer, short)


def _items(text: str, case: bool) -> list[str]:
    """The texts of a list in order of the alphabet: `Bob and Ann` is `Ann, Bob`."""
    items = [_letters(item) for item in _AND.split(text)]
    return sorted(item if case else item.lower() for item in items if item)


def _letters(text: str) -> str:
    text = re.sub(r"^(?:the|an?)\s+(?=[a-z]{2})", "", text)
    return re.sub(r"""[\s.,()'"$*-]""", "", text)


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
