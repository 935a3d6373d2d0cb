"""The one error that is the user's to mend, and how a door shows it.

A `Problem` says what, where, the value found and what to do, in one line. Doors print it and leave with status 2;
anything else that escapes is a defect of ours and keeps its traceback.
"""

from __future__ import annotations


class Problem(ValueError):
    """Bad input: one clear line for the user. Several problems found together are raised once, a line each."""

    def __init__(self, *lines: str):
        self.lines = tuple(lines)
        super().__init__("\n".join(lines))


class Stopped(Exception):
    """A signal ended the job early, with all that was done saved. Doors say so and leave with status 75."""

    status = 75
    """EX_TEMPFAIL: not done, try again."""
