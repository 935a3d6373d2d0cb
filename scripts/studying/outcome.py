"""What a study says: of every run its figures and curves, of every arm means with 95 % intervals, as a table.

Means: Student's t over the seeds. Shares of seeds: Wilson's interval.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from steerl.scripts.studying.plan import Changes, Run, StudySettings
from steerl.scripts.studying.runs import finished
from steerl.training.report.run_data import read_json, read_lines
from steerl.training.run.log import METRICS

PEAKS = ("peak_mb", "gpu_peak_mb")
Z = 1.959963984540054
"""Of the normal distribution 95 % lie within so many deviations."""


# -- runs --------------------------------------------------------------------------------------------------------------


def outcome(run: Run, study: StudySettings) -> dict[str, Any]:
    """Of a run that is finished."""
    final = finished(run, study.final)
    assert final is not None
    steps, summary = read_lines(run.folder / METRICS), read_json(run.folder / "summary.json")
    curves = {
        name: [[step["step"], step[name]] for step in steps if step.get(name) is not None] for name in drawn(study, steps)
    }
    if (before := summary.get("reward_before")) is not None:
        curves = {name: [[0, before], *curve] if name == "eval/reward" else curve for name, curve in curves.items()}
    kept = {name: final[name] for name in ("reward", "parts", "measures", "kl", "length", "samples", "completions")}
    reached = None if study.reach is None else first(curves["reward/mean"], study.reach)
    return {
        "seed": run.seed,
        **kept,
        **({} if study.reach is None else {"reached": reached}),
        "steps": summary["steps"],
        "rollouts": summary["rollouts"],
        "curves": curves,
        "cost": {
            "cpu_s": sum(line["time/cpu_s"] for line in steps),
            "wall_s": summary["seconds"],
            **{name: max(line[f"memory/{name}"] for line in steps) for name in PEAKS if f"memory/{name}" in steps[0]},
        },
    }


def drawn(study: StudySettings, steps: Sequence[Mapping[str, Any]]) -> list[str]:
    """The metrics that are kept as curves: rewards, KL (of evaluations, where there are), measures by the names of the reward's
    parts, and those that were asked for."""
    there = {name for step in steps for name in step}
    kl = "eval/kl" if "eval/kl" in there else "kl/ref"
    measures = [f"{room}/{name}" for name in study.final.measures for room in ("reward", "eval")]
    names = ["reward/mean", "eval/reward", kl, *measures, *study.curves]
    return [name for name in dict.fromkeys(names) if name in there]


def first(curve: Sequence[Sequence[float]], goal: float) -> int | None:
    """The first step that reaches the goal."""
    return next((int(step) for step, value in curve if value >= goal), None)


# -- intervals ---------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 %, of the mean, by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    half = student(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return mean(values) - half, mean(values) + half


def student(freedom: int) -> float:
    """t with 95 % of Student's distribution between -t and t: bisection of its distribution function, a finite sum for whole
    degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""

    def within(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        sine, cosine = math.sin(angle), math.cos(angle)
        odd = freedom % 2
        term = cosine if odd else 1.0
        total = 0.0
        for k in range(1 + odd, freedom, 2):  # the last power of the cosine is freedom - 2
            total += term
            term *= cosine**2 * k / (k + 1)
        return 2 / math.pi * (angle + sine * total) if odd else sine * total

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 0.95 else (low, middle)
    return (low + high) / 2


def wilson(hits: int, count: int) -> tuple[float, float]:
    """95 %, of a share."""
    share, spread = hits / count, Z**2 / count
    half = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max((share + spread / 2 - half) / (1 + spread), 0.0), min((share + spread / 2 + half) / (1 + spread), 1.0)


# -- the table ---------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three digits or so, whatever the size."""
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def ranged(values: Sequence[float]) -> str:
    found = interval(values)
    return number(mean(values)) + (f" [{number(found[0])}, {number(found[1])}]" if found else "")


def share(hits: int, count: int) -> str:
    low, high = wilson(hits, count)
    return f"{hits} of {count} [{low:.2f}, {high:.2f}]"


def columns(runs: Sequence[Mapping[str, Any]], study: StudySettings) -> dict[str, str]:
    """An arm's row, by the names of the columns."""
    rewards = [run["reward"] for run in runs]
    cells = {"final reward": ranged(rewards), "by seed": " ".join(map(number, rewards))}
    if study.above is not None:
        cells[f"above {study.above:g}"] = share(sum(reward > study.above for reward in rewards), len(runs))
    for name in study.final.measures:
        cells[name] = ranged([run["measures"][name] for run in runs])
    cells["KL per response, nats"] = ranged([run["kl"] for run in runs])
    cells["length"] = number(mean(run["length"] for run in runs))
    if study.reach is not None:
        steps = [math.inf if run["reached"] is None else run["reached"] for run in runs]
        got = sum(map(math.isfinite, steps))
        middle = f"{median(steps):g}" if math.isfinite(median(steps)) else "never"
        cells[f"steps to {study.reach:g}: median"] = (
            middle if got == len(runs) else f"{middle} ({got} of {len(runs)} got there)"
        )
    cells["rollouts"] = number(mean(run["rollouts"] for run in runs))
    cost = {name: mean(run["cost"][name] for run in runs) for name in runs[0]["cost"]}
    cells["CPU s / wall s"] = f"{number(cost['cpu_s'])} / {number(cost['wall_s'])}"
    cells["peak MiB"] = number(cost["peak_mb"]) + (f", GPU {number(cost['gpu_peak_mb'])}" if "gpu_peak_mb" in cost else "")
    return cells


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)]) + "\n"


def table(results: Mapping[str, Sequence[Mapping[str, Any]]], study: StudySettings) -> str:
    text = markdown([{"arm": arm} | columns(runs, study) for arm, runs in results.items()])
    seeds = next(iter(results.values()))
    named = f"{seeds[0]['seed']}" if len(seeds) == 1 else f"{seeds[0]['seed']} to {seeds[-1]['seed']}"
    notes = [
        f"Seeds {named}; the final reward is of {seeds[0]['samples']:,} answers of the model that each run left.",
        "Means over seeds with 95 % intervals of Student's t" + ("; shares with Wilson's." if study.above is not None else "."),
    ]
    return text + "\n" + "\n".join(notes) + "\n"


def search_table(searched: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What every combination of an arm's grid came to, the chosen one marked."""
    rows = [
        {
            "arm": arm,
            "setting": said(choice["setting"]),
            "mean": number(choice["mean"]),
            "by seed": " ".join(map(number, choice["rewards"])),
            "chosen": "yes" if choice["chosen"] else "",
        }
        for arm, choices in searched.items()
        for choice in choices
    ]
    return markdown(rows)


def said(setting: Changes) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in setting.items())
