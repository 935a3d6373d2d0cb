"""Fields of a spec that no type describes: positions, tokens, vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from steerl.rollout.common.settings_reader import MISSING, Path, Reader, are_whole, is_whole, within

_WORDS = ("none", "all")


def tokens(reader: Reader, path: Path, value: object) -> object:
    listed = [value] if isinstance(value, int | str) else value
    if isinstance(listed, Sequence) and all(is_whole(v) or isinstance(v, str) for v in listed):
        return tuple(listed)
    reader.tell(path, f"expected token ids or names (eos, bos, pad, a token), found {value!r}")
    return MISSING


def prompt_positions(reader: Reader, path: Path, value: object) -> object:
    """A word, positions from the prompt's beginning or (negative) its end, {window: [a, b]} or {column: c}."""
    return _positions(reader, path, value, (*_WORDS, "last"), "column")


def step_positions(reader: Reader, path: Path, value: object) -> object:
    """A word, response steps from 0 on, {window: [a, b]} or {every: n}."""
    return _positions(reader, path, value, (*_WORDS, "generated_positions"), "every")


def _positions(reader: Reader, path: Path, value: Any, words: tuple[str, ...], other: str) -> object:
    from_end = other == "column"
    if isinstance(value, str):
        return reader.choice(words, path, value)
    if isinstance(value, Mapping):
        return _rule(reader, path, value, other)
    value = [value] if is_whole(value) else value
    problem = ""
    if not are_whole(value):
        problem = f"expected {', '.join(words)}, a list of positions or a mapping, found {value!r}"
    elif not value:
        problem = f"selects nothing (an empty list); write none, or positions; choices: {', '.join(words)}"
    elif not from_end and min(value) < 0:
        problem = f"steps count from 0 on, found {min(value)}; positions from the prompt's end go under prompt"
    if problem:
        reader.tell(path, problem)
    return MISSING if problem else tuple(value)


def _rule(reader: Reader, path: Path, value: Mapping[str, Any], other: str) -> object:
    if len(value) != 1 or next(iter(value)) not in ("window", other):
        reader.tell(path, f"expected one of {{window: ...}} and {{{other}: ...}}, found {dict(value)!r}")
        return MISSING
    kind, inner = next(iter(value.items()))
    problem = ""
    if kind == "column" and not (isinstance(inner, str) and inner):
        problem = f"expected a column's name, found {inner!r}"
    elif kind == "every" and not (is_whole(inner) and inner >= 1):
        problem = f"expected a whole number from 1 on, found {inner!r}"
    elif kind == "window" and not (are_whole(inner) and len(inner) == 2):
        problem = f"expected two whole numbers [a, b), found {inner!r}"
    elif kind == "window":
        start, end = inner
        if other == "every" and start < 0:
            problem = f"steps count from 0 on, found {start}"
        elif (start >= 0) == (end >= 0) and start >= end:
            problem = f"selects nothing: the window [{start}, {end}) is empty (its end is left out)"
    if problem:
        reader.tell((*path, kind), problem)
    return MISSING if problem else {kind: tuple(inner) if kind == "window" else inner}


@dataclass(frozen=True)
class Vector:
    """Where a direction comes from, and what is made of it."""

    file: object = None
    folder: object = None
    mean_diff: object = None
    init: str = within("", choices=("zeros", "normal"))
    values: object = None
    std: float = within(0.02, low=0.0)
    key: object = None
    normalise: object = None


_SOURCES = ("file", "folder", "mean_diff", "init", "values")


def vector(reader: Reader, path: Path, value: object) -> object:
    """{file: ...}, {folder: ...}, {mean_diff: ...}, {init: ...}, {values: [...]}, or the list itself."""
    if isinstance(value, str):
        return {"file": value}
    if isinstance(value, Sequence):
        value = {"values": list(value)}
    if not isinstance(value, Mapping):
        wish = "{file: PATH}, {mean_diff: PAIRS}, {init: zeros} or numbers"
        reader.tell(path, f"expected {wish}, found {value!r}")
        return MISSING
    before, sources = len(reader.problems), [name for name in _SOURCES if value.get(name) is not None]
    given = reader.section(Vector, path, value)
    if len(sources) != 1 and len(reader.problems) == before:
        reader.tell(path, f"expected one of {', '.join(_SOURCES)}, found {sorted(value)!r}")
    if "std" in given and "init" not in sources:
        reader.tell((*path, "std"), "goes with init: normal")
    return dict(value)
