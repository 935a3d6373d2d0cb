"""The shape of a Job: which types stand where, in a person's words, and what is meant by a name that is not there."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from typing import Any, Literal, Union

Path = tuple[str, ...]


def dotted(path: Path) -> str:
    return ".".join(path).replace(".[", "[")


# -- types ------------------------------------------------------------------------------------------------------------


@functools.cache
def fields_of(section: type) -> dict[str, Any]:
    """Name -> type of a section's fields."""
    hints = typing.get_type_hints(section)
    return {spot.name: hints[spot.name] for spot in dataclasses.fields(section) if spot.init}


def members(wanted: Any) -> tuple[Any, ...]:
    """A union's members; any other type is its own only one."""
    return typing.get_args(wanted) if typing.get_origin(wanted) in (Union, types.UnionType) else (wanted,)


def section_of(wanted: Any) -> type | None:
    """The dataclass among a type's members."""
    return next((m for m in members(wanted) if isinstance(m, type) and dataclasses.is_dataclass(m)), None)


def is_list(wanted: Any) -> bool:
    return any(m is list or typing.get_origin(m) is list for m in members(wanted))


def is_mapping(wanted: Any) -> bool:
    return wanted is Any or any(m is dict or typing.get_origin(m) is dict for m in members(wanted))


def may_have_parts(wanted: Any) -> bool:
    """Whether a value may be a section, a list or a mapping."""
    holds = (list, dict, tuple)
    return (
        wanted is Any
        or section_of(wanted) is not None
        or any(m in holds or typing.get_origin(m) in holds for m in members(wanted))
    )


def has_parts(wanted: Any) -> bool:
    """Whether a flag's text is YAML in any case: it cannot be just text."""
    return may_have_parts(wanted) and (str not in members(wanted) or section_of(wanted) is not None)


def type_at(job_type: type, path: Path) -> Any:
    """The type of the setting at `path`; Any inside a free mapping; None where there is no such setting."""
    wanted: Any = job_type
    for name in path:
        section = section_of(wanted)
        if section is not None:
            wanted = fields_of(section).get(name)
            if wanted is None:
                return None
        elif is_mapping(wanted):
            inner = next((typing.get_args(m) for m in members(wanted) if typing.get_origin(m) is dict), ())
            wanted = inner[1] if inner else Any
        else:
            return None
    return wanted


def words(wanted: Any) -> str:
    """A type as a person says it."""
    known = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping", list: "a list"}
    known |= {type(None): "null", Any: "anything"}
    said = []
    for member in members(wanted):
        origin = typing.get_origin(member)
        if origin is Literal:
            said.append("one of " + ", ".join(str(a) for a in typing.get_args(member)))
        elif origin in (list, tuple):
            inner = [a for a in typing.get_args(member) if a is not Ellipsis]
            said.append("a list" + (f" (each {words(inner[0])})" if inner else ""))
        elif origin is dict or section_of(member):
            said.append("a mapping")
        else:
            said.append(known.get(member, getattr(member, "__name__", str(member))))
    return " or ".join(dict.fromkeys(said))


def every_path(job_type: type, path: Path = ()) -> list[Path]:
    """Every setting's path, sections included."""
    found: list[Path] = []
    for name, wanted in fields_of(job_type).items():
        found.append((*path, name))
        section = section_of(wanted)
        if section is not None:
            found += every_path(section, (*path, name))
    return found


# -- what to say ------------------------------------------------------------------------------------------------------


def brief(value: Any) -> str:
    said = "null" if value is None else repr(str(value)) if isinstance(value, str) else str(value)
    return said if len(said) <= 80 else said[:77] + "..."


def near_name(name: str, known: Any) -> str | None:
    """The known name that is most likely meant."""
    names = list(known)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    starts = [n for n in names if len(name) > 2 and (n.startswith(name.lower()) or name.lower().startswith(n))]
    return near[0] if near else starts[0] if starts else None


def unknown(job_type: type, path: Path, value: str, where: str, within: Path = ()) -> str:
    """The line for a setting that does not exist. `job_type` is the section at `within`."""
    section: Any = job_type
    depth = len(within)
    for name in path[len(within) :]:
        known = fields_of(section)
        if name not in known:
            break
        depth += 1
        if section_of(known[name]) is None:
            takes = words(known[name])
            return f"{dotted(path)}: unknown ({where}, value {value}); {dotted(path[:depth])} takes {takes}, nothing below it"
        section = section_of(known[name])
    known = fields_of(section)
    near = near_name(path[depth], known)
    if near is not None:
        guess = (*path[:depth], near, *path[depth + 1 :])
        deeper = type_at(section, guess[depth:])
        if deeper is None and section_of(known[near]):
            last = near_name(path[-1], fields_of(section_of(known[near])))  # type: ignore[arg-type]
            guess = (*path[:depth], near, last) if last else (*path[:depth], near)
        return f"{dotted(path)}: unknown ({where}, value {value}); did you mean {dotted(guess)}?"
    elsewhere = [p for p in every_path(section, path[:depth]) if p[-1] == path[-1]] or [
        p for p in every_path(section, path[:depth]) if p[-1] == near_name(path[-1], [q[-1] for q in every_path(section)])
    ]
    if elsewhere:
        return f"{dotted(path)}: unknown ({where}, value {value}); did you mean {dotted(elsewhere[0])}?"
    owner = dotted(path[:depth]) or "this command"
    return f"{dotted(path)}: unknown ({where}, value {value}); {owner} takes {', '.join(known)}"


def remedy(wanted: Any, value: Any) -> str:
    choices = [str(a) for m in members(wanted) if typing.get_origin(m) is Literal for a in typing.get_args(m)]
    if choices:
        near = near_name(str(value), choices)
        return f"did you mean {near}?" if near else f"choose {' or '.join(choices)}"
    if is_list(wanted):
        return f"write it as [{brief(value)}]"
    if section_of(wanted) or is_mapping(wanted):
        return "write it as {name: value}"
    if value is None:
        return "leave the line out for the default"
    if str in members(wanted) and not isinstance(value, str):
        return "put it in quotes"
    examples = {int: "such as 8", float: "such as 0.5 or 1e-5", bool: "true or false"}
    example = next((examples[m] for m in members(wanted) if m in examples), "see --help")
    return f"give {words(wanted)}, {example}" if example.startswith("such") else f"write {example}"
