"""What a user may write under `steering:`, as frozen dataclasses.

YAML and Python objects are one to one: `SteeringSpec.mapping()` gives back what `load_spec` (parse.py) reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from steerl.rollout.common.settings_reader import MISSING, Path, Reader, key_of, whole_numbers, within
from steerl.rollout.steering.core.places import At, Ramp
from steerl.rollout.steering.core.table import ACTIVATIONS, TABLE
from steerl.rollout.steering.spec import reading

CorrectionType = Literal[
    "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_truncate", "geometric_mask"
]
CORRECTIONS: tuple[str, ...] = get_args(CorrectionType)


class Role(NamedTuple):
    """On which sides the model is the steered one."""

    draws: bool
    """Rows are drawn from it."""
    learns: bool
    """The policy's log-probs, old and new, are its, and its gradient is what weights learn by."""
    stays: bool
    """It is what a run leaves, unless `on_deploy` strips it."""

    @property
    def one_law(self) -> bool:
        """Rows are drawn from the policy that learns; else pi / mu weighs them."""
        return self.draws == self.learns


ROLES = {
    "policy": Role(draws=True, learns=True, stays=True),
    "trainable": Role(draws=True, learns=True, stays=True),
    "behaviour": Role(draws=True, learns=False, stays=False),
    "preventative": Role(draws=False, learns=True, stays=False),
    "data": Role(draws=True, learns=False, stays=False),
}


@dataclass(frozen=True)
class Op:
    """What is done there."""

    type: str = within("add", choices=TABLE)
    coordinates: tuple[int, ...] | None = within(None, read=whole_numbers("indices"), low=0)
    factor: float = 0.0
    """scale: h * factor."""
    value: float = 0.0
    """clamp: what h.u becomes."""
    rank: int = within(4, low=1)
    """Learned operations: size of the low-rank space or bottleneck."""
    act: str = within("", choices=ACTIVATIONS)
    """Learned operations: identity (default), relu (default of adapter), gelu, silu, tanh."""
    temperature: float = 1.0
    boundary: float = within(0.5, low=0.0, high=1.0)
    residual: bool = False
    """autoencoder, jumprelu: keep what the autoencoder does not rebuild."""
    params: str = ""
    """Operations in a space: safetensors file with the space's tensors."""
    function: str = ""
    """function: file.py:name, called with (base, source, strength)."""


@dataclass(frozen=True)
class Strength:
    """How much: a number, a column of the data, one of a list for each sample, a distribution, or a share of the activation's
    own norm."""

    value: float = 1.0
    column: str = ""
    dist: str = ""
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    std: float = 0.0
    per: str = "sample"
    norm_match: bool = False
    samples: tuple[float, ...] = ()
    """Of the samples of a prompt in turn: sample i has entry i modulo their number."""


# The forms that a strength may be written in besides a number.


@dataclass(frozen=True)
class ByColumn:
    column: str
    value: float = Strength.value


@dataclass(frozen=True)
class NormMatch:
    norm_match: float


@dataclass(frozen=True)
class BySample:
    samples: tuple[float, ...]


@dataclass(frozen=True)
class Uniform:
    high: float
    low: float = Strength.low
    dist: str = within("uniform", choices=("uniform", "normal"))
    per: str = within("sample", choices=("sample", "prompt"))


@dataclass(frozen=True)
class Normal:
    std: float = within(low=0.0)
    mean: float = Strength.mean
    dist: str = "normal"
    per: str = within("sample", choices=("sample", "prompt"))


def read_strength(reader: Reader, path: Path, value: object) -> object:
    if not isinstance(value, Mapping):
        number = reader.value(float, path, value)
        return MISSING if number is MISSING else Strength(number)
    keys = ((ByColumn, "column"), (NormMatch, "norm_match"), (BySample, "samples"))
    forms: list[type] = [form for form, key in keys if value.get(key) is not None]
    if value.get("dist") is not None:
        forms.append(Normal if value["dist"] == "normal" else Uniform)
    if len(forms) != 1:
        wish = "a number, {column: c}, {samples: [a, b, ...]}, {dist: uniform, ...} or {norm_match: x}"
        reader.tell(path, f"expected {wish}, found {dict(value)!r}")
        return MISSING
    form = reader.read(forms[0], value, path)
    if isinstance(form, Uniform) and form.high <= form.low:
        reader.tell((*path, "high"), f"must be above low = {form.low:g}, found {form.high:g}")
    if isinstance(form, BySample) and not any(form.samples):
        reader.tell((*path, "samples"), f"expected numbers of which one is not 0, found {list(form.samples)}")
    if form is None:
        return MISSING
    return Strength(norm_match=True, value=form.norm_match) if isinstance(form, NormMatch) else Strength(**vars(form))


@dataclass(frozen=True)
class Where:
    """Which positions: (prompt or steps) minus excludes. Only real tokens count; step 0 is the last prompt token."""

    prompt: object = within("none", read=reading.prompt_positions)
    steps: object = within("all", read=reading.step_positions)
    ramp: Ramp | None = None
    exclude_tokens: tuple[int | str, ...] = within((), key="exclude.token_ids", read=reading.tokens)
    exclude_positions: tuple[int, ...] = within((), key="exclude.positions", read=whole_numbers())


@dataclass(frozen=True)
class Schedule:
    """A factor over training: from `start` to `end`, reached at the share `until` of all steps."""

    type: str = within("linear", choices=("linear", "cosine", "constant"))
    start: float = within(1.0, key="from")
    end: float = within(0.0, key="to")
    until: float = within(1.0, low=0.0, high=1.0)
    over: str = within("train_steps", choices=("train_steps",))


