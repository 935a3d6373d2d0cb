"""Whether values fit the shape of a Job, and the Job built of those that do.

Single values are judged by jsonargparse (what is an int, a Literal, a path); this file walks the sections, so that every
problem of a tree is found and not only the first.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import re
import typing
from pathlib import Path as FilePath
from typing import Any

from steerl.configs import shape

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.yaml_files import load_text, load_yaml

MOST = 50
"""Problems that are looked for at once; a file of other settings altogether has thousands."""


class Text(str):
    """A flag's value: text that may still turn out to be a number, a bool or null."""


def check(wanted: Any, path: shape.Path, value: Any, where: str, problems: list[str]) -> list[tuple[shape.Path, Any]]:
    """`value` as (path, value) pairs, one per setting, each of the type it should have; what is wrong goes to `problems`."""
    section = shape.section_of(wanted)
    if section is not None and isinstance(value, str) and path and value.endswith((".yaml", ".yml")):
        value = load_yaml(FilePath(value), problems, shape.dotted(path))
        if value is None:
            return []
    if section is None or not isinstance(value, dict):
        if section is not None and value is None:
            # `section:` with nothing under it is how a commented-out section looks.
            return [(path, None)] if type(None) in shape.members(wanted) else []
        fits, value = _fit(wanted, path, value, where, problems)
        return [(path, value)] if fits else []
    found: list[tuple[shape.Path, Any]] = [(path, {})] if path and type(None) in shape.members(wanted) else []
    known = shape.fields_of(section)
    for name, inner in value.items():
        if len(problems) >= MOST:
            break
        spot = (*path, str(name))
        if name in known:
            found += check(known[name], spot, inner, where, problems)
            continue
        problems.append(shape.unknown(section, spot, shape.brief(inner), where, within=path))
        near = shape.near_name(str(name), known)
        if near and isinstance(inner, dict) and shape.section_of(known[near]):
            check(known[near], spot, inner, where, problems)  # only for the problems inside it
    return found


def _fit(wanted: Any, path: shape.Path, value: Any, where: str, problems: list[str]) -> tuple[bool, Any]:
    """Whether a value without sections fits its type, and the value as that type has it."""
    before = len(problems)
    if (unfit := _unfit(value)) is not None:
        problems.append(f"{shape.dotted(path)}: {unfit} ({where}); take it out")
        return False, value
    if isinstance(value, list) and shape.is_list(wanted) and not isinstance(value, str):
        inner = next((typing.get_args(m) for m in shape.members(wanted) if typing.get_origin(m) is list), ())
        if not inner or inner[0] is Any:
            return True, value
        items = []
        for index, item in enumerate(value):
            spot = (*path, f"[{index}]")
            section = shape.section_of(inner[0])
            if section is not None and isinstance(item, dict):
                tree = to_tree(check(inner[0], spot, item, where, problems), spot)
                items.append(build(section, tree, problems, spot))
            else:
                items.append(_fit(inner[0], spot, item, where, problems)[1])
        return len(problems) == before, items
    fits, found = _judge(wanted, value)
    if not fits:
        wish, remedy = shape.words(wanted), shape.remedy(wanted, value)
        problems.append(f"{shape.dotted(path)}: expected {wish}, found {shape.brief(value)} ({where}); {remedy}")
    return fits, found


def _judge(wanted: Any, value: Any) -> tuple[bool, Any]:
    if wanted is Any:
        return True, value
    if value is None:
        return type(None) in shape.members(wanted), None
    members = shape.members(wanted)
    if isinstance(value, dict) and dict[str, Any] in members:  # free: jsonargparse would read the texts in it once more
        return all(isinstance(key, str) for key in value), value
    if isinstance(value, str) and bool in members and value in ("yes", "no"):  # plain YAML's words for it
        return True, value == "yes"
    if isinstance(value, str) and str not in members and Any not in members:
        # By the same rules as in a file: jsonargparse reads the text 1:30 as 90.
        problems: list[str] = []
        value = load_text(value, "", problems)
        if problems or _unfit(value) is not None or value is None:
            return type(None) in members and not problems and value is None, value
        if isinstance(value, str) and not any(typing.get_origin(member) is typing.Literal for member in members):
            return False, value
    if shape.section_of(wanted) is not None:  # a mapping is walked before; jsonargparse would take anything
        others = [m for m in members if not dataclasses.is_dataclass(m) and m is not type(None)]
        return next((found for other in others if (found := _judge(other, value))[0]), (False, value))
    parser = _parser(wanted)
    try:
        found = parser.parse_args([f"--value={value}"]) if isinstance(value, Text) else parser.parse_object({"value": value})
    except (argparse.ArgumentError, TypeError, ValueError):
        return False, value
    return True, found.value


