"""The way back: a SteeringSpec as the plain mapping a user would have written, defaults left out."""

from __future__ import annotations

import dataclasses
from typing import Any

from steerl.rollout.steering.spec import spec as parts


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _changed(value: Any, default: Any, renames: dict[str, str] | None = None) -> dict[str, Any]:
    """The fields in which a dataclass differs from its default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        mine = getattr(value, field.name)
        if default is None or mine != getattr(default, field.name):
            found[(renames or {}).get(field.name, field.name)] = _plain(mine)
    return found


def _strength(strength: parts.Strength) -> Any:
    if strength.norm_match:
        return {"norm_match": strength.value}
    if strength.column:
        return {"column": strength.column} | ({"value": strength.value} if strength.value != 1.0 else {})
    if strength.dist == "uniform":
        return {"dist": "uniform", "low": strength.low, "high": strength.high, "per": strength.per}
    if strength.dist:
        return {"dist": "normal", "mean": strength.mean, "std": strength.std, "per": strength.per}
    return strength.value


def _where(where: parts.Where, at: parts.At) -> dict[str, Any]:
    plain = parts.Where(prompt="all", steps="none") if at.stack == "encoder" else parts.Where()
    found = {name: _plain(getattr(where, name)) for name in ("prompt", "steps") if getattr(where, name) != getattr(plain, name)}
    if where.ramp is not None:
        found["ramp"] = _changed(where.ramp, None, {"start": "from", "end": "to"})
    exclude = {"token_ids": _plain(where.exclude_tokens), "positions": _plain(where.exclude_positions)}
    if any(exclude.values()):
        found["exclude"] = {k: v for k, v in exclude.items() if v}
    return found


def _site(site: parts.Site) -> dict[str, Any]:
    at = {"module": site.at.module, "io": site.at.io} if site.at.module else _changed(site.at, parts.At())
    found: dict[str, Any] = {"name": site.name, "at": at}
    found["op"] = {"type": site.op.type, **_changed(site.op, parts.Op())}
    if site.vector is not None:
        found["vector"] = _plain(site.vector)
    if site.strength != parts.Strength():
        found["strength"] = _strength(site.strength)
    if where := _where(site.where, site.at):
        found["where"] = where
    if site.schedule is not None:
        found["schedule"] = _changed(site.schedule, None, {"start": "from", "end": "to"})
    if site.gate is not None:
        found["gate"] = {k: v for k, v in _changed(site.gate, None).items() if v is not None}
    return found


def to_mapping(spec: parts.SteeringSpec) -> dict[str, Any]:
    found: dict[str, Any] = {"role": spec.role, "sites": [_site(site) for site in spec.sites]}
    plain = parts.SteeringSpec(sites=())
    for name in ("name", "fraction", "reference", "on_deploy"):
        if getattr(spec, name) != getattr(plain, name):
            found[name] = getattr(spec, name)
    if spec.correction is not None:
        found["correction"] = _changed(spec.correction, None)
    if spec.kl_budget is not None:
        found["kl_budget"] = _changed(spec.kl_budget, None)
    return found