@dataclass(frozen=True)
class Gate:
    """Open where an earlier activation points the right way; a closed gate leaves the row (or token) plain."""

    vector: Any = within(None, read=reading.vector, missing="the gate compares activations with it")
    layer: int = within(0, missing="give a whole number")
    type: str = within("cosine", choices=("cosine", "projection", "sigmoid"))
    on: str = within("prompt_mean", choices=("prompt_mean", "prompt_last", "token"))
    open_above: float | None = None
    open_below: float | None = None
    scale: float = 1.0
    """sigmoid: how steep; the strength is multiplied by sig(scale (x.u - open_above))."""


@dataclass(frozen=True)
class Site:
    """One edit at one component, over one or several layers."""

    name: str
    at: At = within(missing="say where: {layers: [8]} or {module: PATH}")
    op: Op = Op()
    vector: Any = within(None, read=reading.vector)
    strength: Strength = within(Strength(), read=read_strength)
    where: Where = Where()
    schedule: Schedule | None = None
    gate: Gate | None = None


@dataclass(frozen=True)
class Correction:
    """How rollouts are weighed whose sampling distribution was not the policy's (training/algorithm/importance.py): in a
    steering of role behaviour or preventative, and as ppo.correction."""

    type: CorrectionType = "token_truncate"
    """`none` says that the bias is accepted: every weight is 1 and the mismatch is only logged."""
    high: float = within(2.0, low=0.0)
    """Upper bound of a weight."""
    low: float = within(0.0, low=0.0)
    """Lower bound of a weight."""


@dataclass(frozen=True)
class KLBudget:
    nats_per_sequence: float = within(low=0.0)
    action: str = within("rescale", choices=("rescale", "warn", "error"))


@dataclass(frozen=True)
class SteeringSpec:
    """All that steers one model."""

    sites: tuple[Site, ...] = within(missing="give a list with at least one site")
    role: str = within("policy", choices=ROLES)
    name: str = ""
    fraction: float = within(1.0, low=0.0, high=1.0)
    correction: Correction | None = None
    kl_budget: KLBudget | None = None
    reference: str = within("unsteered", choices=("unsteered",))
    on_deploy: str = within("keep", choices=("keep", "strip", "fold"))
    folder: str = field(default="", compare=False, metadata={"key": ""})
    """What relative paths in the spec are relative to, when it came from a file; the current folder otherwise."""

    def mapping(self) -> dict[str, object]:
        """The spec as plain data, defaults left out: what `load_spec` reads, and what the hash is taken of."""
        return _mapping(self)


# -- the way back: the plain mapping that a user would have written, defaults left out ---------------------------------


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


def _changed(value: Any, default: object = None) -> dict[str, object]:
    """The fields in which a dataclass differs from its default."""
    found: dict[str, object] = {}
    for spot in dataclasses.fields(value):
        mine = getattr(value, spot.name)
        if default is None or mine != getattr(default, spot.name):
            found[key_of(spot)] = _plain(mine)
    return found


def _strength(strength: Strength) -> object:
    if strength.norm_match:
        return {"norm_match": strength.value}
    if strength.column:
        return {"column": strength.column} | ({"value": strength.value} if strength.value != 1.0 else {})
    if strength.samples:
        return {"samples": list(strength.samples)}
    if strength.dist == "uniform":
        return {"dist": "uniform", "low": strength.low, "high": strength.high, "per": strength.per}
    if strength.dist:
        return {"dist": "normal", "mean": strength.mean, "std": strength.std, "per": strength.per}
    return strength.value


def _where(where: Where, at: At) -> dict[str, object]:
    plain = Where(prompt="all", steps="none") if at.stack == "encoder" else Where()
    found = {name: _plain(getattr(where, name)) for name in ("prompt", "steps") if getattr(where, name) != getattr(plain, name)}
    if where.ramp is not None:
        found["ramp"] = _changed(where.ramp)
    exclude = {"token_ids": _plain(where.exclude_tokens), "positions": _plain(where.exclude_positions)}
    if any(exclude.values()):
        found["exclude"] = {k: v for k, v in exclude.items() if v}
    return found


def _site(site: Site) -> dict[str, object]:
    at = {"module": site.at.module, "io": site.at.io} if site.at.module else _changed(site.at, At())
    found: dict[str, object] = {"name": site.name, "at": at}
    found["op"] = {"type": site.op.type, **_changed(site.op, Op())}
    if site.vector is not None:
        found["vector"] = _plain(site.vector)
    if site.strength != Strength():
        found["strength"] = _strength(site.strength)
    if where := _where(site.where, site.at):
        found["where"] = where
    if site.schedule is not None:
        found["schedule"] = _changed(site.schedule)
    if site.gate is not None:
        found["gate"] = {k: v for k, v in _changed(site.gate).items() if v is not None}
    return found


def _mapping(spec: SteeringSpec) -> dict[str, object]:
    found: dict[str, object] = {"role": spec.role, "sites": [_site(site) for site in spec.sites]}
    plain = SteeringSpec(sites=())
    for name in ("name", "fraction", "reference", "on_deploy"):
        if getattr(spec, name) != getattr(plain, name):
            found[name] = getattr(spec, name)
    if spec.correction is not None:
        found["correction"] = _changed(spec.correction)
    if spec.kl_budget is not None:
        found["kl_budget"] = _changed(spec.kl_budget)
    return found
