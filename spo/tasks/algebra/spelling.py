"""One spelling of each sign: Unicode, spaces and formatting of an answer become plain LaTeX."""

from __future__ import annotations

import re
import unicodedata

_END = r"(?![a-zA-Z])"  # of a command
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_SIGNS = {
    "\u2212": "-",
    "\u2010": "-",
    "\u2011": "-",
    "\u2012": "-",
    "\u2013": "-",
    "\u00d7": r"\times ",
    "\u00f7": r"\div ",
    "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ",
    "\u2217": r"\cdot ",
    "\u2044": "/",
    "\u2215": "/",
    "\u03c0": r"\pi ",
    "\u221e": r"\infty ",
    "\u2264": r"\le ",
    "\u2a7d": r"\le ",
    "\u2265": r"\ge ",
    "\u2a7e": r"\ge ",
    "\u2260": r"\ne ",
    "\u2248": r"\approx ",
    "\u2261": r"\equiv ",
    "\u2208": r"\in ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2205": r"\emptyset ",
    "\u00d8": r"\emptyset ",
    "\u00b1": r"\pm ",
    "\u2213": r"\mp ",
    "\u00b0": r"^\circ ",
    "\u2032": "'",
    "\u2019": "'",
    "\u211d": r"\mathbb{R}",
    "\u2124": r"\mathbb{Z}",
    "\u27e8": r"\langle ",
    "\u27e9": r"\rangle ",
    "\u230a": r"\lfloor ",
    "\u230b": r"\rfloor ",
    "\u2308": r"\lceil ",
    "\u2309": r"\rceil ",
    "\u221a": r"\sqrt",
    "\u3001": ",",
    "\u3002": ".",
    "\u03b1": r"\alpha ",
    "\u03b2": r"\beta ",
    "\u03b3": r"\gamma ",
    "\u03b8": r"\theta ",
    "\u03bb": r"\lambda ",
    "\u03bc": r"\mu ",
    "\u03c6": r"\phi ",
    "\u03c9": r"\omega ",
}
_CURRENCIES = {"\u20ac": "euro", "\u00a3": "pound", "\u00a5": "yen", "\u20b9": "rupee"}
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060-\u2064\ufe0e\ufe0f\ufeff]")
_ROOT = re.compile("\u221a\\s*([0-9.]+)")
_SCRIPT = {
    "^": re.compile(f"[{''.join(_SUPERSCRIPTS)}]+"),
    "_": re.compile(f"[{''.join(_SUBSCRIPTS)}]+"),
}
_FORMAT = [
    (re.compile(pattern), new)
    for pattern, new in (
        (rf"\\(?:left|right)\s*\.|\\(?:left|right|middle|[bB]igg?[lrm]?){_END}", ""),
        (rf"\\(?:displaystyle|textstyle|limits|nolimits|bf|rm|it|boldmath){_END}", " "),
        (r"\\(?:[hv]space|phantom|[hv]phantom|label|tag)\*?\s*\{[^{}]*\}", " "),
        (r"\\(?:text)?color\s*\{\w*\}", ""),
        (r"\\colorbox\s*\{\w*\}", ""),
        (rf"\\[dtc]frac{_END}|\\[ns]?nicefrac{_END}|\\sfrac{_END}", r"\\frac"),
        (rf"\\[dt]binom{_END}", r"\\binom"),
        (rf"\\(?:varnothing|O){_END}", r"\\emptyset"),
        (rf"\\(?:leqslant|leqq|leq){_END}", r"\\le"),
        (rf"\\(?:geqslant|geqq|geq){_END}", r"\\ge"),
        (rf"\\neq{_END}|\\not\s*=", r"\\ne"),
        (rf"\\(?:land|wedge){_END}", r"\\text{ and }"),
        (rf"\\(?:lor|vee){_END}", r"\\text{ or }"),
        (rf"\\(?:imath|mathi){_END}", "i"),
        (rf"\\(?:thinspace|medspace|thickspace|enspace|hfill|null|relax){_END}", " "),
        (r"(?<![0-9])\{\s*,\s*\}", ","),
        (r"([0-9])(?:\{\s*,\s*\}|\\,\s*,|,\s*\\!)\s*(?=[0-9]{3})", r"\1{,}"),
        (r",\s*\\!", ","),
        (r"\\!", ""),
        (r"\\(?:q?quad)(?![a-zA-Z])(?=\s*\\text)", " "),
        (r"(?<!\\)\\[,;:> ]|(?<!\\)~", " "),
        (r"\\[%]|\\percent(?![a-zA-Z])", "%"),
        (r"(?<!\\)\\[#&_]", " "),
        (r"\*\*", "^"),
        (r"<=|=<", r"\\le "),
        (r">=|=>", r"\\ge "),
        (r"!=", r"\\ne "),
        (rf"\\(?:degree|degrees){_END}", r"^\\circ "),
    )
]
_DELIMITER = re.compile(r"(?<!\\)\\[()\[\]]|(?<!\\)\$")
_CUT = re.compile(rf"(?<=[0-9A-Za-z.])(?:{_DELIMITER.pattern})+(?=[0-9A-Za-z.])")  # 1$2 is not 12
_MONEY = re.compile(r"^\s*(-?)\s*(?:\\?\$)+\s*(-?)(?=[0-9.][^$]*$)")  # $5, not $5$
_ELLIPSIS = re.compile(r"\.\s*\.[\s.,;:]*$")
_TAIL = re.compile(r"(?:[.,;:\s]|\\\\|(?<!\\)\\$)+$")


def spelled(text: str) -> str:
    """The text in ASCII LaTeX, without delimiters and formatting; spaces that separate stay."""
    text = _INVISIBLE.sub("", text)
    text = _ROOT.sub(r"\\sqrt{\1}", text)
    for mark, pattern in _SCRIPT.items():
        table = _SUPERSCRIPTS if mark == "^" else _SUBSCRIPTS
        text = pattern.sub(lambda m, t=table, k=mark: f"{k}{{{''.join(t[c] for c in m[0])}}}", text)
    text = "".join(map(_ascii, text))
    for pattern, new in _FORMAT:
        text = pattern.sub(new, text)
    text = _MONEY.sub(r"\1\2\\dollar ", text)
    text = text.replace(r"\$", r"\dollar ")
    text = _DELIMITER.sub("", _CUT.sub(" ", text))
    text = re.sub(r"^\*\*?|\*\*?$", "", re.sub(r"\s+", " ", text).strip())
    return text.strip() if _ELLIPSIS.search(text) else _TAIL.sub("", text).strip()


def _ascii(sign: str) -> str:
    if sign < "\x7f":
        return sign
    if sign in _SIGNS:
        return _SIGNS[sign]
    if sign in _CURRENCIES:
        return rf"\{_CURRENCIES[sign]} "
    if unicodedata.category(sign) == "No" and (fraction := unicodedata.normalize("NFKC", sign)):
        above, slash, below = fraction.partition("\u2044")
        if slash and below:
            return rf"\frac{{{above}}}{{{below}}}"
    plain = unicodedata.normalize("NFKC", sign)
    return "".join(_SIGNS.get(c, c) for c in plain)
