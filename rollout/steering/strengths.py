"""How strong each site is on each row: numbers, data columns, keyed draws, schedules over training, steered fractions.

Draws depend on (seed, training step, row, sample) and the site, and on nothing else: the same row is steered alike in
any batch, process or resume. Which samples of a prompt are steered under `fraction` is a systematic draw: of n samples
always floor(n f) or ceil(n f), f on average.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steerl.rollout.common.errors import DataError
from steerl.rollout.common.random import uniforms
from steerl.rollout.steering.spec.spec import Schedule, Site, SteeringSpec

_STREAM = 0x5357_4545_5200
"""Keeps these draws apart from the sampler's: another seed of the same generator."""


def keyed(seed: int, stream: int, step: int | Tensor, row_B: Tensor, sample_B: Tensor, t: int | Tensor = 0) -> Tensor:
    """Uniforms in [0, 1) for (row, sample), float64; `stream` keeps one use apart from another."""
    return uniforms(seed ^ (_STREAM + stream), step, row_B, sample_B, t)


def keyed_normals(
    seed: int, stream: int, step: int | Tensor, row_B: Tensor, sample_B: Tensor, index_BT: Tensor, width: int
) -> Tensor:
    """Standard normals (B, T, width) for each real position of each (row, sample)."""
    rows, columns = index_BT.shape
    offsets = torch.arange(2 * width, device=index_BT.device)
    t = (index_BT.clamp_min(0)[:, :, None] * (2 * width) + offsets).reshape(rows, -1)
    pairs = keyed(seed, stream, step, row_B, sample_B, t).reshape(rows, columns, 2, width)
    radius = torch.sqrt(-2.0 * torch.log1p(-pairs[:, :, 0]))
    return (radius * torch.cos(2.0 * math.pi * pairs[:, :, 1])).float()


def schedule_factor(schedule: Schedule | None, progress: float) -> float:
    """The factor at a share of training done: `start` at 0, `end` from `until` on."""
    if schedule is None:
        return 1.0
    if schedule.type == "constant":
        return schedule.start
    share = 1.0 if schedule.until <= 0 else min(max(progress, 0.0) / schedule.until, 1.0)
    if schedule.type == "cosine":
        share = 0.5 * (1.0 - math.cos(math.pi * share))
    return schedule.start + (schedule.end - schedule.start) * share


def steered_rows(spec: SteeringSpec, seed: int, step: int, row_B: Tensor, sample_B: Tensor) -> Tensor:
    """Which rows are steered at all, by `fraction`."""
    if spec.fraction >= 1.0:
        return torch.ones_like(row_B, dtype=torch.bool)
    offset = keyed(seed, 1, step, row_B, torch.zeros_like(sample_B))
    before = torch.floor(sample_B.double() * spec.fraction + offset)
    return torch.floor((sample_B.double() + 1.0) * spec.fraction + offset) > before


def site_strength(
    site: Site, index: int, seed: int, step: int, row_B: Tensor, sample_B: Tensor, columns: Mapping[str, Sequence[Any]]
) -> Tensor:
    """The site's own strength per row, before schedule and fraction, float32."""
    strength = site.strength
    if strength.column:
        values = column(columns, strength.column, f"site {site.name!r}: strength")
        bad = next((v for v in values if isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v)), None)
        if bad is not None:
            raise DataError(
                f"column {strength.column!r}: expected a number per row (strength of site {site.name!r}), found {bad!r}"
            )
        return torch.tensor([float(v) for v in values], dtype=torch.float32, device=row_B.device) * strength.value
    if strength.samples:
        listed = torch.tensor(strength.samples, dtype=torch.float32, device=row_B.device)
        return listed[sample_B % len(listed)]
    if strength.dist:
        sample = sample_B if strength.per == "sample" else torch.zeros_like(sample_B)
        if strength.dist == "uniform":
            drawn = strength.low + (strength.high - strength.low) * keyed(seed, 16 + index, step, row_B, sample)
        else:
            one, two = (keyed(seed, 16 + index, step, row_B, sample, t) for t in (0, 1))
            drawn = strength.mean + strength.std * torch.sqrt(-2.0 * torch.log1p(-one)) * torch.cos(2.0 * math.pi * two)
        return drawn.float()
    return torch.full(row_B.shape, strength.value, dtype=torch.float32, device=row_B.device)


def samples_problems(spec: SteeringSpec, n: int) -> list[str]:
    """Every entry of a list of strengths is there for equally many of a prompt's n samples."""
    return [
        f"steering.sites[{index}].strength.samples: {count} strengths for sampling.n = {n} samples of a prompt, which have not "
        f"each of them equally often; set sampling.n to {math.ceil(n / count) * count}, or give another list"
        for index, site in enumerate(spec.sites)
        if (count := len(site.strength.samples)) and n % count
    ]


def column(columns: Mapping[str, Sequence[Any]], name: str, who: str) -> Sequence[Any]:
    if name not in columns:
        known = ", ".join(sorted(columns)) or "none"
        raise DataError(f"{who}: the data has no column {name!r}; its columns: {known}")
    return columns[name]
