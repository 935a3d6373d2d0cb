"""The errors that are the user's to fix, and how a command shows them.

A `UserError` says what, where, the value found and what to do, in one line. Commands print it and leave with status 2;
anything else that escapes is a defect of ours and keeps its traceback.

    UserError --+-- ConfigError       settings and specs
                +-- DataError         prompts, texts, dumps, files of vectors
                +-- CheckpointError   weights, checkpoints, what a run goes on from
                '-- Broken            training that came to no good end: settings under which it cannot go on
"""

from __future__ import annotations

import pickle
import struct
import traceback
import unicodedata
from pathlib import Path
from types import TracebackType


class UserError(Exception):
    """Bad input: one clear line for the user. Several problems found together are raised once, a line each.

    No ValueError: what a library's call may raise is caught as such, and our own error passes."""

    def __init__(self, *lines: str):
        self.lines = tuple(map(visible, lines))
        super().__init__("\n".join(self.lines))


class ConfigError(UserError):
    """Settings, a steering spec or a reward's list, by themselves or beside the model they are for."""


class DataError(UserError):
    """Prompts, tables, texts, dumps and scores."""


class CheckpointError(UserError):
    """Models, weights and checkpoints that cannot be loaded, kept or gone on from."""


class Broken(UserError):
    """Learning came to numbers that it cannot go on from. Of settings that are compared, this is an outcome."""


def visible(text: str) -> str:
    """Control characters as pictures: what others wrote must not steer the terminal. Line ends and tabs stay."""
    return "".join(
        c if c in "\n\t" or not unicodedata.category(c).startswith("C") or c == "\u200d" else _picture(c) for c in text
    )


def _picture(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\u2421" if code == 0x7F else "\ufffd"


class Stopped(Exception):
    """A signal ended the job early, with all that was done saved. Commands say so and leave with status 75."""

    status = 75
    """EX_TEMPFAIL: not done, try again."""


class reading:
    """While a library reads a file of the user's: what it raises is a UserError, `before` and `after` what it says.

    Libraries promise no class for a damaged file (a text where config.json has a number is a TypeError here, an IndexError
    there, and tokenizers raises plain Exception), so such a block holds their call and nothing else.
    """

    def __init__(self, before: str, after: str = ""):
        self.before, self.after = before, after

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and _may_be_the_files(error):
            raise UserError(f"{self.before}{one_line(error)}{self.after}") from error


def one_line(error: BaseException) -> str:
    """What a library's error says, on one line that is not endless."""
    said = " ".join(str(error).split())
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in said:
        return "it holds pickled objects that are no weights, which are never run; save it as safetensors"
    if not said or isinstance(error, KeyError):
        said = f"{type(error).__name__} {said}".strip()
    return said if len(said) <= 300 else f"{said[:297]}..."


def _may_be_the_files(error: BaseException) -> bool:
    """Anything but an interrupt, an exit and what Python warns of."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return type(error) is Exception or isinstance(error, (*_OF_FILES, SafetensorError, StrictDataclassError))


_OF_FILES = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, ArithmeticError, AssertionError),
    *(ImportError, EOFError, MemoryError, struct.error, pickle.UnpicklingError),
)


def said(error: BaseException) -> str:
    """An error of the user's own code in a line: type, message, and the line of code where it was raised."""
    message = (str(error).strip() or "no message").splitlines()[0]
    frames = traceback.extract_tb(error.__traceback__)
    while len(frames) > 1 and frames[-1].name == "exit":  # trackers put a function of their own in sys.exit's place
        frames.pop()
    place = f" (line {frames[-1].lineno} of {Path(frames[-1].filename).name})" if frames else ""
    return f"raised {type(error).__name__}: {message:.200}{place}"
