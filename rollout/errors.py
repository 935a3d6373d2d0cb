"""The one error that is the user's to mend, and how a door shows it.

A `Problem` says what, where, the value found and what to do, in one line. Doors print it and leave with status 2;
anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import traceback
import unicodedata
from pathlib import Path


class Problem(ValueError):
    """Bad input: one clear line for the user. Several problems found together are raised once, a line each."""

    def __init__(self, *lines: str):
        self.lines = tuple(map(visible, lines))
        super().__init__("\n".join(self.lines))


def visible(text: str) -> str:
    """Control characters as pictures: what others wrote must not steer the terminal. Line ends and tabs stay."""
    return "".join(
        c if c in "\n\t" or not unicodedata.category(c).startswith("C") or c == "\u200d" else _picture(c) for c in text
    )


def _picture(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


def said(error: BaseException) -> str:
    """An error of the user's own code in a line: type, message, and the line of code where it was raised."""
    message = (str(error).strip() or "no message").splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    return f"raised {type(error).__name__}: {message:.200}{place}"