def _unfit(value: Any) -> str | None:
    """What no setting can be: text that no file can hold, numbers that are not finite, whole ones that no tensor can hold."""
    if isinstance(value, dict | list | tuple):
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        return next((unfit for part in parts if (unfit := _unfit(part)) is not None), None)
    if isinstance(value, str):
        bad = next((letter for letter in value if letter == "\0" or "\ud800" <= letter <= "\udfff"), None)
        return None if bad is None else f"{shape.brief(str(value))} holds {bad!a}, a character that no file or name can have"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    too_large = isinstance(value, int) and not -(1 << 63) <= value < 1 << 63
    return "a whole number that does not fit 64 bits" if too_large else None


@functools.cache
def _parser(wanted: Any) -> Any:
    """jsonargparse's parser of one value of this type."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--value", type=wanted)
    return parser


def build(section: type, tree: dict[str, Any], problems: list[str], path: shape.Path = (), complete: bool = True) -> Any:
    """The dataclass of a checked tree; None where it cannot be built. A section's own UserError joins the others."""
    before = len(problems)
    values: dict[str, Any] = {}
    buildable = True
    for spot in dataclasses.fields(section):
        if not spot.init:
            continue
        wanted, spot_path = shape.fields_of(section)[spot.name], (*path, spot.name)
        inner = shape.section_of(wanted)
        given = tree.get(spot.name, dataclasses.MISSING)
        needed = spot.default is dataclasses.MISSING and spot.default_factory is dataclasses.MISSING
        if given is dataclasses.MISSING and needed and inner is not None:
            given = {}
        if inner is not None and isinstance(given, dict):
            values[spot.name] = build(inner, given, problems, spot_path, complete)
            buildable = buildable and values[spot.name] is not None
        elif given is not dataclasses.MISSING:
            values[spot.name] = given
            judge_further(spot, spot_path, given, problems)
        elif needed and complete:
            buildable = False
            if not any(line.startswith(f"{shape.dotted(spot_path)}: ") for line in problems):
                flag = "VALUE" if spot.metadata.get("positional") else f"--{shape.dotted(spot_path)} VALUE"
                problems.append(f"{shape.dotted(spot_path)}: missing; give {shape.words(wanted)}, {flag}")
        elif needed:
            values[spot.name] = None
    if not buildable or len(problems) > before:
        return None
    try:
        return section(**values)
    except UserError as problem:
        problems += problem.lines
        return None


def judge_further(spot: dataclasses.Field[Any], path: shape.Path, value: Any, problems: list[str]) -> None:
    """A field whose type says little (a free mapping) names who knows more: `metadata={"check": load_spec}`.

    Who knows the inside of the mapping may not know where it stands: the path goes before lines that lack it.
    """
    if value is None or "check" not in spot.metadata:
        return
    try:
        spot.metadata["check"](value)
    except UserError as problem:
        place = shape.dotted(path)
        for line in problem.lines:
            inside = re.match(r"[\w.\[\]]+: ", line)
            problems.append(line if line.startswith(place) else f"{place}.{line}" if inside else f"{place}: {line}")


def to_tree(pairs: list[tuple[shape.Path, Any]], base: shape.Path) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in pairs:
        if len(path) > len(base):
            spot = tree
            for name in path[len(base) : -1]:
                spot = spot.setdefault(name, {})
            spot[path[-1]] = value
    return tree
