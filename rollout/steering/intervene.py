"""One-off interventions on a forward pass or on generate: bases, sources, positions, subspaces, collection.

    intervene(model, interventions, base, sources=..., unit_locations=...)              a forward pass
    intervene_generate(model, interventions, base, ..., steps=..., **generate_kwargs)   the same around model.generate

    source 0 --(positions)--> group 0's sites        parallel: every source is read plain, all sites are set in the base
    source 1 --(positions)--> group 1's sites        serial:   source 0 is set in source 1, source 1 in the base

The arguments carry the names that pyvene's IntervenableModel gives them (docs/steering.md has the table). What differs:
positions count a row's real tokens (negative ones from its end), so padding changes nothing; rows that generate
multiplies keep their own sources; nothing about the model is changed (no gradients switched off, no hooks of others
removed); a learned space acts on each position by itself.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rollout.errors import Problem
from rollout.steering import hooks, operations, positions
from rollout.steering.hooks import Arguments, Frame
from rollout.steering.spec import At, Ramp
from rollout.steering.structure import Point, locate, stacks, unwrap

Locations = Any
_PLAIN = ("vanilla", "set", "add", "subtract", "zero", "scale", "noise", "collect")


@dataclass(frozen=True)
class Intervention:
    """What is done at one place: a function of `operations` by name, or your own `f(base, source)`."""

    at: At | Mapping[str, Any]
    op: str | Callable[..., Tensor] = "vanilla"
    parameters: Mapping[str, Any] = field(default_factory=dict)
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


@dataclass(frozen=True)
class Intervened:
    """What an intervention gives back."""

    intervened_outputs: Any
    original_outputs: Any = None
    collected_activations: list[Tensor] | None = None
    """One tensor per collecting intervention and call, (B, units, D); one call in a forward pass."""


def intervene(
    model: nn.Module,
    interventions: Sequence[Intervention | Mapping[str, Any]] | Intervention | Mapping[str, Any],
    base: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any] | None] | Mapping[str, Any] | None = None,
    unit_locations: Mapping[str, Locations] | None = None,
    source_representations: Any = None,
    subspaces: Any = None,
    labels: Tensor | None = None,
    output_original_output: bool = False,
    return_dict: bool = True,
    use_cache: bool | None = None,
    mode: str = "parallel",
    strength: float | Tensor = 1.0,
) -> Intervened | tuple[Any, Any]:
    """One forward pass of `base` with the interventions in it."""
    job = _Job(model, interventions, base, unit_locations, subspaces, mode, strength, "none", None)
    original = None
    if output_original_output:
        with hooks.unsteered():
            original = model(**base)
    extra: dict[str, Any] = {} if labels is None else {"labels": labels}
    if use_cache is not None:
        extra["use_cache"] = use_cache
    with job.ready(sources, source_representations):
        output = model(**base, **extra)
    return job.result(output, original, return_dict)


def intervene_generate(
    model: nn.Module,
    interventions: Sequence[Intervention | Mapping[str, Any]] | Intervention | Mapping[str, Any],
    base: Mapping[str, Any],
    sources: Sequence[Mapping[str, Any] | None] | Mapping[str, Any] | None = None,
    unit_locations: Mapping[str, Locations] | None = None,
    source_representations: Any = None,
    subspaces: Any = None,
    intervene_on_prompt: bool = False,
    output_original_output: bool = False,
    return_dict: bool = True,
    mode: str = "parallel",
    strength: float | Tensor = 1.0,
    steps: Any = None,
    ramp: Ramp | None = None,
    **generate_kwargs: Any,
) -> Intervened | tuple[Any, Any]:
    """model.generate with the interventions in the prompt, in response steps, or in both.

    `intervene_on_prompt` acts at unit_locations of the prompt (everywhere in it without them). `steps` acts on response
    steps, as a spec's where.steps does: all (the first sampled token too), generated_positions, {window: [a, b]},
    {every: k} or a list. Left out, it is none with intervene_on_prompt and generated_positions without it.
    """
    if steps is None:
        steps = "none" if intervene_on_prompt or unit_locations is not None else "generated_positions"
    if isinstance(steps, Mapping) and "window" in steps:
        steps = {"window": tuple(steps["window"])}
    prompt = intervene_on_prompt or unit_locations is not None
    job = _Job(model, interventions, base, unit_locations, subspaces, mode, strength, steps, ramp, prompt=prompt)
    inner = unwrap(model)
    original = None
    if output_original_output:
        with hooks.unsteered():
            original = inner.generate(**base, **generate_kwargs)  # type: ignore[operator]
    with job.ready(sources, source_representations):
        output = inner.generate(**base, **generate_kwargs)  # type: ignore[operator]
    return job.result(output, original, return_dict)


# -- one site ------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Planned:
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
    def collects(self) -> bool:
        return self.spec.op == "collect"

    def apply(self, base: Tensor, source: Tensor | None, coordinates: Any) -> Tensor:
        op = self.spec.op
        if callable(op):
            return op(base, source)
        function = getattr(operations, "set_" if op == "set" else op)
        arguments: dict[str, Any] = {}
        given = dict(self.spec.parameters)
        for name in list(inspect.signature(function).parameters)[2:]:
            short = name.rsplit("_", 1)[0] if name.rsplit("_", 1)[-1].isupper() else name
            for key in (name, short):
                if key in given:
                    value = given.pop(key)
                    arguments[name] = value.to(base.device) if isinstance(value, Tensor) else value
        if given:
            known = ", ".join(list(inspect.signature(function).parameters)[2:])
            raise Problem(f"interventions[{self.number}].parameters: {op} takes {known or 'none'}, found {', '.join(given)}")
        if coordinates is not None:
            if "coordinates" not in inspect.signature(function).parameters:
                raise Problem(f"interventions[{self.number}]: op {op} has no subspaces")
            arguments["coordinates"] = coordinates
        try:
            return function(base, source, **arguments)
        except (TypeError, RuntimeError) as error:
            raise Problem(f"interventions[{self.number}]: {op} failed on an activation of shape {tuple(base.shape)}: {error}") from error


def _planned(model: nn.Module, interventions: Any, subspaces: Any, rows: int) -> list[_Planned]:
    listed = [interventions] if isinstance(interventions, Intervention | Mapping) else list(interventions)
    found_stacks = stacks(model)
    planned: list[_Planned] = []
    for number, raw in enumerate(listed):
        spec = raw if isinstance(raw, Intervention) else _intervention(raw, number)
        if isinstance(spec.op, str) and not hasattr(operations, "set_" if spec.op == "set" else spec.op):
            raise Problem(f"interventions[{number}].op: no operation {spec.op!r}; see rollout/steering/operations.py, or pass a function")
        at = spec.at if isinstance(spec.at, At) else _at(spec.at, number)
        points = locate(model, at, found_stacks)
        if len(points) != 1:
            raise Problem(f"interventions[{number}].at.layers: expected one layer, found {len(points)}; write one intervention per layer")
        planned.append(_Planned(number, spec, points[0], _coordinates(spec, number, len(listed), subspaces, rows)))
    return planned


def _intervention(raw: Mapping[str, Any], number: int) -> Intervention:
    unknown = set(raw) - {f for f in Intervention.__dataclass_fields__}
    if unknown or "at" not in raw:
        raise Problem(f"interventions[{number}]: expected at, op, parameters, ...; found {sorted(map(str, raw))}")
    return Intervention(**raw)


def _at(raw: Mapping[str, Any], number: int) -> At:
    from rollout.steering.spec import _at as read_at
    from rollout.steering.reading import Fields

    problems: list[str] = []
    at = read_at(Fields(raw, f"interventions[{number}].at", problems))
    if problems:
        raise Problem(*problems)
    return at


def _coordinates(spec: Intervention, number: int, count: int, subspaces: Any, rows: int) -> Any:
    """Entries per row (or for all rows) of one intervention, from numbers of subspaces and their partition."""
    mine = subspaces
    if isinstance(subspaces, Sequence) and subspaces and not isinstance(subspaces[0], int):
        if len(subspaces) != count:
            raise Problem(f"subspaces: expected one entry per intervention ({count}), found {len(subspaces)}")
        mine = subspaces[number]
    if mine is None:
        return spec.coordinates
    if isinstance(mine, int):
        mine = [mine]

    def entries(numbers: Sequence[int]) -> list[int]:
        if spec.partition is None:
            return list(numbers)
        found: list[int] = []
        for i in numbers:
            part = list(spec.partition[i])
            found.extend(range(part[0], part[1]) if len(part) == 2 else part)
        return found

    if mine and isinstance(mine[0], int):
        return entries(mine)
    if len(mine) != rows:
        raise Problem(f"subspaces[{number}]: expected one list per example ({rows}), found {len(mine)}")
    per_row = [entries(row) for row in mine]
    return per_row[0] if all(row == per_row[0] for row in per_row) else per_row


# -- positions ------------------------------------------------------------------------------------------------------------


def _unit_table(raw: Any, number: int, count: int, rows: int, lengths: Tensor) -> Tensor | None:
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
            raise Problem(f"unit_locations: expected one list per intervention ({count}), found {len(raw)}")
        mine = raw[number]
        if mine is None:
            return None
        if isinstance(mine, int) or (mine and isinstance(mine[0], int)):
            table = [[mine] if isinstance(mine, int) else list(mine)] * rows
        else:
            table = [list(row) for row in mine]
    if len(table) != rows or len({len(row) for row in table}) != 1:
        raise Problem(f"unit_locations: intervention {number} needs one list of equal length per example ({rows}), found {table}")
    units = torch.tensor(table, dtype=torch.int64, device=lengths.device)
    units = torch.where(units < 0, units + lengths[:, None], units)
    bad = (units < 0) | (units >= lengths[:, None])
    if bool(bad.any()):
        row = int(bad.any(1).nonzero()[0])
        raise Problem(
            f"unit_locations: intervention {number} names position {table[row]} of example {row}, which has {int(lengths[row])} real tokens"
        )
    return units


def _masks(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Which columns are real, per stack, for a set of model inputs."""
    ids = next((inputs[k] for k in ("input_ids", "inputs", "inputs_embeds") if inputs.get(k) is not None), None)
    if ids is None:
        raise Problem(f"expected input_ids or inputs_embeds, found {', '.join(inputs) or 'nothing'}")
    mask = inputs.get("attention_mask")
    real = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device) if mask is None else mask.bool()
    if not getattr(model.config, "is_encoder_decoder", False):
        return {"decoder": real}
    decoder = next((inputs[k] for k in ("decoder_input_ids", "labels") if inputs.get(k) is not None), None)
    width = 1 if decoder is None else decoder.shape[1]
    given = inputs.get("decoder_attention_mask")
    return {"encoder": real, "decoder": real.new_ones((real.shape[0], width)) if given is None else given.bool()}


