"""The one reader of settings: a mapping in, a frozen dataclass out, every problem told at once.

    mapping --check--> values that fit their fields --build--> the dataclass
                 '---- problems, a line each: dotted path, value found, remedy ----'

Commands (configs/reader.py), reward terms (reward/build.py) and steering specs (rollout/steering/spec/parse.py) are read by
it; each has a subclass with its own way to say what is unknown. A field's metadata may say

    low, high, above   the range of its number, or of the numbers in its list; `unit` follows the number
    choices            what it may be, where its type does not say so
    key                its name in the mapping, where that is another (`from`); empty: it cannot be given
    missing            what to do where it is not given and needed all the same
    read               (reader, path, value) -> the value, for what no type says
    check              a function that knows more about a free mapping: its UserError is told with the others
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, Union

from steerl.rollout.common.errors import ConfigError, UserError

Path = tuple[str, ...]
MISSING: Any = dataclasses.MISSING
MOST = 50
"""Problems that are looked for at once; a file of other settings altogether has thousands."""
LARGEST = 1 << 1000
"""Of a whole number that is taken for a float."""
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping", list: "a list"}
_WORDS |= {type(None): "null", Any: "anything", object: "anything", Callable: "a function"}  # type: ignore[dict-item]
ANYTHING = frozenset({Any, object})
"""The types of a value that may be whatever it is."""
_EXAMPLES = {int: "such as 8", float: "such as 0.5 or 1e-5", bool: "true or false"}


def within(default: object = MISSING, **metadata: object) -> Any:
    """A field with a range or what else its metadata says: `count: int = within(1, low=1)`."""
    return dataclasses.field(default=default, metadata=metadata)


class Checked:
    """Base of settings whose ranges hold however they are built; `problems` says what else is wrong, a line each."""

    def __post_init__(self) -> None:
        wrong = [
            f"{spot.name}: {line}"
            for spot in dataclasses.fields(self)  # type: ignore[arg-type]
            if (line := out_of_range(spot.metadata, getattr(self, spot.name)))
        ]
        if wrong := [*wrong, *self.problems()]:
            raise ConfigError(*wrong)

    def problems(self) -> Sequence[str]:
        return ()


class Section(dict[str, Any]):
    """What one file or flag says of a section: laid over what others say of it, where other mappings are replaced."""


# -- types --------------------------------------------------------------------------------------------------------------


def fields_of(section: type) -> dict[str, object]:
    """Name -> type of a section's fields."""
    hints = _hints(section)
    choices = {spot.name: tuple(spot.metadata.get("choices", ())) for spot in dataclasses.fields(section) if spot.init}
    return {name: Literal.__getitem__(allowed) if allowed else hints[name] for name, allowed in choices.items()}  # type: ignore[attr-defined]


@functools.cache
def _hints(section: type) -> dict[str, object]:
    return typing.get_type_hints(section)


def key_of(spot: dataclasses.Field[object]) -> str:
    return str(spot.metadata.get("key", spot.name))


def members(wanted: object) -> tuple[Any, ...]:
    """A union's members; any other type is its own only one."""
    return typing.get_args(wanted) if typing.get_origin(wanted) in (Union, types.UnionType) else (wanted,)


def section_of(wanted: object) -> type | None:
    """The dataclass among a type's members."""
    return next((m for m in members(wanted) if isinstance(m, type) and dataclasses.is_dataclass(m)), None)


def holds(wanted: object, *kinds: type) -> Any:
    """The member that is a list, tuple or mapping of one of these kinds; None where there is none."""
    return next((m for m in members(wanted) if m in kinds or typing.get_origin(m) in kinds), None)


