"""Tokens on a terminal: text as it becomes whole, colors by probability, two texts side by side in columns.

    ids --Pieces--> text that ends on whole characters --paint--> with a color --columns--> lines no wider than the window

Strings in, strings out; who writes them where is the command's. And Ctrl-C: what it stops, and where it is not heard.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, TextIO

from torch import Tensor

from steerl.rollout.chat.confidence import raw_logprob
from steerl.rollout.common.errors import visible
from steerl.rollout.prompts.chat import UNKNOWN, Speller

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RESET = "\x1b[0m"
BANDS: tuple[tuple[float, str], ...] = ((0.05, "\x1b[31m"), (0.25, "\x1b[33m"), (0.6, "\x1b[36m"), (1.01, "\x1b[32m"))
"""Probability below which a color is used: red, yellow, cyan, green."""
_BEHIND = 6
"""Tokens decoded again before the new one: spelling of a piece may depend on its neighbors."""
NARROW = 60
"""Columns under which two texts stand one below the other."""


def wants_color(stream: TextIO, environment: Mapping[str, str] = os.environ) -> bool:
    """On a terminal that can show it, unless NO_COLOR asks for none."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


@dataclass(frozen=True)
class Piece:
    """Text of one token, or of the few that make a character together, with the lowest of their log-probs."""

    text: str
    logprob: float | None


class Pieces:
    """Ids one by one -> pieces of text that join to the whole text, as it goes on with what was said `before`.

    Special tokens have none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()):
        self.speller = Speller(tokenizer)
        self.ids = self.speller.tail(before)
        self._start, self._shown = 0, len(self.ids)
        self._held: list[float] = []

    def add(self, token: int, logprob: float | None = None) -> Piece | None:
        """The piece that `token` completes; None while a character is still in parts."""
        if logprob is not None:
            self._held.append(logprob)
        if token in self.speller.silent:
            return None
        self.ids.append(token)
        text = self._new()
        return None if not text or text.endswith(UNKNOWN) else self._take(text)

    def rest(self) -> Piece | None:
        """What is left at the end: half a character, shown as the replacement sign."""
        text = self._new()
        return self._take(text) if text else None

    def _new(self) -> str:
        return self.speller.after(self.ids[self._start : self._shown], self.ids[self._shown :])

    def _take(self, text: str) -> Piece:
        lowest = min(self._held) if self._held else None
        self._held = []
        self._shown = len(self.ids)
        if self._shown - self._start > 4 * _BEHIND:
            self._start = self._clean_start()
        return Piece(text, lowest)

    def _clean_start(self) -> int:
        """A later token to decode from, at which the text after it comes out the same."""
        for start in range(self._shown - _BEHIND, self._start, -1):
            if UNKNOWN not in self.speller.after((), self.ids[start : self._shown]):
                return start
        return self._start


def pieces_of(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], logprobs: Sequence[float | None], before: Sequence[int] = ()
) -> list[Piece]:
    stream = Pieces(tokenizer, before)
    pieces = [stream.add(token, logprob) for token, logprob in zip(ids, logprobs, strict=True)]
    return [piece for piece in (*pieces, stream.rest()) if piece is not None]


def paint(piece: Piece, color: bool, raw: bool = False) -> str:
    """The piece, colored by its probability; a color never runs over a line's end. `raw`: as it is, for pipes."""
    text = piece.text if raw else visible(piece.text)
    if not color or piece.logprob is None:
        return text
    band = next((code for limit, code in BANDS if math.exp(piece.logprob) < limit), BANDS[-1][1])
    return "\n".join(f"{band}{line}{RESET}" if line else "" for line in text.split("\n"))


def legend() -> str:
    """What the colors mean, in them."""
    names = [f"< {limit:g}" for limit, _ in BANDS[:-1]] + [f">= {BANDS[-2][0]:g}"]
    return "probability " + "  ".join(f"{code}{name}{RESET}" for name, (_, code) in zip(names, BANDS, strict=True))


def width_of(text: str) -> int:
    """Columns that a terminal gives to a text without control characters."""
    return sum(_columns(character) for character in text)


