"""The curves of a study as a picture: of every arm the mean of its seeds, and each seed thinly."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import written_aside

ARMS = 5
"""In one panel."""
LARGEST = 100_000
"""Bytes of the picture."""
TITLES = {
    "reward/mean": "reward of the rollouts",
    "eval/reward": "reward of held-out answers",
    "eval/kl": "KL per held-out response, nats",
    "kl/ref": "KL per response, nats",
}


def plot(results: Mapping[str, Sequence[Mapping[str, Any]]], path: Path) -> None:
    """A column for each metric, a row for every few arms."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"{path.name}: matplotlib is not installed; pip install matplotlib") from error
    names = list(dict.fromkeys(name for runs in results.values() for run in runs for name in run["curves"]))
    rows = -(-len(results) // ARMS)
    each = -(-len(results) // rows)
    groups = [list(results)[start : start + each] for start in range(0, len(results), each)]
    drawing = Figure(figsize=(4.1 * len(names), 3.2 * len(groups)), layout="constrained")
    axes = drawing.subplots(len(groups), len(names), squeeze=False, sharex=True, sharey="col")
    for shown, arms in zip(axes, groups, strict=True):
        for axis, name in zip(shown, names, strict=True):
            for at, arm in enumerate(arms):
                line(axis, [run["curves"][name] for run in results[arm] if run["curves"].get(name)], arm, at)
            axis.set_title(TITLES.get(name, name), fontsize=10)
            axis.set_xlabel("PPO step", fontsize=9)
            axis.grid(alpha=0.3)
        shown[0].legend(fontsize=8)
    with written_aside(path) as aside:
        for dots in (110, 95, 80, 65, 50):
            drawing.savefig(aside, format="png", dpi=dots, pil_kwargs={"optimize": True})
            if os.path.getsize(aside) < LARGEST:
                break


def line(axis: Any, curves: Sequence[Sequence[Sequence[float]]], arm: str, at: int) -> None:
    for curve in curves:
        axis.plot(*zip(*curve, strict=True), color=f"C{at}", alpha=0.35, linewidth=0.7)
    by_step: dict[float, list[float]] = {}
    for step, value in (point for curve in curves for point in curve):
        by_step.setdefault(step, []).append(value)
    steps = sorted(step for step, values in by_step.items() if len(values) == len(curves))
    means = [mean(by_step[step]) for step in steps]
    axis.plot(steps, means, color=f"C{at}", linewidth=max(4.5 - at, 1.2), label=arm)  # none hides another
