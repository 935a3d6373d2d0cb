"""The reader of steering specs: every problem found, one line each with its dotted path, raised once.

load_spec(mapping | path | SteeringSpec) -> SteeringSpec
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.common.settings_reader import Path, Reader, Section, dotted, key_of, members, near_name
from steerl.rollout.common.yaml_files import load_yaml
from steerl.rollout.steering.core.places import At
from steerl.rollout.steering.core.table import SETTINGS, TABLE
from steerl.rollout.steering.spec.spec import ROLES, Gate, Op, Site, SteeringSpec, Where

MOST = 3e38
"""Of a number: what float32 holds."""
CORRECTED = [name for name, role in ROLES.items() if not role.one_law and name != "data"]
"""Roles whose rows are weighed."""
Faults = Iterator[tuple[tuple[str, ...], str]]
"""(name in the section, what is wrong)."""


def load_spec(source: Mapping[str, object] | str | pathlib.Path | SteeringSpec) -> SteeringSpec:
    """The checked spec. A path names a YAML file that holds the mapping, with or without `steering:` over it."""
    if isinstance(source, SteeringSpec):
        return dataclasses.replace(_read(SteeringSpec, source.mapping()), folder=source.folder)
    if isinstance(source, Mapping):
        return _read(SteeringSpec, source)  # type: ignore[no-any-return]
    path = pathlib.Path(source)
    problems: list[str] = []
    loaded: Mapping[str, object] | None = load_yaml(path, problems, "steering")
    if problems or loaded is None:
        raise ConfigError(*problems)
    if set(loaded) == {"steering"} and isinstance(loaded["steering"], Mapping):
        loaded = loaded["steering"]
    return dataclasses.replace(_read(SteeringSpec, loaded), folder=str(path.resolve().parent))


def read_at(mapping: Mapping[str, object], where: str) -> At:
    """The place that a mapping names; `where` is what messages call it."""
    return _read(At, mapping, (where,))  # type: ignore[no-any-return]


def _read(section: type, mapping: object, path: Path = ()) -> Any:
    reader = SpecReader([])
    built = reader.read(section, mapping, path)
    if reader.problems:
        raise ConfigError(*reader.problems)
    return built


class SpecReader(Reader):
    """A key without a value is one that is not given, and sections have rules of what goes with what."""

    def section(self, section: type, path: Path, mapping: Mapping[object, object]) -> Section:
        given: dict[str, Any] = {"on" if key is True else str(key): value for key, value in mapping.items()}  # YAML 1.1's `on`
        if section is Where and isinstance(given.get("exclude"), Mapping):
            given |= {f"exclude.{key}": value for key, value in given.pop("exclude").items()}
        checked = super().section(section, path, given)
        if section is Site:
            checked.setdefault("name", f"site{path[-1].strip('[]')}")
        for name, fault in RULES[section](checked) if section in RULES else ():
            if not self.has_told((*path, *name)):
                self.tell((*path, *name), fault)
        return checked

    def field(self, spot: dataclasses.Field[object], wanted: object, path: Path, value: object) -> object:
        return dataclasses.MISSING if value is None else super().field(spot, wanted, path, value)

    def judge(self, wanted: object, value: object) -> tuple[bool, object]:
        fits, found = super().judge(wanted, value)
        return fits and not (float in members(wanted) and isinstance(found, float) and abs(found) > MOST), found

    def misfit(self, wanted: object, path: Path, value: object) -> None:
        if float in members(wanted) and isinstance(value, int | float) and not isinstance(value, bool):
            self.tell(path, f"expected a number that float32 holds (at most {MOST:g} in size), found {value!r:.80}")
        else:
            super().misfit(wanted, path or ("steering",), value)

    def unknown_key(self, section: type, path: Path, key: str, value: object) -> str:
        known = [key_of(spot) for spot in dataclasses.fields(section) if key_of(spot)]
        near = near_name(key, known)
        hint = f"did you mean {near!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        return f"{dotted((*path, key))}: unknown key; {hint}"


# -- what goes with what: functions of the given values that fit ----------------------------------------------------------


def _top(spec: Section) -> Faults:
    sites = spec.get("sites", ())
    if "sites" in spec and not sites:
        yield ("sites",), "expected a list with at least one site, found []"
    names = [site.name for site in sites if site is not None]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield ("sites",), f"the name {name!r} is used {names.count(name)} times; give each site its own"
    role = spec.get("role", SteeringSpec.role)
    if "correction" in spec and role not in CORRECTED:
        wish = " and ".join(CORRECTED)
        yield ("correction",), f"only roles {wish} have one; remove it, or set role: {CORRECTED[0]} (found {role!r})"


def _site(site: Section) -> Faults:
    kind = site.get("op", {}).get("type", Op.type)
    operation = TABLE[kind]
    if "vector" not in site and operation.needs_vector:
        yield ("vector",), f"missing; op {kind} needs one, e.g. {{file: direction.safetensors}}"
    if "vector" in site and operation.family == "write" and operation.source != "vector":
        yield ("vector",), f"has no effect with op {kind}; remove it"
    if kind == "collect" and "strength" in site:
        yield ("strength",), "has no effect with op collect; remove it"
    where = site.setdefault("where", Section())
    encoder = site.get("at", {}).get("stack") == "encoder"
    if encoder:
        where["prompt"], where["steps"] = where.get("prompt", "all"), where.get("steps", "none")
    prompt, steps = where.get("prompt", Where.prompt), where.get("steps", Where.steps)
    if encoder and steps != "none":
        yield ("where", "steps"), "an encoder has no response steps; choose positions with prompt"
    if "ramp" in where and steps == "none":
        yield ("where", "ramp"), "runs over response steps, and steps is none; remove it or choose steps"
    if prompt == "none" and steps == "none":
        yield ("where",), "selects nothing (prompt and steps are both none); choose prompt or steps"


def _at(at: Section) -> Faults:
    if at.get("module"):
        for name in ("layers", "component", "stack", "head"):
            if name in at:
                yield (name,), "has no effect beside module; remove one of the two"
        return
    if "layers" not in at:
        yield ("layers",), "missing; give block numbers, e.g. [8, 9], or all"
    if "head" in at and "component" in at:
        yield ("component",), "has no effect beside head; remove one of the two"
    if "io" in at:
        yield ("io",), "goes with module; component names the side by itself"


def _op(op: Section) -> Faults:
    kind = op.get("type", Op.type)
    for name in SETTINGS:
        if name in op and name not in TABLE[kind].settings:
            takers = (other for other, operation in TABLE.items() if name in operation.settings)
            yield (name,), f"has no effect with op {kind}; it goes with {', '.join(takers)}"
    if kind == "scale" and "factor" not in op:
        yield ("factor",), "missing; op scale needs one, e.g. 0.5"
    if kind == "function" and ":" not in op.get("function", ""):
        yield ("function",), f"expected file.py:name, found {op.get('function', '')!r}"
    if TABLE[kind].family == "space" and not op.get("params"):
        yield ("params",), f"missing; op {kind} needs the file with its tensors"


def _gate(gate: Section) -> Faults:
    kind = gate.get("type", Gate.type)
    if kind != "sigmoid" and ("open_above" in gate) == ("open_below" in gate):
        yield ("open_above",), "give one of open_above and open_below"
    if kind == "sigmoid" and "open_below" in gate:
        yield ("open_below",), "has no effect with type sigmoid; use open_above, and scale: -1 to turn it round"


RULES: dict[type, Callable[[Section], Faults]] = {SteeringSpec: _top, Site: _site, At: _at, Op: _op, Gate: _gate}
