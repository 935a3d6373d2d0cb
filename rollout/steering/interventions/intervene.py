"""One-off interventions on a forward pass or on generate: bases, sources, positions, subspaces, collection.

    intervene(model, interventions, base, sources=..., unit_locations=...)              a forward pass
    intervene_generate(model, interventions, base, ..., steps=..., **generate_kwargs)   the same around model.generate

    source 0 --(positions)--> group 0's sites        parallel: every source is read plain, all sites are set in the base
    source 1 --(positions)--> group 1's sites        serial:   source 0 is set in source 1, source 1 in the base

The arguments carry the names that pyvene's IntervenableModel gives them (docs/steering/pyvene.md has the table). What differs:
positions count a row's real tokens (negative ones from its end), so padding changes nothing; rows that generate
multiplies keep their own sources; nothing about the model is changed (no gradients switched off, no hooks of others
removed); a learned space acts on each position by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from steerl.rollout.common.errors import UserError
from steerl.rollout.model import hooks
from steerl.rollout.model.hooks import Frame
from steerl.rollout.steering.core.places import Ramp
from steerl.rollout.steering.core.structure import stacks, unwrap
from steerl.rollout.steering.interventions.passes import InterventionPass, Read, Rules, Set
from steerl.rollout.steering.interventions.plan import Intervention as Intervention
from steerl.rollout.steering.interventions.plan import Interventions, Planned, planned, stack_masks, unit_table

Locations = object


@dataclass(frozen=True)
class Intervened:
    """What an intervention gives back."""

    intervened_outputs: Any
    original_outputs: Any = None
    collected_activations: list[Tensor] | None = None
    """One tensor per collecting intervention and call, (B, units, D); one call in a forward pass."""


def intervene(
    model: nn.Module,
    interventions: Interventions,
    base: Mapping[str, object],
    sources: Sequence[Mapping[str, object] | None] | Mapping[str, object] | None = None,
    unit_locations: Mapping[str, Locations] | None = None,
    source_representations: object = None,
    subspaces: object = None,
    labels: Tensor | None = None,
    output_original_output: bool = False,
    return_dict: bool = True,
    use_cache: bool | None = None,
    mode: str = "parallel",
    strength: float | Tensor = 1.0,
) -> Intervened | tuple[Any, Any]:
    """One forward pass of `base` with the interventions in it."""
    run = InterventionRun(model, interventions, base, unit_locations, subspaces, mode, Rules(strength=strength))
    original = None
    if output_original_output:
        with hooks.unsteered():
            original = model(**base)
    extra: dict[str, object] = {} if labels is None else {"labels": labels}
    if use_cache is not None:
        extra["use_cache"] = use_cache
    with run.ready(sources, source_representations):
        output = model(**base, **extra)
    return run.result(output, original, return_dict)


def intervene_generate(
    model: nn.Module,
    interventions: Interventions,
    base: Mapping[str, object],
    sources: Sequence[Mapping[str, object] | None] | Mapping[str, object] | None = None,
    unit_locations: Mapping[str, Locations] | None = None,
    source_representations: object = None,
    subspaces: object = None,
    intervene_on_prompt: bool = False,
    output_original_output: bool = False,
    return_dict: bool = True,
    mode: str = "parallel",
    strength: float | Tensor = 1.0,
    steps: object = None,
    ramp: Ramp | None = None,
    **generate_kwargs: object,
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
    run = InterventionRun(model, interventions, base, unit_locations, subspaces, mode, Rules(prompt, steps, strength, ramp))
    inner = unwrap(model)
    original = None
    if output_original_output:
        with hooks.unsteered():
            original = inner.generate(**base, **generate_kwargs)  # type: ignore[operator]
    with run.ready(sources, source_representations):
        output = inner.generate(**base, **generate_kwargs)  # type: ignore[operator]
    return run.result(output, original, return_dict)


class InterventionRun:
    """One call of intervene: what is read where, and set where."""

    def __init__(
        self, model: nn.Module, interventions: Interventions, base: Mapping[str, object],
        unit_locations: Mapping[str, Locations] | None, subspaces: object, mode: str, rules: Rules,
    ):  # fmt: skip
        if mode not in ("parallel", "serial"):
            raise UserError(f"mode: expected parallel or serial, found {mode!r}")
        self.model, self.mode, self.rules = model, mode, rules
        self.inner = unwrap(model)
        self.masks = stack_masks(self.inner, base)
        self.rows = next(iter(self.masks.values())).shape[0]
        self.plans = planned(self.inner, interventions, subspaces, self.rows)
        self.locations = unit_locations
        self.collected: dict[int, list[Tensor]] = {}
        groups = [plan.number if plan.spec.group is None else plan.spec.group for plan in self.plans]
        if len({plan.spec.group is None for plan in self.plans}) > 1:
            raise UserError("interventions: give every one a group, or none")
        self.groups = [[p for p, g in zip(self.plans, groups, strict=True) if g == group] for group in sorted(set(groups))]
        for plan in self.plans:
            hooks.install(plan.point.module, plan.point.io)
        for stack in stacks(self.inner).values():
            hooks.install_stack(stack.module)

    def _where(self, key: str) -> tuple[object, object]:
        """(source positions, positions they go to) of one arrow."""
        if self.locations is None:
            return None, None
        known = {"base", "sources->base"}
        if self.mode == "serial":
            last = len(self.groups) - 1
            known = {*(f"source_{i}->source_{i + 1}" for i in range(last)), f"source_{last}->base", "base"}
        unknown = set(self.locations) - known
        if unknown:
            raise UserError(
                f"unit_locations: unknown key {sorted(unknown)[0]!r} in {self.mode} mode; expected {', '.join(sorted(known))}"
            )
        if key in self.locations:
            value = self.locations[key]
            if isinstance(value, int):
                return value, value
            if isinstance(value, Sequence) and len(value) == 2:
                return value[0], value[1]
            raise UserError(f"unit_locations[{key!r}]: expected (source positions, base positions), found {value!r}")
        return (None, self.locations["base"]) if "base" in self.locations else (None, None)

    @contextlib.contextmanager
    def ready(self, sources: Any, representations: object) -> Iterator[None]:
        """Sources read; inside, the base's passes have everything set."""
        given = [sources] if isinstance(sources, Mapping) else list(sources or [])
        if len(given) == 1 and len(self.groups) > 1:
            given = given * len(self.groups)
        if given and len(given) != len(self.groups):
            raise UserError(f"sources: expected one per intervention or group ({len(self.groups)}), found {len(given)}")
        self._take(representations)
        if given and self.mode == "serial":
            self._serial(given)
        else:
            for number, group in enumerate(self.groups):
                if given and given[number] is not None:
                    self._read(group, given[number], "sources->base", [])
            for plan in self.plans:
                self._place(
                    plan, "sources->base" if self.mode == "parallel" else f"source_{len(self.groups) - 1}->base", self.masks
                )
        ready = [p for p in self.plans if self._is_ready(p)] if not (given and self.mode == "serial") else self._last
        watch = InterventionPass(self.masks)
        with hooks.entered(self._frame(watch, ready, self.masks)):
            yield
        if ready and not watch.ran:
            raise UserError("the intervention did not run: no forward pass of the model was seen")

    def _is_ready(self, plan: Planned) -> bool:
        if plan.source is None and plan.operation is not None and plan.reads_source:
            raise UserError(
                f"interventions[{plan.number}]: op {plan.spec.op} needs a source; give sources or source_representations"
            )
        return True

    def _take(self, representations: Any) -> None:
        for plan in self.plans:
            found = representations
            if isinstance(representations, Mapping):
                found = representations.get(plan.spec.name or plan.number, representations.get(plan.number))
            elif isinstance(representations, Sequence):
                if len(representations) != len(self.plans):
                    raise UserError(f"source_representations: expected {len(self.plans)}, found {len(representations)}")
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
        raise UserError(
            f"source_representations[{number}]: expected (D,), ({self.rows}, D) or ({self.rows}, units, D), "
            f"found {tuple(source.shape)}"
        )

    def _place(self, plan: Planned, key: str, masks: dict[str, Tensor]) -> None:
        mask = masks[plan.point.stack or "decoder"]
        plan.units = unit_table(self._where(key)[1], *self._entry(plan), mask.shape[0], mask.sum(1))

    def _entry(self, plan: Planned) -> tuple[int, int]:
        """Which entry of a list of locations is this intervention's, and how many there are: an arrow lists its own group."""
        if self.mode == "parallel":
            return plan.number, len(self.plans)
        group = next(group for group in self.groups if plan in group)
        return group.index(plan), len(group)

    def _read(self, group: list[Planned], source: Mapping[str, Any], key: str, already: list[Planned]) -> None:
        """Run a source and keep what the group's sites see there (after the sites `already` set in it)."""
        masks = stack_masks(self.inner, source)
        watch = InterventionPass(masks)
        frame = self._frame(watch, already, masks)
        read: dict[int, Tensor] = {}
        for plan in group:
            if not plan.reads_source:
                continue
            mask = masks[plan.point.stack or "decoder"]
            units = unit_table(self._where(key)[0], *self._entry(plan), mask.shape[0], mask.sum(1))
            frame.add(plan.point.module, plan.point.io, Read(watch, plan, units, read))
        with hooks.entered(frame):
            self.model(**source)
        for plan in group:
            if plan.number in read:
                plan.source = read[plan.number]

    def _serial(self, given: list[Any]) -> None:
        already: list[Planned] = []
        for number, group in enumerate(self.groups):
            last = number == len(self.groups) - 1
            key = f"source_{number}->base" if last else f"source_{number}->source_{number + 1}"
            if given[number] is None:
                continue
            self._read(group, given[number], key, already)
            nexts = None if last else given[number + 1]
            masks = self.masks if nexts is None else stack_masks(self.inner, nexts)
            for plan in group:
                self._place(plan, key, masks)
            already = group
        self._last = already

    def _frame(self, watch: InterventionPass, plans: list[Planned], masks: dict[str, Tensor]) -> Frame:
        frame = Frame(hooks.current() if masks is self.masks else None)
        for stack in stacks(self.inner).values():
            frame.read(stack.module, watch, stack.name)
        for plan in plans:
            frame.add(
                plan.point.module,
                plan.point.io,
                Set(watch, plan, self.rules if masks is self.masks else Rules(), self.collected),
            )
        return frame

    def result(self, output: Any, original: object, return_dict: bool) -> Intervened | tuple[Any, Any]:
        collects = [plan for plan in self.plans if plan.collects]
        collected = [t for plan in collects for t in self.collected.get(plan.number, [])] if collects else None
        if return_dict:
            return Intervened(output, original, collected)
        return ((original, collected), output) if collects else (original, output)
