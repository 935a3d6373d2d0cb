"""The numbers of a text, exactly.

A blank between digits groups thousands (10 000) where every later group has three digits and no other number stands in the
row of them: `3 400` is 3400, `in 2024 100 people` holds two numbers, as `5 100 4` holds three.
"""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"
_BEGIN = r"(?<![\w.])"
_NUMBER = re.compile(
    rf"(?:{_BEGIN}(?P<minus>[-+]))?(?:{_BEGIN}(?P<before>{_DIGITS})[ ]*)?"  # 1\frac{1}{2}, \frac12, \frac{-1}{2}
    r"\\[dtc]?frac\s*(?:\{(?P<top>[^{}]*)\}|(?P<top_digit>\d))\s*(?:\{(?P<bottom>[^{}]*)\}|(?P<bottom_digit>\d))"
    rf"|{_BEGIN}(?P<sign>[-+]?)(?P<whole>{_DIGITS})[ ](?P<above>\d\d?)/(?P<below>\d+)(?![\w/]|\.\d)"  # 1 1/2
    rf"|(?P<plain>(?<!\d[ ]){_BEGIN}[-+]?[1-9]\d{{0,2}}(?:[ ]\d{{3}})+(?!\d|,\d|[ ]\d)(?:\.\d+)?(?:\s?/\s?\d+)?"  # 10 000
    rf"|{_BEGIN}[-+]?{_DIGITS}(?:\.\d+)?(?:[eE][-+]?\d{{1,3}})?(?:\s?/\s?\d+)?"
    rf"|{_BEGIN}[-+]?\.\d+(?:[eE][-+]?\d{{1,3}})?"
    r"|(?<=[^\W\d_])\d+(?:\.\d+)?)"
)
_SPELLINGS = str.maketrans({"\u2212": "-", "\u00a0": " ", "\u2009": " ", "\u202f": " "})
_LONGEST = 400
"""Characters of a number; what is longer is none."""


def numbers_in(text: str) -> list[Fraction]:
    """The numbers of a text, exactly: 1,234.50, 10 000, -3, .5, 2e-3, 3/4, 1 1/2, \\frac{3}{4}, 1\\frac12."""
    text = text.translate(_SPELLINGS).replace("{,}", ",").replace("\\!", "").replace("\\,", " ")
    found = []
    for match in _NUMBER.finditer(text):
        if len(match[0]) <= _LONGEST:
            found += _plain(match["plain"]) if match["plain"] else _mixed(match) if match["whole"] else _latex(match)
    return found


def _plain(text: str) -> list[Fraction]:
    above, _, below = text.replace(",", "").replace(" ", "").partition("/")
    return [Fraction(above) / int(below or 1)] if int(below or 1) else []


def _mixed(match: re.Match[str]) -> list[Fraction]:
    whole, part = _plain(match["sign"] + match["whole"]), _plain(f"{match['above']}/{match['below']}")
    return _together(whole, part, match["sign"] == "-")


def _latex(match: re.Match[str]) -> list[Fraction]:
    above, below = match["top"] or match["top_digit"] or "", match["bottom"] or match["bottom_digit"] or ""
    minus = match["minus"] or ""
    whole = _plain(minus + match["before"]) if match["before"] else []
    parts = [numbers_in(above), numbers_in(below)]
    if not all(len(part) == 1 and _NUMBER.fullmatch(side.strip()) for part, side in zip(parts, (above, below), strict=True)):
        return [*whole, *parts[0], *parts[1]]  # \frac{2x}{3}
    if not parts[1][0]:
        return whole
    part = parts[0][0] / parts[1][0]
    return _together(whole, [part], minus == "-") if whole else [-part if minus == "-" else part]


def _together(whole: list[Fraction], part: list[Fraction], negative: bool) -> list[Fraction]:
    """A whole number and a proper fraction are one number; anything else is two."""
    if part and 0 < part[0] < 1:
        return [whole[0] - part[0] if negative else whole[0] + part[0]]
    return [*whole, *part]
