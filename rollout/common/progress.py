"""How far a long job is, and what it is at: a line that rewrites itself on a terminal, else one now and then. On stderr.

rollouts: 1,024 of 8,000 rows (13 %), 2,310 tokens/s, 1 min 40 s left        Progress: what can be counted
reading the weights of MODEL ... 12 s                                        doing: what cannot; silent where it is quick
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TextIO

from steerl.rollout.common.errors import visible

LINES = 20
"""Lines in all where the output is no terminal."""
EVERY_S = 0.2
"""Least time between two rewrites on a terminal."""
QUIET_S = 1.0
"""Least time between two lines elsewhere."""
SHOWN_S, TOLD_S = 2.0, 10.0
"""From when on it is said what is being done: on a terminal, and in a file (then after a minute, two, four, ...)."""


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
        elif (at * LINES >= self.rows * (self._lines + 1) and now - self._shown >= QUIET_S) or at >= self.rows:
            self._shown = now
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


class Watch:
    """What is being done now, the innermost last; `look` says so where it takes long."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic):
        self.stream, self.clock = stream, clock
        self._at: list[list[float]] = []
        self._names: list[str] = []
        self._width = 0
        self._lock = threading.Lock()

    def begin(self, what: str) -> None:
        with self._lock:
            self._names.append(visible(" ".join(what.split())))
            self._at.append([self.clock(), TOLD_S])

    def end(self) -> None:
        with self._lock:
            what, (began, due) = self._names.pop(), self._at.pop()
            self._erase()
            if not self.stream.isatty() and due > TOLD_S:
                self._write(f"{what}: took {duration(self.clock() - began)}\n")

    def look(self) -> None:
        with self._lock:
            if not self._names:
                return
            what, at = self._names[-1], self._at[-1]
            seconds = self.clock() - at[0]
            if self.stream.isatty():
                if seconds >= SHOWN_S:
                    text = f"{what} ... {duration(seconds)}"[: max(shutil.get_terminal_size().columns - 1, 10)]
                    self._write("\r" + text.ljust(self._width))
                    self._width = len(text)
            elif seconds >= at[1]:
                at[1] = max(60.0, 2 * at[1]) if at[1] > TOLD_S else 60.0
                self._write(f"{what}, {duration(seconds)} so far\n")

    def _erase(self) -> None:
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more
            self.stream.write(text)
            self.stream.flush()


_watch: Watch | None = None


@contextlib.contextmanager
def doing(what: str) -> Iterator[None]:
    """Say on the main process what it is at, where that takes long. Blocks may stand in each other; the innermost is shown."""
    global _watch
    if os.environ.get("RANK", "0") != "0":
        yield
    elif _watch is not None:
        _watch.begin(what)
        try:
            yield
        finally:
            _watch.end()
    else:
        watch, over = Watch(sys.stderr), threading.Event()
        watch.begin(what)
        thread = threading.Thread(target=_look_on, args=(watch, over), name="steerl-doing", daemon=True)
        thread.start()
        _watch = watch
        try:
            yield
        finally:
            _watch = None
            over.set()
            thread.join()
            watch.end()


def _look_on(watch: Watch, over: threading.Event) -> None:
    while not over.wait(EVERY_S if watch.stream.isatty() else 1.0):
        watch.look()