# -- a pass in which things are read or set -----------------------------------------------------------------------------------


class _Pass:
    """Reader of one model run: knows each call's columns; hands edits the positions."""

    def __init__(self, masks: dict[str, Tensor]):
        self.masks = masks
        self.ran = 0

    def opened(self, frame: Frame, stack: str, arguments: Arguments) -> None:
        rows, width = arguments.shape()
        first = 0 if stack == "encoder" else arguments.seen(width)
        mask = self.masks[stack]
        if rows % mask.shape[0]:
            raise Problem(f"the model was called with {rows} rows, and the base has {mask.shape[0]}")
        times = rows // mask.shape[0]
        index = positions.real_index(mask, first, width)
        call = (first, width, mask.shape[1], mask.sum(1), index, times)
        frame.calls[self, stack] = frame.calls[self, ""] = call

    def closed(self, frame: Frame, stack: str) -> None:
        self.ran += 1


class _Job:
    """One call of intervene: what is read where, and set where."""

    def __init__(
        self, model: nn.Module, interventions: Any, base: Mapping[str, Any], unit_locations: Mapping[str, Locations] | None,
        subspaces: Any, mode: str, strength: float | Tensor, steps: Any, ramp: Ramp | None, prompt: bool = True,
    ):  # fmt: skip
        if mode not in ("parallel", "serial"):
            raise Problem(f"mode: expected parallel or serial, found {mode!r}")
        self.model, self.base, self.mode, self.strength, self.steps, self.ramp = model, base, mode, strength, steps, ramp
        self.inner = unwrap(model)
        self.masks = _masks(self.inner, base)
        self.rows = next(iter(self.masks.values())).shape[0]
        self.plans = _planned(self.inner, interventions, subspaces, self.rows)
        self.locations, self.prompt = unit_locations, prompt
        self.collected: dict[int, list[Tensor]] = {}
        groups = [plan.number if plan.spec.group is None else plan.spec.group for plan in self.plans]
        if len({plan.spec.group is None for plan in self.plans}) > 1:
            raise Problem("interventions: give every one a group, or none")
        self.groups = [[p for p, g in zip(self.plans, groups, strict=True) if g == group] for group in sorted(set(groups))]
        for plan in self.plans:
            hooks.install(plan.point.module, plan.point.io)
        for stack in stacks(self.inner).values():
            hooks.install_stack(stack.module)

    def _where(self, key: str) -> tuple[Any, Any]:
        """(source positions, positions they go to) of one arrow."""
        if self.locations is None:
            return None, None
        known = {"base", "sources->base"} if self.mode == "parallel" else {
            *(f"source_{i}->source_{i + 1}" for i in range(len(self.groups) - 1)), f"source_{len(self.groups) - 1}->base", "base",
        }  # fmt: skip
        unknown = set(self.locations) - known
        if unknown:
            raise Problem(f"unit_locations: unknown key {sorted(unknown)[0]!r} in {self.mode} mode; expected {', '.join(sorted(known))}")
        if key in self.locations:
            value = self.locations[key]
            if isinstance(value, int):
                return value, value
            if isinstance(value, Sequence) and len(value) == 2:
                return value[0], value[1]
            raise Problem(f"unit_locations[{key!r}]: expected (source positions, base positions), found {value!r}")
        return (None, self.locations["base"]) if "base" in self.locations else (None, None)

    @contextlib.contextmanager
    def ready(self, sources: Any, representations: Any) -> Iterator[None]:
        """Sources read; inside, the base's passes have everything set."""
        given = [sources] if isinstance(sources, Mapping) else list(sources or [])
        if len(given) == 1 and len(self.groups) > 1:
            given = given * len(self.groups)
        if given and len(given) != len(self.groups):
            raise Problem(f"sources: expected one per intervention or group ({len(self.groups)}), found {len(given)}")
        self._take(representations)
        if given and self.mode == "serial":
            self._serial(given)
        else:
            for number, group in enumerate(self.groups):
                if given and given[number] is not None:
                    self._read(group, given[number], "sources->base", [])
            for plan in self.plans:
                self._place(plan, "sources->base" if self.mode == "parallel" else f"source_{len(self.groups) - 1}->base", self.masks)
        ready = [p for p in self.plans if self._is_ready(p)] if not (given and self.mode == "serial") else self._last
        watch = _Pass(self.masks)
        with hooks.entered(self._frame(watch, ready, self.masks)):
            yield
        if ready and not watch.ran:
            raise Problem("the intervention did not run: no forward pass of the model was seen")

    def _is_ready(self, plan: _Planned) -> bool:
        sourceless = callable(plan.spec.op) or plan.spec.op in ("zero", "scale", "collect", "loreft", "noreft", "consreft", "lobireft",
                                                                "direft", "nodireft", "adapter")  # fmt: skip
        if plan.source is None and not sourceless:
            raise Problem(f"interventions[{plan.number}]: op {plan.spec.op} needs a source; give sources or source_representations")
        return True

    def _take(self, representations: Any) -> None:
        for plan in self.plans:
            found = representations
            if isinstance(representations, Mapping):
                found = representations.get(plan.spec.name or plan.number, representations.get(plan.number))
            elif isinstance(representations, Sequence):
                if len(representations) != len(self.plans):
                    raise Problem(f"source_representations: expected {len(self.plans)}, found {len(representations)}")
                found = representations[plan.number]
            found = plan.spec.source if found is None else found
            if found is not None:
                plan.source = self._shaped(found, plan.number)

    def _shaped(self, source: Tensor, number: int) -> Tensor:
        if source.dim() == 1:
            return source[None, None]
        if source.dim() == 2 and source.shape[0] in (1, self.rows):
            return source[:, None]
        if source.dim() == 3 and source.shape[0] in (1, self.rows):
            return source
        raise Problem(
            f"source_representations[{number}]: expected (D,), ({self.rows}, D) or ({self.rows}, units, D), found {tuple(source.shape)}"
        )

    def _place(self, plan: _Planned, key: str, masks: dict[str, Tensor]) -> None:
        mask = masks[plan.point.stack or "decoder"]
        plan.units = _unit_table(self._where(key)[1], *self._entry(plan), mask.shape[0], mask.sum(1))

    def _entry(self, plan: _Planned) -> tuple[int, int]:
        """Which entry of a list of locations is this intervention's, and how many there are: an arrow lists its own group."""
        if self.mode == "parallel":
            return plan.number, len(self.plans)
        group = next(group for group in self.groups if plan in group)
        return group.index(plan), len(group)

    def _read(self, group: list[_Planned], source: Mapping[str, Any], key: str, already: list[_Planned]) -> None:
        """Run a source and keep what the group's sites see there (after the sites `already` set in it)."""
        masks = _masks(self.inner, source)
        watch = _Pass(masks)
        frame = self._frame(watch, already, masks)
        read: dict[int, Tensor] = {}
        for plan in group:
            if plan.spec.op in ("collect", "zero", "scale"):
                continue
            mask = masks[plan.point.stack or "decoder"]
            units = _unit_table(self._where(key)[0], *self._entry(plan), mask.shape[0], mask.sum(1))
            frame.add(plan.point.module, plan.point.io, _Read(watch, plan, units, read))
        with hooks.entered(frame):
            self.model(**source)
        for plan in group:
            if plan.number in read:
                plan.source = read[plan.number]

    def _serial(self, given: list[Any]) -> None:
        already: list[_Planned] = []
        for number, group in enumerate(self.groups):
            last = number == len(self.groups) - 1
            key = f"source_{number}->base" if last else f"source_{number}->source_{number + 1}"
            if given[number] is None:
                continue
            self._read(group, given[number], key, already)
            nexts = None if last else given[number + 1]
            masks = self.masks if nexts is None else _masks(self.inner, nexts)
            for plan in group:
                self._place(plan, key, masks)
            already = group
        self._last = already

    def _frame(self, watch: _Pass, plans: list[_Planned], masks: dict[str, Tensor]) -> Frame:
        frame = Frame(hooks.current() if masks is self.masks else None)
        for stack in stacks(self.inner).values():
            frame.read(stack.module, watch, stack.name)
        for plan in plans:
            frame.add(plan.point.module, plan.point.io, _Set(self, watch, plan, masks is self.masks))
        return frame

    def result(self, output: Any, original: Any, return_dict: bool) -> Intervened | tuple[Any, Any]:
        collects = [plan for plan in self.plans if plan.collects]
        collected = [t for plan in collects for t in self.collected.get(plan.number, [])] if collects else None
        if return_dict:
            return Intervened(output, original, collected)
        return ((original, collected), output) if collects else (original, output)


