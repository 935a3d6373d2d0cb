"""The values of files and flags against the fields of a Job: flags' texts, sections in files of their own, wrong names."""

from __future__ import annotations

import dataclasses
import math
import typing
from pathlib import Path as FilePath

from steerl.rollout.common import settings_reader
from steerl.rollout.common.settings_reader import (
    ANYTHING,
    MISSING,
    Path,
    Section,
    brief,
    dotted,
    every_path,
    fields_of,
    holds,
    members,
    near_name,
    section_of,
    words,
)
from steerl.rollout.common.yaml_files import load_text, load_yaml


class Text(str):
    """A flag's value: text that may still turn out to be a number, a bool, null, a list or a mapping."""


class ValueReader(settings_reader.Reader):
    """What one file or the command line says, as a Section of values that fit."""

    def value(self, wanted: object, path: Path, value: object) -> object:
        section, before = section_of(wanted), len(self.problems)
        if section is not None and isinstance(value, str) and value.endswith((".yaml", ".yml")):
            tree = load_yaml(FilePath(value), self.problems, dotted(path))
            return MISSING if tree is None else ValueReader(self.problems, value).value(wanted, path, tree)
        if isinstance(value, Text) and _is_yaml(wanted, value):
            value = load_text(value, dotted(path), self.problems)
            if len(self.problems) > before:
                return MISSING
        if isinstance(value, Section) and section is None:
            return self._into_mapping(wanted, path, value)
        if (unfit := _unfit(value)) is not None and not (section is not None and isinstance(value, dict)):
            self.problems.append(f"{dotted(path)}: {unfit} ({self.source}); take it out")
            return MISSING
        return super().value(wanted, path, value)

    def _into_mapping(self, wanted: object, path: Path, value: Section) -> object:
        """A flag into a free mapping: it sets one key and leaves the others."""
        if wanted not in ANYTHING and holds(wanted, dict) is None:
            below, text = leaf(path, value)
            told = f"{dotted(path)} takes {words(wanted)}, nothing below it"
            self.problems.append(f"{dotted(below)}: unknown ({self.source}, value {brief(text)}); {told}")
            return MISSING
        inner = (typing.get_args(holds(wanted, dict)) if wanted not in ANYTHING else ()) or (str, object)
        checked = {name: self.value(inner[1], (*path, name), one) for name, one in value.items()}
        return Section({name: one for name, one in checked.items() if one is not MISSING})

    def judge(self, wanted: object, value: object) -> tuple[bool, object]:
        kinds = members(wanted)
        if isinstance(value, str) and bool in kinds and value in ("yes", "no"):  # plain YAML's words for it
            return True, value == "yes"
        optional = type(None) in kinds
        if isinstance(value, Text) and optional and str in kinds and value in ("null", "~"):
            return True, None
        if isinstance(value, str) and str not in kinds and ANYTHING.isdisjoint(kinds):
            problems: list[str] = []
            value = load_text(value, "", problems)
            if problems or value is None or _unfit(value) is not None:
                return optional and not problems and value is None, value
        fits, found = settings_reader.convert(wanted, value)
        return fits, str(found) if isinstance(found, Text) else found

    def unknown_key(self, section: type, path: Path, key: str, value: object) -> str:
        below, value = leaf((*path, key), value)
        return unknown(section, below, brief(value), self.source, within=path)

    def wish(self, spot: dataclasses.Field[object], path: Path, wanted: object) -> str:
        return f"give {words(wanted)}, " + ("VALUE" if spot.metadata.get("positional") else f"--{dotted(path)} VALUE")


def leaf(path: Path, value: object) -> tuple[Path, object]:
    """A flag's whole path, and its text."""
    while isinstance(value, Section) and value:
        ((name, value),) = value.items()
        path = (*path, name)
    return path, value


def _is_yaml(wanted: object, text: str) -> bool:
    """Whether a flag's text is more than one word of its own: always where no text may stand, else by its first letter."""
    section = section_of(wanted)
    if section is None and wanted not in ANYTHING and holds(wanted, list, tuple, dict) is None:
        return False
    return str not in members(wanted) or section is not None or text.lstrip()[:1] in ("{", "[")


def _unfit(value: object) -> str | None:
    """What no setting can be: text that no file can hold, numbers that are not finite, whole ones that no tensor can hold."""
    if isinstance(value, dict | list | tuple):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return next((unfit for one in inner if (unfit := _unfit(one)) is not None), None)
    if isinstance(value, str):
        bad = next((letter for letter in value if letter == "\0" or "\ud800" <= letter <= "\udfff"), None)
        return None if bad is None else f"{brief(str(value))} holds {bad!a}, a character that no file or name can have"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    too_large = isinstance(value, int) and not -(1 << 63) <= value < 1 << 63
    return "a whole number that does not fit 64 bits" if too_large else None


def type_at(job_type: type, path: Path) -> object:
    """The type of the setting at `path`; anything inside a free mapping; None where there is no such setting."""
    wanted: object = job_type
    for name in path:
        section = section_of(wanted)
        if section is not None:
            wanted = fields_of(section).get(name)
        elif wanted not in ANYTHING and (mapping := holds(wanted, dict)) is not None:
            wanted = (typing.get_args(mapping) or (str, object))[1]
        elif wanted not in ANYTHING:
            return None
    return wanted


def unknown(section: type, path: Path, value: str, source: str, within: Path = ()) -> str:
    """The line for a setting that does not exist; `section` is the one at `within`, whose next name on `path` is not there."""
    known, depth = fields_of(section), len(within)
    near = near_name(path[depth], known)
    if near is not None:
        guess = (*path[:depth], near, *path[depth + 1 :])
        inner = section_of(known[near])
        if inner is not None and type_at(section, guess[depth:]) is None:
            last = near_name(path[-1], fields_of(inner))
            guess = (*path[:depth], near, last) if last else (*path[:depth], near)
        return f"{dotted(path)}: unknown ({source}, value {value}); did you mean {dotted(guess)}?"
    inside = list(every_path(section, path[:depth]))
    for name in (path[-1], near_name(path[-1], [p[-1] for p in inside])):
        if elsewhere := next((p for p in inside if p[-1] == name), None):
            return f"{dotted(path)}: unknown ({source}, value {value}); did you mean {dotted(elsewhere)}?"
    owner = dotted(path[:depth]) or "this command"
    return f"{dotted(path)}: unknown ({source}, value {value}); {owner} takes {', '.join(known)}"
