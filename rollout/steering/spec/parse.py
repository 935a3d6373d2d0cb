"""The reader of steering specs: every problem found, one line each with its dotted path, raised once.

load_spec(mapping | path | SteeringSpec) -> SteeringSpec
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.yaml_files import load_yaml
from steerl.rollout.steering.core.places import At, Ramp
from steerl.rollout.steering.core.table import ACTIVATIONS, SETTINGS, TABLE
from steerl.rollout.steering.spec.reading import Fields
from steerl.rollout.steering.spec.spec import (  # fmt: skip
    COMPONENTS,
    CORRECTIONS,
    ROLES,
    Correction,
    Gate,
    KLBudget,
    Op,
    Schedule,
    Site,
    SteeringSpec,
    Strength,
    Where,
)


def load_spec(source: Mapping[str, Any] | str | Path | SteeringSpec) -> SteeringSpec:
    """The checked spec. A path names a YAML file that holds the mapping, with or without `steering:` over it."""
    if isinstance(source, SteeringSpec):
        return dataclasses.replace(_read(source.mapping()), folder=source.folder)
    if isinstance(source, Mapping):
        return _read(source)
    path = Path(source)
    problems: list[str] = []
    loaded: Mapping[str, Any] | None = load_yaml(path, problems, "steering")
    if problems or loaded is None:
        raise UserError(*problems)
    if set(loaded) == {"steering"} and isinstance(loaded["steering"], Mapping):
        loaded = loaded["steering"]
    return dataclasses.replace(_read(loaded), folder=str(path.resolve().parent))


def _read(raw: Mapping[str, Any]) -> SteeringSpec:
    problems: list[str] = []
    top = Fields(raw, "steering", problems)
    listed = top.list("sites", required="at least one site")
    sites = tuple(_site(Fields(site, f"sites[{i}]", problems), i) for i, site in enumerate(listed))
    names = [site.name for site in sites]
    for name in sorted({n for n in names if names.count(n) > 1}):
        problems.append(f"sites: the name {name!r} is used {names.count(name)} times; give each site its own")
    role = top.choice("role", ROLES, SteeringSpec.role)
    correction = None
    if (inner := top.section("correction")) is not None:
        correction = Correction(
            inner.choice("type", CORRECTIONS, Correction.type),  # type: ignore[arg-type]
            inner.number("high", Correction.high, low=0.0),
            inner.number("low", Correction.low, low=0.0),
        )
        inner.done()
        if role != "behaviour":
            problems.append(f"correction: only role behaviour has one; remove it, or set role: behaviour (found {role!r})")
    budget = None
    if (inner := top.section("kl_budget")) is not None:
        budget = KLBudget(
            inner.number("nats_per_sequence", None, low=0.0),
            inner.choice("action", ("rescale", "warn", "error"), KLBudget.action),
        )
        inner.done()
    spec = SteeringSpec(
        sites=sites,
        role=role,
        name=top.text("name", SteeringSpec.name),
        fraction=top.number("fraction", SteeringSpec.fraction, low=0.0, high=1.0),
        correction=correction,
        kl_budget=budget,
        reference=top.choice("reference", ("unsteered",), SteeringSpec.reference),
        on_deploy=top.choice("on_deploy", ("keep", "strip", "fold"), SteeringSpec.on_deploy),
    )
    top.done()
    if problems:
        raise UserError(*problems)
    return spec


def _site(fields: Fields, index: int) -> Site:
    at = read_at(fields.section("at", required="say where: {layers: [8]} or {module: PATH}"))
    op = _op(fields.section("op"))
    vector = fields.vector("vector")
    strength = _strength(fields)
    where = _where(fields.section("where"), at)
    site = Site(
        name=fields.text("name", f"site{index}"),
        at=at, op=op, vector=vector, strength=strength, where=where,
        schedule=_schedule(fields.section("schedule")), gate=_gate(fields.section("gate")),
    )  # fmt: skip
    operation = TABLE[op.type]
    if vector is None and operation.needs_vector:
        fields.problem("vector", f"missing; op {op.type} needs one, e.g. {{file: direction.safetensors}}")
    if vector is not None and operation.family == "write" and operation.source != "vector":
        fields.problem("vector", f"has no effect with op {op.type}; remove it")
    if op.type == "collect" and fields.has("strength"):
        fields.problem("strength", "has no effect with op collect; remove it")
    fields.done()
    return site


def read_at(fields: Fields | None) -> At:
    if fields is None:
        return At()
    module = fields.text("module", "")
    if module:
        at = At(module=module, io=fields.choice("io", ("output", "input"), At.io))
        for name in ("layers", "component", "stack", "head"):
            if fields.has(name):
                fields.problem(name, "has no effect beside module; remove one of the two")
                fields.drop(name)
        fields.done()
        return at
    layers: Any = fields.raw("layers")
    if layers == "all" or (isinstance(layers, str) and layers.strip() == "all"):
        layers = "all"
    elif isinstance(layers, int) and not isinstance(layers, bool):
        layers = (layers,)
    else:
        layers = fields.integers("layers", layers, required="block numbers, e.g. [8, 9], or all")
    head: Any = fields.raw("head")
    heads: tuple[int, ...] = ()
    if head is not None:
        heads = (
            (head,)
            if isinstance(head, int) and not isinstance(head, bool)
            else fields.integers("head", head, required="head numbers")
        )
        if fields.has("component"):
            fields.problem("component", "has no effect beside head; remove one of the two")
    at = At(
        layers=layers,
        component=fields.choice("component", COMPONENTS, At.component),
        stack=fields.choice("stack", ("decoder", "encoder"), At.stack),
        head=heads,
    )
    if fields.has("io"):
        fields.problem("io", "goes with module; component names the side by itself")
        fields.drop("io")
    fields.done()
    return at


def _op(fields: Fields | None) -> Op:
    if fields is None:
        return Op()
    kind = fields.choice("type", tuple(TABLE), Op.type)
    operation = TABLE[kind]
    for name in SETTINGS:
        if fields.has(name) and name not in operation.settings:
            takers = (other for other, entry in TABLE.items() if name in entry.settings)
            fields.problem(name, f"has no effect with op {kind}; it goes with {', '.join(takers)}")
    if kind == "scale" and not fields.has("factor"):
        fields.problem("factor", "missing; op scale needs one, e.g. 0.5")
    coordinates = fields.raw("coordinates")
    op = Op(
        type=kind,
        coordinates=None if coordinates is None else fields.integers("coordinates", coordinates, required="indices", low=0),
        factor=fields.number("factor", Op.factor),
        value=fields.number("value", Op.value),
        rank=fields.integer("rank", Op.rank, low=1),
        act=fields.choice("act", tuple(ACTIVATIONS), Op.act),
        temperature=fields.number("temperature", Op.temperature),
        boundary=fields.number("boundary", Op.boundary, low=0.0, high=1.0),
        residual=fields.flag("residual", Op.residual),
        params=fields.text("params", Op.params),
        function=fields.text("function", Op.function),
    )
    if kind == "function" and ":" not in op.function:
        fields.problem("function", f"expected file.py:name, found {op.function!r}")
    if operation.family == "space" and not op.params:
        fields.problem("params", f"missing; op {kind} needs the file with its tensors")
    fields.done()
    return op


def _strength(site: Fields) -> Strength:
    value = site.raw("strength")
    if value is None:
        return Strength()
    if not isinstance(value, Mapping):
        return Strength(value=site.check_number("strength", value))
    fields = Fields(value, f"{site.path}.strength", site.problems)
    kinds = [k for k in ("column", "dist", "norm_match") if fields.has(k)]
    if len(kinds) != 1:
        fields.problem(
            "", f"expected a number, {{column: c}}, {{dist: uniform, ...}} or {{norm_match: x}}, found {dict(value)!r}"
        )
        return Strength()
    if kinds == ["column"]:
        found = Strength(column=fields.text("column", ""), value=fields.number("value", Strength.value))
    elif kinds == ["norm_match"]:
        found = Strength(norm_match=True, value=fields.number("norm_match", Strength.value))
    else:
        dist = fields.choice("dist", ("uniform", "normal"), "uniform")
        per = fields.choice("per", ("sample", "prompt"), Strength.per)
        if dist == "uniform":
            found = Strength(dist=dist, low=fields.number("low", Strength.low), high=fields.number("high", None), per=per)
            if found.high <= found.low:
                fields.problem("high", f"must be above low = {found.low:g}, found {found.high:g}")
        else:
            found = Strength(
                dist=dist, mean=fields.number("mean", Strength.mean), std=fields.number("std", None, low=0.0), per=per
            )
    fields.done()
    return found


def _where(fields: Fields | None, at: At) -> Where:
    encoder = at.stack == "encoder"
    if fields is None:
        return Where(prompt="all", steps="none") if encoder else Where()
    prompt = fields.positions("prompt", "all" if encoder else "none", ("none", "all", "last"), negative=True)
    steps = fields.positions("steps", "none" if encoder else "all", ("none", "all", "generated_positions"), negative=False)
    if encoder and steps != "none":
        fields.problem("steps", "an encoder has no response steps; choose positions with prompt")
    ramp = None
    if (inner := fields.section("ramp")) is not None:
        ramp = Ramp(
            inner.choice("type", ("linear", "cosine"), Ramp.type), inner.integer("over", None, low=1),
            inner.number("from", Ramp.start), inner.number("to", Ramp.end),
        )  # fmt: skip
        inner.done()
        if steps == "none":
            fields.problem("ramp", "runs over response steps, and steps is none; remove it or choose steps")
    tokens: tuple[int | str, ...] = ()
    places: tuple[int, ...] = ()
    if (inner := fields.section("exclude")) is not None:
        tokens = inner.tokens("token_ids")
        places = inner.integers("positions", inner.raw("positions"), required="") if inner.has("positions") else ()
        inner.done()
    if prompt == "none" and steps == "none":
        fields.problem("", "selects nothing (prompt and steps are both none); choose prompt or steps")
    fields.done()
    return Where(prompt, steps, ramp, tokens, places)


def _schedule(fields: Fields | None) -> Schedule | None:
    if fields is None:
        return None
    over = fields.choice("over", ("train_steps",), Schedule.over)
    schedule = Schedule(
        fields.choice("type", ("linear", "cosine", "constant"), Schedule.type),
        fields.number("from", Schedule.start), fields.number("to", Schedule.end),
        fields.number("until", Schedule.until, low=0.0, high=1.0), over,
    )  # fmt: skip
    fields.done()
    return schedule


def _gate(fields: Fields | None) -> Gate | None:
    if fields is None:
        return None
    kind = fields.choice("type", ("cosine", "projection", "sigmoid"), Gate.type)
    gate = Gate(
        vector=fields.vector("vector"),
        layer=fields.integer("layer", None),
        type=kind,
        on=fields.choice("on", ("prompt_mean", "prompt_last", "token"), Gate.on),
        open_above=fields.number("open_above", 0.0) if fields.has("open_above") else None,
        open_below=fields.number("open_below", 0.0) if fields.has("open_below") else None,
        scale=fields.number("scale", Gate.scale),
    )
    if gate.vector is None:
        fields.problem("vector", "missing; the gate compares activations with it")
    if kind != "sigmoid" and (gate.open_above is None) == (gate.open_below is None):
        fields.problem("open_above", "give one of open_above and open_below")
    if kind == "sigmoid" and gate.open_below is not None:
        fields.problem("open_below", "has no effect with type sigmoid; use open_above, and scale: -1 to turn it round")
    fields.done()
    return gate