def _columns(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def wrap(pieces: Sequence[Piece], width: int, color: bool) -> list[tuple[str, int]]:
    """Lines of painted text, each with its width in columns, none wider than `width` (at least 2)."""
    lines: list[tuple[str, int]] = []
    line, used = "", 0
    for piece in pieces:
        run = ""
        for character in visible(piece.text).replace("\t", "    "):
            size = _columns(character)
            if character == "\n" or used + size > width:
                lines.append((line + paint(Piece(run, piece.logprob), color), used))
                line, used, run = "", 0, ""
                if character == "\n":
                    continue
            run, used = run + character, used + size
        line += paint(Piece(run, piece.logprob), color)
    return [*lines, (line, used)]


def columns(left: tuple[str, Sequence[Piece]], right: tuple[str, Sequence[Piece]], width: int, color: bool) -> Iterator[str]:
    """Two headed texts as lines: side by side, or one below the other in a narrow window."""
    if width < NARROW:
        for head, pieces in (left, right):
            yield f"{head}:"
            yield from (line for line, _ in wrap(pieces, max(width - 1, 2), color))
        return
    half = (width - 3) // 2
    sides = [
        [(clipped(head, half), width_of(clipped(head, half))), *wrap(pieces, half, color)] for head, pieces in (left, right)
    ]
    for (one, used), (two, _) in zip_longest(*sides, fillvalue=("", 0)):
        yield f"{one}{' ' * (half - used)} | {two}".rstrip()


def clipped(text: str, width: int) -> str:
    while width_of(text) > width:
        text = text[:-1]
    return text


class Live:
    """Writes a row's text as its tokens come: hand it to Sampler.sample as `on_token` (one row). `end` writes the rest.

    Text that may turn out to be the beginning of a stop string is held back until it is known not to be.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[Piece], object],
        ends: Sequence[int],
        stops: Sequence[str] = (),
        before: Sequence[int] = (),
    ):
        self.pieces, self.write = Pieces(tokenizer, before), write
        self.ends, self.stops = set(ends), list(stops)
        self.held: list[Piece] = []
        self.written = ""
        self.ids: list[int] = []

    def __call__(self, t: int, row_B: Tensor, tokens_B: Tensor, logits_BV: Tensor) -> None:
        token = int(tokens_B[0])
        if token in self.ends:
            return
        self.ids.append(token)
        self._show(self.pieces.add(token, raw_logprob(logits_BV, tokens_B)[0]))

    def end(self, text: str | None = None) -> None:
        """The rest, up to where `text` ends (None: all of it, after an interrupt)."""
        rest = self.pieces.rest()
        for piece in [*self.held, *([rest] if rest else [])]:
            room = len(piece.text) if text is None else max(len(text) - len(self.written), 0)
            self._out(Piece(piece.text[:room], piece.logprob))
        self.held = []

    def _show(self, piece: Piece | None) -> None:
        if piece is None:
            return
        self.held.append(piece)
        tail = "".join(held.text for held in self.held)
        kept = max((n for stop in self.stops for n in range(1, len(stop) + 1) if tail.endswith(stop[:n])), default=0)
        if any(stop in tail for stop in self.stops):
            return
        free = len(tail) - kept
        while self.held and len(self.held[0].text) <= free:
            free -= len(self.held[0].text)
            self._out(self.held.pop(0))

    def _out(self, piece: Piece) -> None:
        if piece.text:
            self.written += piece.text
            self.write(piece)


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


class Ears:
    """Ctrl-C while a chat runs: heard where there is something to stop, and once; not between, where it would end the chat."""

    def __init__(self) -> None:
        self.open = True

    def __call__(self, number: int, frame: object) -> None:
        if self.open:
            self.open = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def deaf(self) -> Iterator[None]:
        """All of a chat: what is not inside `listening` is not interrupted."""
        self.open = False
        before = signal.signal(signal.SIGINT, self)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
            self.open = True

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        was, self.open = self.open, True
        try:
            yield
        finally:
            self.open = was


EARS = Ears()


@dataclass
class Interrupt:
    interrupted: bool = False


@contextlib.contextmanager
def interruptible() -> Iterator[Interrupt]:
    """Ctrl-C ends the block, not the program."""
    state = Interrupt()
    try:
        with EARS.listening():
            yield state
    except KeyboardInterrupt:
        state.interrupted = True
