"""How far a long job is, how fast, how long it still takes: a line that rewrites itself on a terminal, else one now and then.

rollouts: 1,024 of 8,000 rows (13 %), 2,310 tokens/s, 1 min 40 s left
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

LINES = 20
"""Lines in all where the output is no terminal."""
EVERY_S = 0.2
"""Least time between two rewrites on a terminal."""


def duration(seconds: float) -> str:
    minutes, whole = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {whole:02d} s" if minutes else f"{whole} s"


@dataclass
class Progress:
    """Counts what is done and writes it to a stream; `stream` None shows nothing (the processes that are not the main one)."""

    what: str
    rows: int
    """Of the whole job."""
    stream: TextIO | None
    already: int = 0
    """Rows that were there before this run began."""
    clock: Callable[[], float] = time.monotonic
    done: int = field(default=0, init=False)
    tokens: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._began = self._shown = self.clock()
        self._lines = 0
        self._width = 0

    def line(self) -> str:
        seconds = max(self.clock() - self._began, 1e-9)
        at = self.already + self.done
        share = 100 * at // self.rows if self.rows else 100
        text = f"{self.what}: {at:,} of {self.rows:,} rows ({share} %)"
        if not self.done:
            return text
        rate = f"{self.tokens / seconds:,.0f} tokens/s" if self.tokens else f"{self.done / seconds:,.0f} rows/s"
        left = self.rows - at
        return f"{text}, {rate}, " + (f"{duration(left * seconds / self.done)} left" if left else f"took {duration(seconds)}")

    def add(self, rows: int, tokens: int = 0) -> None:
        self.done += rows
        self.tokens += tokens
        if self.stream is None:
            return
        now, at = self.clock(), self.already + self.done
        if self.stream.isatty():
            if now - self._shown >= EVERY_S or at >= self.rows:
                self._shown = now
                self._rewrite(self.line())
        elif at * LINES >= self.rows * (self._lines + 1) or at >= self.rows:
            self._lines = at * LINES // max(self.rows, 1)
            self.stream.write(self.line() + "\n")
            self.stream.flush()

    def close(self) -> None:
        """Leave the line where it is and go on below it."""
        if self.stream is not None and self.stream.isatty() and self._width:
            self.stream.write("\n")
            self.stream.flush()

    def _rewrite(self, text: str) -> None:
        assert self.stream is not None
        text = text[: max(shutil.get_terminal_size().columns - 1, 10)]
        self.stream.write("\r" + text.ljust(self._width))
        self.stream.flush()
        self._width = len(text)
