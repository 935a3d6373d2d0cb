"""The one error that is the user's to mend, and how a door shows it.

A `Problem` says what, where, the value found and what to do, in one line. Doors print it and leave with status 2;
anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import unicodedata


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


class Stopped(Exception):
    """A signal ended the job early, with all that was done saved. Doors say so and leave with status 75."""

    status = 75
    """EX_TEMPFAIL: not done, try again."""