def words(wanted: object) -> str:
    """A type as a person says it."""
    said = []
    for member in members(wanted):
        origin, inner = typing.get_origin(member), [a for a in typing.get_args(member) if a is not Ellipsis]
        if origin is Literal:
            said.append("one of " + ", ".join(map(str, inner)))
        elif origin in (list, tuple):
            said.append(f"a list (each {words(inner[0])})")
        elif section_of(member):
            said.append("a mapping")
        else:
            said.append(_WORDS.get(origin or member) or ("a function" if "Callable" in str(member) else str(member)))
    return " or ".join(dict.fromkeys(said))


def convert(wanted: object, value: object) -> tuple[bool, object]:
    """(whether a value is of a type as settings spell it, the value as the type has it). A bool is no number, and no number
    is nan or infinite."""
    if wanted in ANYTHING:
        return True, value
    found = ((m, *_of_member(m, value)) for m in members(wanted))
    fitting = [(type(as_it_is) is type(value), as_it_is) for _, fits, as_it_is in found if fits]
    return (True, max(fitting, key=lambda pair: pair[0])[1]) if fitting else (False, value)


def _of_member(wanted: Any, value: object) -> tuple[bool, object]:
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted in ANYTHING:
        return True, value
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner), value
    if origin in (list, tuple):
        items = [convert(inner[0], item) for item in value] if isinstance(value, list | tuple) else [(False, None)]
        return all(fits for fits, _ in items), origin(item for _, item in items)
    if origin is dict:
        fits = isinstance(value, Mapping) and all(convert(inner[0], k)[0] and convert(inner[1], v)[0] for k, v in value.items())
        return fits, value
    if wanted in (int, float) and (isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value))):
        return False, value
    if wanted is float and isinstance(value, int):
        return abs(value) < LARGEST, float(value) if abs(value) < LARGEST else value
    return isinstance(value, origin or wanted), value


def out_of_range(metadata: Mapping[str, Any], value: object) -> str:
    """What is wrong with a number, or with one of a list's, by the field's range; empty where nothing is."""
    low, high, above, unit = (*(metadata.get(name) for name in ("low", "high", "above")), metadata.get("unit", ""))
    for number in value if isinstance(value, list | tuple) else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float) or low is high is above is None:
            continue
        if low is not None and high is not None and not low <= number <= high:
            return f"expected {low:g} to {high:g}{unit}, found {number:g}"
        if low is not None and number < low:
            return f"expected {low:g} or more, found {number}" if not low else f"expected at least {low:g}, found {number}"
        if above is not None and number <= above:
            return f"expected more than {above:g}{unit}, found {number}"
        if high is not None and number > high:
            return f"expected at most {high:,.0f}{unit}, found {number:g}"
    return ""


# -- what to say --------------------------------------------------------------------------------------------------------


def dotted(path: Path) -> str:
    return ".".join(path).replace(".[", "[")


def brief(value: object) -> str:
    said = "null" if value is None else repr(str(value)) if isinstance(value, str) else str(value)
    return said if len(said) <= 80 else said[:77] + "..."


def near_name(name: str, known: Any) -> str | None:
    """The known name that is most likely meant."""
    names = [str(n) for n in known]
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.6)
    starts = [n for n in names if len(name) > 2 and (n.startswith(name.lower()) or name.lower().startswith(n))]
    return near[0] if near else starts[0] if starts else None


def choices_of(wanted: object) -> list[str]:
    return [str(choice) for m in members(wanted) if typing.get_origin(m) is Literal for choice in typing.get_args(m)]


def remedy(wanted: object, value: object) -> str:
    if choices := choices_of(wanted):
        near = near_name(str(value), choices)
        return f"did you mean {near}?" if near else f"choose {' or '.join(choices)}"
    if holds(wanted, list, tuple):
        return f"write it as [{brief(value)}]"
    if section_of(wanted) or wanted in ANYTHING or holds(wanted, dict):
        return "write it as {name: value}"
    if value is None:
        return "leave the line out for the default"
    if str in members(wanted) and not isinstance(value, str):
        return "put it in quotes"
    example = next((_EXAMPLES[m] for m in members(wanted) if m in _EXAMPLES), "see --help")
    return f"give {words(wanted)}, {example}" if example.startswith("such") else f"write {example}"


