"""One intervention of `intervene`: where, what, on which coordinates and positions; found in the model and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steerl.rollout.common.errors import ConfigError
from steerl.rollout.steering.core.places import At
from steerl.rollout.steering.core.structure import Point, locate, stacks
from steerl.rollout.steering.core.table import TABLE, Operation
from steerl.rollout.steering.spec.parse import read_at


@dataclass(frozen=True)
class Intervention:
    """What is done at one place: a function of `operations` by name, or your own `f(base, source)`."""

    at: At | Mapping[str, object]
    op: str | Callable[..., Tensor] = "vanilla"
    parameters: Mapping[str, object] = field(default_factory=dict)
    """The operation's own arguments: rotation, weight, temperature, strength, ..."""
    coordinates: Sequence[int] | None = None
    """Which entries are exchanged when no subspaces are given."""
    partition: Sequence[Sequence[int]] | None = None
    """What a subspace number stands for: [from, to] ranges or lists of entries."""
    source: Tensor | None = None
    """A stored source: used when neither sources nor source_representations give one."""
    group: int | None = None
    """Interventions of one group read one source; by default each is its own."""
    name: str = ""


@dataclass(eq=False)
class Planned:
    """One intervention found in the model."""

    number: int
    spec: Intervention
    point: Point
    coordinates: Any
    source: Tensor | None = None
    """(B or 1, units or 1, D)."""
    units: Tensor | None = None
    """Positions of the pass it is set in, (B, U) real indices; None = every position."""

    @property
    def operation(self) -> Operation | None:
        """Its entry in the table; None for a function of the caller's."""
        return None if callable(self.spec.op) else TABLE[self.spec.op]

    @property
    def collects(self) -> bool:
        return self.operation is not None and self.operation.collects

    @property
    def reads_source(self) -> bool:
        return self.operation is None or self.operation.source != ""

    def apply(self, base: Tensor, source: Tensor | None, coordinates: object) -> Tensor:
        op, operation = self.spec.op, self.operation
        if operation is None or operation.function is None:
            assert callable(op)
            return op(base, source)
        arguments: dict[str, object] = {}
        given = dict(self.spec.parameters)
        for short, parameter in operation.arguments.items():
            for key in (parameter.name, short):
                if key in given:
                    value = given.pop(key)
                    arguments[parameter.name] = value.to(base.device) if isinstance(value, Tensor) else value
        names = [parameter.name for parameter in operation.arguments.values()]
        if given:
            raise ConfigError(
                f"interventions[{self.number}].parameters: {op} takes {', '.join(names) or 'none'}, found {', '.join(given)}"
            )
        if coordinates is not None:
            if "coordinates" not in names:
                raise ConfigError(f"interventions[{self.number}]: op {op} has no subspaces")
            arguments["coordinates"] = coordinates
        try:
            return operation.function(base, source, **arguments)
        except (TypeError, RuntimeError) as error:
            raise ConfigError(
                f"interventions[{self.number}]: {op} failed on an activation of shape {tuple(base.shape)}: {error}"
            ) from error


Interventions = Sequence[Intervention | Mapping[str, object]] | Intervention | Mapping[str, object]


def planned(model: nn.Module, interventions: Interventions, subspaces: object, rows: int) -> list[Planned]:
    listed = [interventions] if isinstance(interventions, Intervention | Mapping) else list(interventions)
    known = stacks(model)
    plans: list[Planned] = []
    for number, raw in enumerate(listed):
        spec = raw if isinstance(raw, Intervention) else _intervention(raw, number)
        if isinstance(spec.op, str) and (spec.op not in TABLE or TABLE[spec.op].function is None):
            raise ConfigError(
                f"interventions[{number}].op: no operation {spec.op!r}; see steering/core/operations.py, or pass a function"
            )
        at = spec.at if isinstance(spec.at, At) else read_at(spec.at, f"interventions[{number}].at")
        points = locate(model, at, known)
        if len(points) != 1:
            raise ConfigError(
                f"interventions[{number}].at.layers: expected one layer, found {len(points)}; write one intervention per layer"
            )
        plans.append(Planned(number, spec, points[0], _coordinates(spec, number, len(listed), subspaces, rows)))
    return plans


