"""A site tied to a model (by bind.py): its points and tensors, and its operation ready to be applied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from steerl.rollout.applied import Applied
from steerl.rollout.common.errors import ConfigError, said
from steerl.rollout.steering.core import operations
from steerl.rollout.steering.core.structure import Point
from steerl.rollout.steering.core.table import ACTIVATIONS, TABLE
from steerl.rollout.steering.gates import BoundGate
from steerl.rollout.steering.parameters import Parameters
from steerl.rollout.steering.spec.spec import Site
from steerl.rollout.steering.strengths import keyed_normals


@dataclass(eq=False)
class BoundSite:
    """One site of the spec on one model. `at` is the index of a point (a layer) of this site."""

    spec: Site
    index: int
    points: list[Point]
    held: list[dict[str, Tensor]]
    """Per point, the tensors that it was made with: `vector` and the operation's own."""
    trained: Parameters | None
    """Those that are trained, in their place."""
    function: Callable[..., Tensor]
    excluded_ids: Tensor | None = None
    gate: BoundGate | None = None

    def __post_init__(self) -> None:
        op = self.spec.op
        self.operation = TABLE[op.type]
        self.tensor_names = tuple(self.operation.tensors)
        self.settings: dict[str, Any] = {n: getattr(op, n) for n in self.operation.settings if n in self.operation.arguments}
        if "act" in self.settings:
            self.settings["act"] = ACTIVATIONS.get(op.act, self.operation.arguments["act"].default)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def positions_column(self) -> str | None:
        """The data column that says at which prompt positions the site acts, where one does."""
        rule = self.spec.where.prompt
        return rule.get("column") if isinstance(rule, dict) else None

    @cached_property
    def plain_add(self) -> bool:
        """One addition of a fixed vector: it can be scaled before, and kept from step to step."""
        varies = self.spec.strength.norm_match or self.spec.op.coordinates is not None or self.trained is not None
        return bool(self.operation.adds) and not varies

    @cached_property
    def same_for_all_rows(self) -> bool:
        """In a response column, every row is selected alike (strengths may differ)."""
        where = self.spec.where
        token_gate = self.gate is not None and self.gate.spec.on == "token"
        return not (where.exclude_tokens or where.exclude_positions or token_gate or isinstance(where.prompt, tuple))

    @cached_property
    def steady(self) -> bool:
        """Every response column is edited alike."""
        return self.same_for_all_rows and self.spec.where.steps == "all" and self.spec.where.ramp is None

    def tensors(self, at: int, device: torch.device) -> dict[str, Tensor]:
        """The site's tensors at a point as they are now, float32 on the activation's device."""
        if self.trained is not None:
            return {name: tensor.to(device) for name, tensor in self.trained.layers[at].tensors().items()}  # type: ignore[operator]
        held = self.held[at]
        if held and next(iter(held.values())).device != device:
            held = self.held[at] = {name: tensor.to(device) for name, tensor in held.items()}
        return held

    def noise(self, at: int, applied: Applied, row_B: Tensor, sample_B: Tensor, index_BT: Tensor, width: int) -> Tensor:
        """What is drawn at a point, a function of the drawing run's seed and step, of row, sample and real position."""
        stream, seed, step_B = 4096 + 64 * self.index + at, applied.steering_seed, applied.policy_step_B
        assert seed is not None  # Steering.lacking has looked
        step_B = torch.where(step_B < 0, -1 - step_B, step_B)
        return keyed_normals(seed, stream, step_B, row_B, sample_B, index_BT, width)

    def apply(self, at: int, base: Tensor, strength: Tensor, unit: bool = False, noise: Tensor | None = None) -> Tensor:
        """The edited activation at every position; the caller keeps it where the site selects."""
        operation, held = self.operation, self.tensors(at, base.device)
        source = held.get("vector") if noise is None else noise
        if operation.needs_vector:
            assert source is not None
            self._check_width(source, base)
        tensors = [held[name] for name in self.tensor_names]
        if not operation.strength:
            new = self.function(base, source, *tensors, **self.settings)
            if unit:
                return new
            mixed = operations.wide(base) + strength * (operations.wide(new) - operations.wide(base))
            return torch.where(strength == 1, new, mixed.to(base.dtype))
        if self.spec.strength.norm_match and operation.needs_vector:
            assert source is not None
            length = operations.wide(base).norm(dim=-1, keepdim=True)
            strength = strength * length / source.norm().clamp_min(torch.finfo(source.dtype).tiny)
        if operation.family == "function":
            return self._users(base, source, strength)
        return self.function(base, source, *tensors, **{operation.strength: strength}, **self.settings)

    def _users(self, base: Tensor, source: Tensor | None, strength: Tensor) -> Tensor:
        """The user's own function, whose result is looked at."""
        path = self.spec.op.function
        try:
            new = self.function(base, source, strength)
        except (Exception, SystemExit) as error:
            raise ConfigError(f"site {self.name!r}: {path} {said(error)}") from error
        if not isinstance(new, Tensor) or new.shape != base.shape:
            given = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ConfigError(f"site {self.name!r}: {path} gave {given}; expected a tensor of shape {tuple(base.shape)}")
        return new.to(base.dtype)

    def _check_width(self, source: Tensor, base: Tensor) -> None:
        if source.shape[-1] != base.shape[-1]:
            raise ConfigError(
                f"site {self.name!r}: its vector is {source.shape[-1]} wide, and the activation at "
                f"{self.spec.at.module or 'its layer'} "
                f"is {base.shape[-1]} wide; it was made for another model or component"
            )
