"""Normalisation and clipping of a term's values, before its weight. All of it is off unless asked for.

    normalise: {mean: 0.3, std: 1.2}       (value - mean) / std with numbers in hand
    normalise: {reference: FILE}           the same, measured once on a file of reference prompts and completions
    normalise: running                     mean and std of all values so far, this call's included, over all ranks;
                                           evaluation does not count; the state is part of the checkpoint
    clip: [-3, 3]                          after it

Values that do not apply to a row (NaN) are left as they are and never measured.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from steerl.reward.settings import TextSettings
from steerl.reward.texts import load_texts
from steerl.reward.types import Scores
from steerl.rollout.common import processes
from steerl.rollout.common.errors import ConfigError
from steerl.rollout.types import Rollout, Texts

logger = logging.getLogger(__name__)
LEAST = 1e-8
"""A standard deviation under this counts as none: values are centred and not scaled."""


@dataclass
class Running:
    """Count, mean and sum of squared deviations of everything seen."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values_N: Tensor) -> None:
        """One set of values, over all ranks: every rank must call, with or without values of its own."""
        values_N = values_N.double()
        sums = torch.stack([torch.tensor(float(len(values_N)), dtype=torch.float64), values_N.sum().cpu()])
        count, total = processes.sum_(sums.to(processes.start().device)).tolist()
        if not count:
            # Still in step with the other ranks: nobody has values, so nobody makes the second call.
            return
        mean = total / count
        deviations = (values_N.cpu() - mean).square().sum().reshape(1)
        squares = processes.sum_(deviations.to(processes.start().device)).item()
        shift, joined = mean - self.mean, self.count + count
        self.squares += squares + shift * shift * self.count * count / joined
        self.mean += shift * count / joined
        self.count = joined

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 1.0


@dataclass
class Shape:
    """values -> (values - mean) / std -> clipped."""

    mean: float = 0.0
    std: float = 1.0
    clip: tuple[float, float] | None = None
    running: Running | None = field(default=None)

    @staticmethod
    def of(normalise: Any, clip: Any, score: Callable[[Rollout, Texts], Scores], where: str) -> Shape:
        bounds = None if clip is None else (float(clip[0]), float(clip[1]))
        if normalise is None:
            return Shape(clip=bounds)
        if normalise == "running":
            return Shape(clip=bounds, running=Running())
        if "reference" not in normalise:
            return Shape(float(normalise["mean"]), float(normalise["std"]), bounds)
        mean, std = measure_reference(normalise, score, where)
        logger.info("%s: reference responses score %.6g on average, standard deviation %.6g", where, mean, std)
        return Shape(mean, std, bounds)

    @property
    def is_running(self) -> bool:
        return self.running is not None

    def still(self) -> Shape:
        """The same for now, which nothing that is scored changes."""
        return self if self.running is None else Shape(self.running.mean, self.running.std, self.clip)

    def __call__(self, values_B: Tensor) -> Tensor:
        mean, std = self.mean, self.std
        if self.running is not None:
            self.running.add(values_B[~values_B.isnan()])
            mean, std = self.running.mean, self.running.std
        values_B = (values_B.double() - mean) / (std if std > LEAST else 1.0)
        return (values_B if self.clip is None else values_B.clamp(*self.clip)).float()

    def state_dict(self) -> dict[str, float]:
        return vars(self.running).copy() if self.running is not None else {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.running = Running(**state)


def measure_reference(
    normalise: Mapping[str, Any], score: Callable[[Rollout, Texts], Scores], where: str
) -> tuple[float, float]:
    """Mean and standard deviation of a term's scores on a file of reference prompts and completions."""
    given = {name: value for name, value in normalise.items() if name != "reference"}
    known = {spot.name for spot in fields(TextSettings)} - {"path"}
    if set(given) - known:
        unknown = ", ".join(sorted(set(given) - known))
        raise ConfigError(f"{where}.normalise: unknown {unknown}; beside reference it takes {', '.join(sorted(known))}")
    table = load_texts(TextSettings(path=str(normalise["reference"]), **given), f"{where}.normalise")
    values = score(*table.batch(range(len(table)))).total_B.double()
    values = values[~values.isnan()]
    std = values.std(correction=0).item() if len(values) > 1 else 0.0
    if std <= LEAST:
        found = f"{len(values)} scored row(s) with standard deviation {std}"
        raise ConfigError(f"{where}.normalise.reference: {found}; name more, or varied, texts")
    return values.mean().item(), std
