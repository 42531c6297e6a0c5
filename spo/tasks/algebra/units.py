"""Units behind a number: which are the same, and how many of one make another."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

_INCH = Fraction(254, 10000)
_POUND = Fraction(45359237, 10**11)  # of 1000 kg
_TABLE = {  # a quantity, and the size of each unit of it
    "length": {
        "m meter metre": 1,
        "cm centimeter centimetre": Fraction(1, 100),
        "mm millimeter millimetre": Fraction(1, 1000),
        "km kilometer kilometre": 1000,
        "in inch inche": _INCH,
        "ft foot feet": 12 * _INCH,
        "yd yard": 36 * _INCH,
        "mi mile": 63360 * _INCH,
    },
    "mass": {
        "g gram": Fraction(1, 1000),
        "kg kilogram": 1,
        "mg milligram": Fraction(1, 10**6),
        "lb pound": 1000 * _POUND,
        "oz ounce": 1000 * _POUND / 16,
        "tonne": 1000,
        "ton": None,
    },
    "time": {
        "s sec second": 1,
        "min minute": 60,
        "h hr hour": 3600,
        "day": 86400,
        "week": 604800,
        "month": None,
        "year yr": None,
        "decade": None,
        "century centurie": None,
    },
    "volume": {
        "l liter litre": 1,
        "ml milliliter millilitre": Fraction(1, 1000),
        "gallon gal": None,
    }
    | {"quart": None, "pint": None, "cup": None, "tablespoon": None, "teaspoon": None},
    "money": {
        "dollar usd": 100,
        "cent penny pennie": 1,
        "euro eur": None,
        "yen": None,
        "rupee": None,
    },
    "angle": {"degree": 1, "radian rad": None},
    "force": {"n newton": 1},
    "energy": {"j joule": 1, "kj kilojoule": 1000, "cal calorie": None, "ev": None},
    "power": {"w watt": 1, "kw kilowatt": 1000},
    "pressure": {"pa pascal": 1, "kpa": 1000, "atm": None},
    "frequency": {"hz hertz": 1, "khz": 1000},
    "temperature": {"celsius": None, "fahrenheit": None, "kelvin": None},
    "area": {"acre": None, "hectare": None},
    "speed": {"knot": None},
    "data": {"byte": 8, "bit": 1},
    "current": {"amp ampere": 1},
    "voltage": {"v volt": 1},
    "resistance": {"ohm": 1},
}
_KNOWN: dict[str, tuple[str, Fraction]] = {
    name: (quantity if size is not None else names, Fraction(size or 1))
    for quantity, sizes in _TABLE.items()
    for names, size in sizes.items()
    for name in names.split()
}
_PREFIXES = {  # sign: name, power of ten
    "n": ("nano", -9),
    "u": ("micro", -6),
    "m": ("milli", -3),
    "c": ("centi", -2),
    "d": ("deci", -1),
    "": ("", 0),
    "h": ("hecto", 2),
    "k": ("kilo", 3),
    "M": ("mega", 6),
    "G": ("giga", 9),
    "T": ("tera", 12),
}
_BASES = {  # sign: names that prefixes stand before
    "m": "meter metre",
    "g": "gram",
    "s": "second",
    "L": "liter litre",
    "l": "liter",
    "N": "newton",
    "J": "joule",
    "cal": "calorie",
    "eV": "ev",
    "W": "watt",
    "Pa": "pascal",
    "Hz": "hertz",
    "A": "ampere amp",
    "V": "volt",
    "B": "byte",
    "b": "bit",
    "K": "kelvin",
}


def _prefixed() -> Iterator[tuple[str, tuple[str, Fraction]]]:
    for prefix, (long, power) in _PREFIXES.items():
        for base, names in _BASES.items():
            quantity, size = _KNOWN[names.split()[0]]
            unit = (quantity, size * Fraction(10) ** power)
            yield from (
                (name, unit) for name in (prefix + base, *(long + n for n in names.split()))
            )


_SIGNS = dict(_prefixed())  # here case counts: mW, MW
_SIGNS |= {"C": _KNOWN["celsius"], "F": _KNOWN["fahrenheit"], "KB": _SIGNS["kB"]}
_ALIASES = {"mph": (("mi", 1), ("h", -1)), "kph": (("km", 1), ("h", -1))}
_ALIASES |= {"rpm": (("revolution", 1), ("min", -1))}
_COUNTED = frozenset(
    "people person men man women woman child children student boy girl way time unit point"
    " coin apple book card ball marble number integer value solution pair triple root digit"
    " side edge vertex vertice face square triangle cube tile block step page game player team"
    " vote problem question answer ticket car house tree flower egg cookie candy candie pie"
    " orange banana pencil pen piece part row column group set item object box boxe bag bottle"
    " can jar chair table seat word letter bead sock shirt shoe hat dog cat bird fish animal"
    " cow chicken horse sheep rabbit ant bee worker employee customer passenger member friend"
    " family familie guest visitor resident revolution rotation turn lap trip move jump mark"
    " degree star dot line segment path route combination permutation arrangement subset"
    " function sequence term factor divisor multiple element outcome possibility possibilitie"
    " choice order handshake apple rectangle circle region intersection polynomial matrix"
    " matrice vector bill nickel dime quarter stamp sticker toy gift gram shelf"
    " shelve sheet sq linear total each on average".split()
)
FILLERS = frozenset("of the a an in per and".split())
# What changes the value, however it stands behind a number.
MEANS = frozenset(
    "or and not maybe perhaps possibly either if odd even than less more fewer greater at"
    " least most about approximately nearly to plus minus times root choose base over by"
    " divided negative positive squared cubed factorial percent half halves third thirds"
    " fourth fourths quarter quarters fifth fifths sixth sixths seventh sevenths eighth"
    " eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths millionth"
    " millionths billionth billionths dozen ten tens hundred hundreds thousand thousands"
    " million millions billion billions trillion score zero one two three four five six seven"
    " eight nine eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
    " twenty thirty forty fifty sixty seventy eighty ninety mod modulo remainder power"
    " exponent log pi theta except but without none all infinity infinite double triple twice"
    " opposite inverse reciprocal am pm noon midnight true false yes no".split()
)
# The same, but only behind a number: in a formula they are letters.
_SIZES = frozenset(
    "gross lakh crore myriad mille permille percentage percentile ppm ppb bn mn thou grand mil"
    " baker".split()
)
# What only the data's answer may say.
_CHANGES = frozenset(
    "pair couple trio quartet duo below under above beyond short lost lose loss debt owed owe owing"
    " deficit overdrawn decrease decline drop shortage ish never wrong incorrect invalid false"
    " untrue bad fake bogus mistake error cannot nor neither nothing nobody no none nope isn isnt"
    " aren don doesn didn won unlikely likely probably presumably might may could would guess"
    " unknown unsure uncertain almost roughly around circa near close within between through until"
    " till versus instead rather excluding exclude reject rejected nonsense joke kidding anything"
    " everything whatever undefined".split()
)
_MANY = re.compile(r".*(?:illions?|illiards?|folds?)|googol.*")
# Of whatever is asked for.
_GENERAL = frozenset("unit item object thing sq linear total each on average".split())
SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}


@dataclass(frozen=True)
class Unit:
    """A product of powers of quantities, in their base units, and of the nouns beside them."""

    quantities: tuple[tuple[str, int], ...] = ()
    size: Fraction = Fraction(1)
    nouns: frozenset[str] = frozenset()
    changes: frozenset[str] = frozenset()  # the words beside them that may change the value

    def agrees(self, other: Unit) -> bool:
        """Whether both measure or count the same, whatever their sizes.

        Apples agree with apples, counted things with each other, `units` with all.
        """
        if self.quantities and other.quantities:
            return self.quantities == other.quantities
        general = any(not u.quantities and u.nouns <= _GENERAL for u in (self, other))
        if general or self.nouns & other.nouns - _GENERAL:
            return True
        counted = all(not u.quantities and u.nouns <= _COUNTED for u in (self, other))
        return counted


def known(word: str) -> bool:
    """Whether the word alone is a unit or something that is counted.

    Signs of two letters must be common: in formulas others are products.
    """
    if len(word) > 2 and _find(word) is not None:
        return True
    lower = word.lower()
    common = lower in _KNOWN or _stem(lower) in _KNOWN
    return (common and _find(word) is not None) or lower in _ALIASES or _stem(word) in _COUNTED


def is_harmless(word: str) -> bool:
    """Whether a word that may stand behind a number leaves the value as it is."""
    return not _is_change(word) and not _is_size(word)


def _is_change(word: str) -> bool:
    return bool({word.lower(), _stem(word)} & _CHANGES)


def _is_size(word: str) -> bool:
    lower = word.lower()
    if lower in MEANS or {lower, _stem(word)} & _SIZES or _MANY.fullmatch(lower):
        return True
    return len(word) == 1 and _find(word) is None


def unit_of(factors: list[tuple[str, int]]) -> Unit | None:
    """The unit of words and their powers, such as (m, 1), (s, -2); None if they are no unit."""
    total: dict[str, int] = {}
    size, nouns, changes = Fraction(1), set(), set()
    ordered = any(word.lower() == "ordered" for word, _ in factors)
    for word, power in factors:
        for name, own in _ALIASES.get(word.lower(), ((word, 1),)):
            if (found := _find(name)) is not None:
                total[found[0]] = total.get(found[0], 0) + own * power
                size *= found[1] ** (own * power)
            elif ordered and _stem(name) in ("pair", "triple"):
                nouns.add(_stem(name))
            elif _is_change(name) and name.lower() not in MEANS:
                changes.add(_stem(name))
            elif _is_size(name):
                return None
            else:
                nouns.add(_stem(name))
    quantities = tuple(sorted((k, v) for k, v in total.items() if v))
    return Unit(quantities, size, frozenset(nouns), frozenset(changes))


def _stem(word: str) -> str:
    word = word.lower()
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word


def _find(word: str) -> tuple[str, Fraction] | None:
    word = word.rstrip(".")
    if word in _SIGNS:
        return _SIGNS[word]
    if len(word) == 1 and word.isupper():
        return None
    for name in (word.lower(), _stem(word)):
        if found := _KNOWN.get(name) or (_SIGNS.get(name) if len(name) > 4 else None):
            return found
    return None