# -- reading ------------------------------------------------------------------------------------------------------------


class Reader:
    """Reads mappings; what is wrong goes to `problems`."""

    def __init__(self, problems: list[str], source: str = ""):
        self.problems = problems
        self.source = source
        """Where the values stand, for its lines: a file, the command line."""

    def tell(self, path: Path, line: str) -> None:
        self.problems.append(f"{dotted(path)}: {line}")

    def has_told(self, path: Path) -> bool:
        return any(line.startswith(tuple(dotted(path) + after for after in (": ", ".", "["))) for line in self.problems)

    def read(self, section: type, mapping: object, path: Path = ()) -> Any:
        """The dataclass of a mapping; None, and lines in `problems`, where something of it is wrong."""
        before = len(self.problems)
        if not isinstance(mapping, Mapping):
            self.misfit(section, path, mapping)
            return None
        built = self.build(section, self.section(section, path, mapping), path)
        return built if len(self.problems) == before else None

    def section(self, section: type, path: Path, mapping: Mapping[Any, object]) -> Section:
        """The values of a mapping that fit their fields."""
        types_of = fields_of(section)
        known = {key_of(spot): spot for spot in dataclasses.fields(section) if spot.init and key_of(spot)}
        checked = Section()
        for key, inner in mapping.items():
            if len(self.problems) >= MOST:
                break
            spot = known.get(str(key))
            if spot is None:
                self.problems.append(self.unknown_key(section, path, str(key), inner))
                near = near_name(str(key), known)
                if (
                    near
                    and isinstance(inner, dict)
                    and not isinstance(inner, Section)
                    and section_of(types_of[known[near].name])
                ):
                    self.value(types_of[known[near].name], (*path, str(key)), inner)  # only for the problems inside it
                continue
            value = self.field(spot, types_of[spot.name], (*path, str(key)), inner)
            if value is not MISSING:
                checked[spot.name] = value
        return checked

    def field(self, spot: dataclasses.Field[object], wanted: object, path: Path, value: object) -> object:
        read: Callable[..., object] | None = spot.metadata.get("read")
        value = self.value(wanted, path, value) if read is None else read(self, path, value)
        if value is not MISSING and (line := out_of_range(spot.metadata, value)):
            self.tell(path, line)
            return MISSING
        return value

    def value(self, wanted: object, path: Path, value: object) -> Any:
        """The value as its type has it; MISSING, and a line in `problems`, where it does not fit."""
        section, optional = section_of(wanted), type(None) in members(wanted)
        if section is not None and value is None and not optional:
            return Section()  # `section:` with nothing under it is how a commented-out section looks
        if section is not None and isinstance(value, Mapping):
            checked = self.section(section, path, value)
            return dict(checked) if optional and not isinstance(value, Section) else checked
        several = holds(wanted, list, tuple)
        if several is not None and isinstance(value, list | tuple) and (inner := typing.get_args(several)):
            before = len(self.problems)
            items = [self.item(inner[0], (*path, f"[{index}]"), item) for index, item in enumerate(value)]
            return typing.get_origin(several)(items) if len(self.problems) == before else MISSING
        fits, found = self.judge(wanted, value)
        if not fits:
            self.misfit(wanted, path, value)
        return found if fits else MISSING

    def choice(self, choices: Sequence[str], path: Path, value: object) -> object:
        return self.value(Literal.__getitem__(tuple(choices)), path, value)  # type: ignore[attr-defined]

    def item(self, wanted: object, path: Path, value: object) -> object:
        """One of a list: a section is built at once, for lists are replaced and never laid over each other."""
        checked = self.value(wanted, path, value)
        section = section_of(wanted)
        return self.build(section, checked, path) if section is not None and isinstance(checked, dict) else checked

    def judge(self, wanted: object, value: object) -> tuple[bool, object]:
        return convert(wanted, value)

    def build(self, section: type, tree: Mapping[str, object], path: Path = (), complete: bool = True) -> Any:
        """The dataclass of checked values; None where it cannot be built. A section's own UserError joins the others.
        Not `complete`: what is needed and missing is None."""
        before, buildable = len(self.problems), True
        values: dict[str, object] = {}
        for spot in dataclasses.fields(section):
            if not spot.init:
                continue
            wanted, spot_path = fields_of(section)[spot.name], (*path, key_of(spot))
            inner, value = section_of(wanted), tree.get(spot.name, MISSING)
            needed = (spot.default is MISSING and spot.default_factory is MISSING) or "missing" in spot.metadata
            if value is MISSING and needed and inner is not None and "missing" not in spot.metadata:
                value = {}
            if inner is not None and isinstance(value, dict):
                values[spot.name] = self.build(inner, value, spot_path, complete)
                buildable = buildable and values[spot.name] is not None
            elif value is not MISSING:
                values[spot.name] = value
                self.judge_further(spot, spot_path, value)
            elif needed and complete:
                buildable = False
                if not self.has_told(spot_path):
                    self.tell(spot_path, f"missing; {self.wish(spot, spot_path, wanted)}")
            elif needed:
                values[spot.name] = None
        if not buildable or len(self.problems) > before:
            return None
        try:
            return section(**values)
        except UserError as problem:
            relative = issubclass(section, Checked)
            self.problems += [f"{dotted(path)}.{line}" if relative and path else line for line in problem.lines]
            return None

    def judge_further(self, spot: dataclasses.Field[object], path: Path, value: object) -> None:
        """Who knows the inside of a free mapping may not know where it stands: the path goes before lines that lack it."""
        if value is None or "check" not in spot.metadata:
            return
        try:
            spot.metadata["check"](value)
        except UserError as problem:
            place = dotted(path)
            for line in problem.lines:
                inside = re.match(r"[\w.\[\]]+: ", line)
                told = line if line.startswith(place) else f"{place}.{line}" if inside else f"{place}: {line}"
                self.problems.append(told)

    # -- sentences that a subclass may say in its own way ---------------------------------------------------------------

    def unknown_key(self, section: type, path: Path, key: str, value: object) -> str:
        known = list(fields_of(section))
        near = near_name(key, known)
        hint = f"did you mean {near}?" if near else f"it takes {', '.join(sorted(known))}"
        return f"{dotted((*path, key))}: unknown (value {brief(value)}); {hint}"

    def misfit(self, wanted: object, path: Path, value: object) -> None:
        source = f" ({self.source})" if self.source else ""
        self.tell(path, f"expected {words(wanted)}, found {brief(value)}{source}; {remedy(wanted, value)}")

    def wish(self, spot: dataclasses.Field[object], path: Path, wanted: object) -> str:
        return str(spot.metadata.get("missing") or f"give {words(wanted)}")


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def are_whole(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(map(is_whole, value))


def whole_numbers(what: str = "", *, single: bool = False, word: str = "") -> Callable[[Reader, Path, object], object]:
    """For `read`: a list of whole numbers, not empty. A `single` one may stand by itself, and a word for all of them."""

    def read(reader: Reader, path: Path, value: Any) -> object:
        if word and isinstance(value, str) and value.strip() == word:
            return word
        value = [value] if single and is_whole(value) else value
        if are_whole(value) and value:
            return tuple(value)
        reader.tell(path, f"expected a list of whole numbers{f' ({what})' if what else ''}, found {value!r}")
        return MISSING

    return read


def every_path(section: type, path: Path = ()) -> Iterator[Path]:
    """Every setting's path, sections included."""
    for name, wanted in fields_of(section).items():
        yield (*path, name)
        if (inner := section_of(wanted)) is not None:
            yield from every_path(inner, (*path, name))