def _columns(units: Tensor, index_BT: Tensor, real_BT: Tensor) -> Tensor:
    """Column of each (row, unit) in this call, -1 where it is not in it."""
    match = (index_BT[:, None, :] == units[:, :, None]) & real_BT[:, None, :]
    return torch.where(match.any(-1), match.int().argmax(-1), torch.full_like(units, -1))


def _as_batch(hidden: Tensor, width: int, columns: tuple[int, ...] | None) -> Tensor:
    if hidden.dim() == 2:
        hidden = hidden.reshape(-1, width, hidden.shape[-1])
    return hidden if columns is None else hidden[..., list(columns)]


class _Read:
    """Keeps a source's activation at its positions, (B, units, D)."""

    def __init__(self, watch: _Pass, plan: _Planned, units: Tensor | None, into: dict[int, Tensor]):
        self.watch, self.plan, self.units, self.into = watch, plan, units, into

    def __call__(self, frame: Frame, hidden: Tensor) -> Tensor:
        _, width, _, _, (index_BT, real_BT), _ = frame.calls[self.watch, self.plan.point.stack]
        part = _as_batch(hidden, width, self.plan.point.columns)
        if self.units is not None:
            columns = _columns(self.units, index_BT, real_BT)
            part = part.gather(1, columns[:, :, None].expand(-1, -1, part.shape[-1]))
        self.into[self.plan.number] = part
        return hidden


