"""Settings shown to a person: --help, --print_config with the docstrings as comments, and the resolved YAML of a run."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import textwrap
from pathlib import Path as FilePath
from typing import Any

import yaml

from steerl.rollout.common import yaml_files
from steerl.rollout.common.settings_reader import Path, dotted, fields_of, section_of, words

WIDTH = 110


def plain(value: object) -> Any:
    """Settings as YAML has them: mappings, lists, scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {spot.name: plain(getattr(value, spot.name)) for spot in dataclasses.fields(value) if spot.init}
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


class _Dumper(yaml_files.Dumper):
    """Dumper that keeps a text with line breaks on one line."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None)


_Dumper.add_representer(str, _text)


def to_yaml(job: object) -> str:
    text: str = yaml.dump(plain(job), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=WIDTH)
    return text


def docs(section: type) -> dict[str, str]:
    """Name -> the docstring under the field, on one line; those of the sections that it builds on, too."""
    import docstring_parser  # of help alone: a job runs without

    bases = [base for base in reversed(section.__mro__) if dataclasses.is_dataclass(base)]
    params = [param for base in bases for param in docstring_parser.parse_from_object(base).params]
    return {param.arg_name: " ".join((param.description or "").split()) for param in params}


def default(spot: dataclasses.Field[object]) -> object:
    if spot.default is not dataclasses.MISSING:
        return spot.default
    return dataclasses.MISSING if spot.default_factory is dataclasses.MISSING else spot.default_factory()


def flow(value: object) -> str:
    """A value on one line of YAML."""
    text: str = yaml.dump(
        plain(value), Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6
    )
    return text.strip().removesuffix("...").strip()


def help_text(job_type: type) -> str:
    script = FilePath(sys.argv[0]).name
    places = [spot.name.upper() for spot in dataclasses.fields(job_type) if spot.metadata.get("positional")]
    lines = [" ".join([f"usage: {script}", *places, "[--config FILE]... [--section.field VALUE]..."]), ""]
    about = inspect.getdoc(job_type) or ""
    if about and not about.startswith(f"{job_type.__name__}("):
        lines += [*textwrap.wrap(about, WIDTH), ""]
    lines += [
        "  --config FILE    settings as YAML; of several files the later wins, and flags win over files;",
        "                   steerl:NAME is one of the shipped files",
        "  --print_config   print the settings in full, as YAML with comments, and stop",
        "  --help           this text",
    ]
    lines += _help_of(job_type, (), "")
    return "\n".join(lines)


def _help_of(section: type, path: Path, title: str) -> list[str]:
    known, said = fields_of(section), docs(section)
    lines = ["", title] if title else [""]
    inner: list[str] = []
    for spot in dataclasses.fields(section):
        if not spot.init:
            continue
        wanted, spot_path = known[spot.name], (*path, spot.name)
        below = section_of(wanted)
        if below is not None:
            about = said.get(spot.name) or " ".join((inspect.getdoc(below) or "").split("\n\n")[0].split())
            about = "" if about.startswith(f"{below.__name__}(") else about
            inner += _help_of(below, spot_path, f"{dotted(spot_path)}: {about}" if about else dotted(spot_path))
            continue
        value = default(spot)
        needed = "needed" if value is dataclasses.MISSING else f"default {flow(value)}"
        name = spot.name.upper() if spot.metadata.get("positional") else f"--{dotted(spot_path)}"
        lines.append(f"  {name}  ({words(wanted)}; {needed})")
        lines += textwrap.wrap(said.get(spot.name, ""), WIDTH, initial_indent="      ", subsequent_indent="      ")
    return (lines if len(lines) > 1 or title else []) + inner


def commented_yaml(job_type: type, job: object) -> str:
    """The settings in full, each under its docstring; --config reads it back."""
    return "\n".join(_commented(job_type, job, 0)) + "\n"


def _commented(section: type, value: object, depth: int) -> list[str]:
    known, said = fields_of(section), docs(section)
    margin = "  " * depth
    lines: list[str] = []
    for name, wanted in known.items():
        inner = getattr(value, name)
        lines += textwrap.wrap(said.get(name, ""), WIDTH, initial_indent=f"{margin}# ", subsequent_indent=f"{margin}# ")
        below = section_of(wanted)
        if below is not None and dataclasses.is_dataclass(inner):
            lines += [f"{margin}{name}:", *_commented(below, inner, depth + 1)]
        else:
            lines.append(f"{margin}{name}: {flow(inner)}")
    return lines
