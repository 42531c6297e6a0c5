"""Units behind a number: which are the same, and how many of one make another."""

from __future__ import annotations

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
    "money": {"dollar usd": 100, "cent": 1, "euro eur": None, "yen": None, "rupee": None},
    "angle": {"degree": 1, "radian rad": None},
    "force": {"n newton": 1},
    "energy": {"j joule": 1, "kj kilojoule": 1000, "cal calorie": None, "ev": None},
    "power": {"w watt": 1, "kw kilowatt": 1000},
    "pressure": {"pa pascal": 1, "kpa": 1000, "atm": None},
    "frequency": {"hz hertz": 1, "khz": 1000},
    "temperature": {"celsius": None, "fahrenheit": None, "kelvin": None},
    "area": {"acre": None, "hectare": None},
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
_CAPITALS = {"L", "N", "J", "W", "V", "Hz", "kHz", "Pa", "kPa", "mL", "kJ", "kW", "USD", "EUR"}
_ALIASES = {"mph": (("mi", 1), ("h", -1)), "kph": (("km", 1), ("h", -1)), "rpm": ()}
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
    " matrice vector bill penny pennie nickel dime quarter stamp sticker toy gift gram shelf"
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
    """A product of powers of quantities, in their base units; counted things are all alike."""

    quantities: tuple[tuple[str, int], ...] = ()
    size: Fraction = Fraction(1)
    counted: bool = False  # `5 apples`, `5 square units`: agrees with every unit


ANY = Unit(counted=True)


def known(word: str) -> bool:
    """Whether the word alone is a unit or something that is counted."""
    return _find(word) is not None or word.lower() in _ALIASES or _stem(word) in _COUNTED


def unit_of(factors: list[tuple[str, int]]) -> Unit | None:
    """The unit of words and their powers, such as (m, 1), (s, -2); None if they are no unit."""
    total: dict[str, int] = {}
    size, counted = Fraction(1), False
    for word, power in factors:
        parts = _ALIASES.get(word.lower(), ((word, 1),))
        for name, own in parts:
            found = _find(name)
            if found is None:
                if name.lower() in MEANS:
                    return None
                counted = True
                continue
            total[found[0]] = total.get(found[0], 0) + own * power
            size *= found[1] ** (own * power)
    if counted or not factors:
        return ANY
    return Unit(tuple(sorted((k, v) for k, v in total.items() if v)), size)


def _stem(word: str) -> str:
    word = word.lower()
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith("ss") else word


def _find(word: str) -> tuple[str, Fraction] | None:
    if len(word) == 1 and word.isupper() and word not in _CAPITALS:
        return None
    lower = word.lower().rstrip(".")
    return _KNOWN.get(lower) or _KNOWN.get(_stem(lower))
