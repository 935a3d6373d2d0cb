"""The `reward:` list: every entry checked against the settings of its kind, all problems told together, then built.

An entry has `kind`, the fields of that kind (the dataclass beside the code that uses them) and the fields of `Common`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Union

import torch

from reward.mixture import Part, WeightedSum
from reward.normalise import Shape, check_shape
from rollout.errors import Problem

# kind -> where its settings are; they are imported when a job asks for the kind. Each has `build(where, around) -> Part`.
KINDS: dict[str, tuple[str, str]] = {
    "function": ("reward.function", "FunctionSettings"),
    "model": ("reward.model", "ModelSettings"),
    "process": ("reward.process", "ProcessSettings"),
    "http": ("reward.remote", "HttpSettings"),
    "exact": ("reward.rules", "Exact"),
    "numeric": ("reward.rules", "Numeric"),
    "regex": ("reward.rules", "Regex"),
    "json": ("reward.rules", "Json"),
    "length": ("reward.rules", "Length"),
    "repetition": ("reward.rules", "Repetition"),
    "keywords": ("reward.rules", "Keywords"),
}
TAKEN = ("mean", "std", "total", "prompt_index", "sample_index")
"""Names that metrics and score tables use themselves."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every entry may say besides its kind's own fields."""

    kind: str
    name: str | None = None
    """What metrics and score tables call it; the kind unless given."""
    weight: float = 1.0
    """total = sum of weight x part."""
    normalise: str | dict[str, Any] | None = None
    """`running`; {mean: m, std: s}; or {reference: FILE} of prompts and completions, measured once. See reward.normalise."""
    clip: list[float] | None = None
    """[low, high] for the part's values, after normalisation and before the weight."""


@dataclass(frozen=True)
class Surroundings:
    """What a part may want to know of the job."""

    device: torch.device | None
    vocabulary: str | None
    """Of the policy's tokenizer; None where it is not known."""


@dataclass(frozen=True)
class Entry:
    common: Common
    own: Any
    where: str


@dataclass(frozen=True)
class Entries:
    """A list that was read and is right as far as one can tell without opening anything."""

    entries: tuple[Entry, ...]

    def build(self, policy: Any, device: torch.device | str | None, tokenizer: Any) -> WeightedSum:
        from reward.reading import vocabulary_of

        tokenizer = tokenizer if tokenizer is not None else getattr(policy, "tokenizer", None)
        device = device if device is not None else getattr(policy, "device", None)
        vocabulary = vocabulary_of(tokenizer) if tokenizer is not None else None
        around = Surroundings(None if device is None else torch.device(device), vocabulary)
        parts: list[Part] = []
        problems: list[str] = []
        for entry in self.entries:
            try:
                part: Part = entry.own.build(entry.where, around)
                part = dataclasses.replace(part, name=entry.common.name, weight=entry.common.weight)
                if entry.common.normalise is not None or entry.common.clip is not None:
                    shape = Shape.of(entry.common.normalise, entry.common.clip, part, entry.where)
                    part = dataclasses.replace(part, shape=shape)
                parts.append(part)
            except Problem as problem:
                problems += problem.lines
        if problems:
            for part in parts:
                part.close()
            raise Problem(*problems)
        return WeightedSum(tuple(parts), vocabulary)


def read_parts(parts: Sequence[Any], field: str = "reward") -> Entries:
    if callable(parts) or isinstance(parts, Mapping):
        parts = [parts]
    if not isinstance(parts, Sequence) or isinstance(parts, str):
        raise Problem(f"{field}: expected a list of parts, found {type(parts).__name__}; write it as [{{kind: ...}}]")
    if not parts:
        raise Problem(f"{field}: empty; name at least one part, such as {{kind: function, function: file.py:name}}")
    problems: list[str] = []
    read = [_read_entry(part, f"{field}[{index}]", problems) for index, part in enumerate(parts)]
    entries = [entry for entry in read if entry is not None]
    names: dict[str, str] = {}
    for entry in entries:
        name = entry.common.name
        if name in names:
            problems.append(f"{entry.where.split(' ')[0]}.name: {name!r} is the name of {names[name]} already; choose another")
        elif name is not None:
            names[name] = entry.where.split(" ")[0]
    if problems:
        raise Problem(*problems)
    return Entries(tuple(_named(entries, set(names))))


