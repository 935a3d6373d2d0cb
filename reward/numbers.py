"""The numbers of a text, exactly."""

from __future__ import annotations

import re
from fractions import Fraction

_FRACTION = re.compile(r"(?<![\w.])\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")
_NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{1,3})?(?:\s?/\s?\d+)?"
    r"|(?<![\w.])[-+]?\.\d+(?:[eE][-+]?\d{1,3})?"
    r"|(?<=[^\W\d_])\d+(?:\.\d+)?"
)
_LONGEST = 400
"""Characters of a number; what is longer is none."""


def numbers_in(text: str) -> list[Fraction]:
    """The numbers of a text, exactly: 1,234.50, -3, .5, 2e-3, 3/4, \\frac{3}{4}."""
    text = _FRACTION.sub(r"\1/\2 ", text.replace("\u2212", "-"))
    found = []
    for match in _NUMBER.findall(text):
        if len(match) > _LONGEST:
            continue
        above, _, below = match.replace(",", "").replace(" ", "").partition("/")
        if below and not int(below):
            continue
        found.append(Fraction(above) / int(below or 1))
    return found
