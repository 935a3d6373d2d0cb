"""One mapping of settings to one frozen dataclass: types checked, problems gathered, near names suggested."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union

from steerl.rollout.common.errors import UserError


def read_fields(settings: type, mapping: Mapping[str, Any], where: str, problems: list[str]) -> Any:
    """The dataclass of a mapping of known keys; None, and lines in `problems`, where a value is missing or does not fit."""
    hints = typing.get_type_hints(settings)
    before = len(problems)
    values: dict[str, Any] = {}
    for spot in dataclasses.fields(settings):
        if spot.name not in mapping:
            if spot.default is dataclasses.MISSING and spot.default_factory is dataclasses.MISSING:
                problems.append(f"{where}.{spot.name}: missing; give {words(hints[spot.name])}")
            continue
        value = mapping[spot.name]
        if not fits(value, hints[spot.name]):
            choices = [c for m in _members(hints[spot.name]) if typing.get_origin(m) is Literal for c in typing.get_args(m)]
            wrong = unknown_choice(value, choices) if choices else f"expected {words(hints[spot.name])}, found {value!r:.60}"
            problems.append(f"{where}.{spot.name}: {wrong}")
        elif float in _members(hints[spot.name]) and isinstance(value, int) and not isinstance(value, bool):
            values[spot.name] = value if int in _members(hints[spot.name]) else float(value)
        else:
            values[spot.name] = value
    if len(problems) > before:
        return None
    try:
        return settings(**values)
    except UserError as problem:  # the dataclass says which field of its own is wrong
        problems += [f"{where}.{line}" for line in problem.lines]
        return None


def fits(value: Any, wanted: Any) -> bool:
    """Whether a value is of a type as settings spell it. A bool is no number, and no number is nan or infinite."""
    if wanted is Any:
        return True
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (Union, types.UnionType):
        return any(fits(value, member) for member in inner)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if origin is list:
        return isinstance(value, list | tuple) and all(fits(item, inner[0]) for item in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if wanted in (int, float) and isinstance(value, bool):
        return False
    if wanted is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, origin or wanted)


def words(wanted: Any) -> str:
    """A type as a person says it."""
    known = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        type(None): "null",
        dict: "a mapping",
    }
    said = []
    for member in _members(wanted):
        origin, inner = typing.get_origin(member), typing.get_args(member)
        if origin is Literal:
            said.append("one of " + ", ".join(str(choice) for choice in inner))
        elif origin is list:
            said.append(f"a list (each {words(inner[0])})")
        else:
            said.append(known.get(origin or member, "a function" if "Callable" in str(member) else str(member)))
    return " or ".join(dict.fromkeys(said))


def _members(wanted: Any) -> tuple[Any, ...]:
    return typing.get_args(wanted) if typing.get_origin(wanted) in (Union, types.UnionType) else (wanted,)


def unknown_choice(value: Any, choices: Any) -> str:
    hint = near(value, list(choices)) if isinstance(value, str) else None
    found = "missing" if value is None else f"unknown value {value!r:.60}"
    return f"{found}; did you mean {hint}?" if hint else f"{found}; choose one of {', '.join(map(str, choices))}"


def near(value: str, choices: Sequence[Any]) -> str | None:
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(value.lower(), names, n=1, cutoff=0.6)
    starts = [name for name in names if len(value) > 2 and (name.startswith(value.lower()) or value.lower().startswith(name))]
    return close[0] if close else starts[0] if starts else None