def _named(entries: Sequence[Entry], taken: set[str]) -> list[Entry]:
    """Entries without a name get their kind's, numbered from the second on."""
    named = []
    for entry in entries:
        name, number = entry.common.name, 1
        while name is None:
            guess = entry.common.kind if number == 1 else f"{entry.common.kind}_{number}"
            name, number = (None if guess in taken else guess), number + 1
        taken.add(name)
        where = f"{entry.where} ({name})"
        named.append(Entry(dataclasses.replace(entry.common, name=name), entry.own, where))
    return named


def _read_entry(part: Any, where: str, problems: list[str]) -> Entry | None:
    if callable(part):
        part = {"kind": "function", "function": part, **_name_of(part)}
    if not isinstance(part, Mapping):
        problems.append(f"{where}: expected a mapping, found {part!r:.60}; write it as {{kind: model, path: DIR}}")
        return None
    kind = part.get("kind")
    if kind not in KINDS:
        problems.append(f"{where}.kind: {_unknown_choice(kind, KINDS)}")
        return None
    module, name = KINDS[kind]
    settings = getattr(importlib.import_module(module), name)
    before = len(problems)
    own = {spot.name for spot in dataclasses.fields(settings)}
    shared = {spot.name for spot in dataclasses.fields(Common)}
    for key, value in part.items():
        if key not in own | shared:
            hint = _near(str(key), [*own, *shared])
            problems.append(
                f"{where}.{key}: unknown (value {value!r:.60}); "
                + (f"did you mean {hint}?" if hint else f"a {kind} part takes {', '.join(sorted(own | shared))}")
            )
    common = read_fields(Common, {k: v for k, v in part.items() if k in shared}, where, problems)
    values = read_fields(settings, {k: v for k, v in part.items() if k in own}, where, problems)
    if common is not None:
        _check_common(common, where, problems)
    return Entry(common, values, where) if len(problems) == before else None


def _check_common(common: Common, where: str, problems: list[str]) -> None:
    name = common.name
    if name is not None and (not name.strip() or "/" in name or name in TAKEN):
        problems.append(f"{where}.name: {name!r} cannot be a part's name; not empty, no slash, none of {', '.join(TAKEN)}")
    problems += [f"{where}.{line}" for line in check_shape(common.normalise, common.clip)]


def _name_of(function: Any) -> dict[str, str]:
    name = getattr(function, "__name__", type(function).__name__)
    return {"name": name} if name.isidentifier() and name not in TAKEN else {}


# -- one mapping, one dataclass -----------------------------------------------------------------------------------------


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
            wrong = _unknown_choice(value, choices) if choices else f"expected {words(hints[spot.name])}, found {value!r:.60}"
            problems.append(f"{where}.{spot.name}: {wrong}")
        elif float in _members(hints[spot.name]) and isinstance(value, int) and not isinstance(value, bool):
            values[spot.name] = value if int in _members(hints[spot.name]) else float(value)
        else:
            values[spot.name] = value
    if len(problems) > before:
        return None
    try:
        return settings(**values)
    except Problem as problem:  # the dataclass says which field of its own is wrong
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
    known = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null", dict: "a mapping"}
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


def _unknown_choice(value: Any, choices: Any) -> str:
    hint = _near(value, list(choices)) if isinstance(value, str) else None
    found = "missing" if value is None else f"unknown value {value!r:.60}"
    return f"{found}; did you mean {hint}?" if hint else f"{found}; choose one of {', '.join(map(str, choices))}"


def _near(value: str, choices: Sequence[Any]) -> str | None:
    names = [str(choice) for choice in choices]
    close = difflib.get_close_matches(value.lower(), names, n=1, cutoff=0.6)
    starts = [name for name in names if len(value) > 2 and (name.startswith(value.lower()) or value.lower().startswith(name))]
    return close[0] if close else starts[0] if starts else None