class _Set:
    """Edits the pass at its positions: prompt units, and response steps in generate."""

    def __init__(self, job: _Job, watch: _Pass, plan: _Planned, base: bool):
        self.job, self.watch, self.plan, self.is_base = job, watch, plan, base

    def _spread(self, call: Any, like: Tensor) -> tuple[Tensor | None, Tensor]:
        """(source at every column, which columns are edited) for this call."""
        first, width, prompt, lengths, (index_BT, real_BT), times = call
        plan, source = self.plan, self.plan.source
        device = like.device
        units = plan.units
        inside = real_BT & (index_BT < lengths[:, None])
        if not self.job.prompt and self.is_base:
            mask_BT = torch.zeros_like(inside)
        elif units is None:
            mask_BT = inside
        else:
            mask_BT = inside & (index_BT[:, :, None] == units[:, None, :]).any(-1)
        if self.is_base and self.job.steps not in ("none",):
            step_BT = index_BT - (lengths[:, None] - 1)
            mask_BT = mask_BT | (real_BT & positions.select_steps(self.job.steps, step_BT))
        if source is None:
            return None, mask_BT
        source = source.to(device)
        if source.shape[1] == 1:
            return source, mask_BT
        if units is None:
            if source.shape[1] != width:
                raise Problem(
                    f"interventions[{plan.number}]: the source has {source.shape[1]} positions and this pass {width}; give unit_locations"
                )
            return source, mask_BT
        if source.shape[1] != units.shape[1]:
            raise Problem(f"interventions[{plan.number}]: {source.shape[1]} source positions for {units.shape[1]} base positions")
        at = (index_BT[:, :, None] == units[:, None, :]).int().argmax(-1)
        spread = source.expand(units.shape[0], -1, -1).gather(1, at[:, :, None].expand(-1, -1, source.shape[-1]).to(device))
        return spread, mask_BT

    def __call__(self, frame: Frame, hidden: Tensor) -> Tensor:
        call = frame.calls[self.watch, self.plan.point.stack]
        times, width = call[5], call[1]
        whole = _as_batch(hidden, width, None)
        part = whole if self.plan.point.columns is None else whole[..., list(self.plan.point.columns)]
        source, mask_BT = self._spread(call, hidden)
        if times > 1:
            source = None if source is None else source.expand(call[3].shape[0], -1, -1).repeat_interleave(times, 0)
            mask_BT = mask_BT.repeat_interleave(times, 0)
        mask = mask_BT[..., None].to(hidden.device)
        coordinates = self.plan.coordinates
        if times > 1 and coordinates and isinstance(coordinates[0], list):
            coordinates = [row for row in coordinates for _ in range(times)]
        if self.plan.collects:
            self._collect(part, mask_BT, coordinates)
            return hidden
        edited = self.plan.apply(part, source, coordinates)
        strength = self._strength(call, part)
        if strength is not None:
            edited = torch.where(strength == 1, edited, (part + strength * (edited - part)).to(part.dtype))
            mask = mask & (strength != 0)
        edited = torch.where(mask, edited, part)
        if self.plan.point.columns is not None:
            edited = whole.index_copy(-1, torch.tensor(self.plan.point.columns, device=whole.device), edited)
        return edited.reshape(hidden.shape)

    def _strength(self, call: Any, part: Tensor) -> Tensor | None:
        strength, ramp = self.job.strength, self.job.ramp
        if not self.is_base or (isinstance(strength, int | float) and strength == 1 and ramp is None):
            return None
        table = torch.as_tensor(strength, dtype=torch.float32, device=part.device).reshape(-1)
        if table.shape[0] not in (1, call[3].shape[0]):
            raise Problem(f"strength: expected one number or one per example ({call[3].shape[0]}), found {table.shape[0]}")
        rows = table.expand(call[3].shape[0])[:, None]
        if ramp is not None:
            step_BT = call[4][0] - (call[3][:, None] - 1)
            rows = rows * positions.ramp_factors(ramp, step_BT).to(part.device)
        return rows.repeat_interleave(call[5], 0)[..., None]

    def _collect(self, part: Tensor, mask_BT: Tensor, coordinates: Any) -> None:
        counts = mask_BT.sum(1)
        if not bool(counts.any()):
            return
        values = operations.collect(part, None, coordinates)
        if bool((counts == counts[0]).all()):
            taken = values[mask_BT.to(values.device)].reshape(part.shape[0], int(counts[0]), -1)
            if self.plan.units is not None and self.plan.units.shape[1] == taken.shape[1] and taken.shape[0] == self.plan.units.shape[0]:
                order = self.plan.units.argsort(1).argsort(1).to(taken.device)  # in the order in which they were asked for
                taken = taken.gather(1, order[:, :, None].expand_as(taken))
        else:
            widest = int(counts.max())
            taken = values.new_zeros(part.shape[0], widest, values.shape[-1])
            for row in range(part.shape[0]):
                taken[row, : int(counts[row])] = values[row][mask_BT[row].to(values.device)]
        self.job.collected.setdefault(self.plan.number, []).append(taken)