def _intervention(raw: Mapping[str, Any], number: int) -> Intervention:
    unknown = set(raw) - set(Intervention.__dataclass_fields__)
    if unknown or "at" not in raw:
        raise ConfigError(f"interventions[{number}]: expected at, op, parameters, ...; found {sorted(map(str, raw))}")
    return Intervention(**raw)


def _coordinates(spec: Intervention, number: int, count: int, subspaces: Any, rows: int) -> object:
    """Entries per row (or for all rows) of one intervention, from numbers of subspaces and their partition."""
    mine = subspaces
    if isinstance(subspaces, Sequence) and subspaces and not isinstance(subspaces[0], int):
        if len(subspaces) != count:
            raise ConfigError(f"subspaces: expected one entry per intervention ({count}), found {len(subspaces)}")
        mine = subspaces[number]
    if mine is None:
        return spec.coordinates
    if isinstance(mine, int):
        mine = [mine]

    def entries(numbers: Sequence[int]) -> list[int]:
        if spec.partition is None:
            return list(numbers)
        chosen: list[int] = []
        for i in numbers:
            part = list(spec.partition[i])
            chosen.extend(range(part[0], part[1]) if len(part) == 2 else part)
        return chosen

    if mine and isinstance(mine[0], int):
        return entries(mine)
    if len(mine) != rows:
        raise ConfigError(f"subspaces[{number}]: expected one list per example ({rows}), found {len(mine)}")
    per_row = [entries(row) for row in mine]
    return per_row[0] if all(row == per_row[0] for row in per_row) else per_row


def unit_table(raw: Any, number: int, count: int, rows: int, lengths: Tensor) -> Tensor | None:
    """(rows, units) real positions of one intervention, from a number, a list, or lists by intervention and example."""
    if raw is None:
        return None
    if isinstance(raw, Tensor):
        raw = raw.tolist()
    if isinstance(raw, int):
        table = [[raw]] * rows
    elif raw and isinstance(raw[0], int):
        table = [list(raw)] * rows
    else:
        if len(raw) != count:
            raise ConfigError(f"unit_locations: expected one list per intervention ({count}), found {len(raw)}")
        listed = raw[number]
        if listed is None:
            return None
        if isinstance(listed, int) or (listed and isinstance(listed[0], int)):
            table = [[listed] if isinstance(listed, int) else list(listed)] * rows
        else:
            table = [list(row) for row in listed]
    if len(table) != rows or len({len(row) for row in table}) != 1:
        raise ConfigError(
            f"unit_locations: intervention {number} needs one list of equal length per example ({rows}), found {table}"
        )
    units = torch.tensor(table, dtype=torch.int64, device=lengths.device)
    units = torch.where(units < 0, units + lengths[:, None], units)
    bad = (units < 0) | (units >= lengths[:, None])
    if bool(bad.any()):
        row = int(bad.any(1).nonzero()[0])
        raise ConfigError(
            f"unit_locations: intervention {number} names position {table[row]} of example {row}, "
            f"which has {int(lengths[row])} real tokens"
        )
    return units


def stack_masks(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Which columns are real, per stack, for a set of model inputs."""
    ids = next((inputs[k] for k in ("input_ids", "inputs", "inputs_embeds") if inputs.get(k) is not None), None)
    if ids is None:
        raise ConfigError(f"expected input_ids or inputs_embeds, found {', '.join(inputs) or 'nothing'}")
    mask = inputs.get("attention_mask")
    real = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device) if mask is None else mask.bool()
    if not getattr(model.config, "is_encoder_decoder", False):
        return {"decoder": real}
    decoder = next((inputs[k] for k in ("decoder_input_ids", "labels") if inputs.get(k) is not None), None)
    width = 1 if decoder is None else decoder.shape[1]
    given = inputs.get("decoder_attention_mask")
    return {"encoder": real, "decoder": real.new_ones((real.shape[0], width)) if given is None else given.bool()}
