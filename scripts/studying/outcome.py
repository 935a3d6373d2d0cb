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
    """Of a run that came to its end, or broke on its way."""
    final, summary = finished(run, study.final), read_json(run.folder / "summary.json")
    assert final is not None
    steps = read_lines(run.folder / METRICS)
    curves = {
        name: [[line["step"], line[name]] for line in steps if line.get(name) is not None] for name in drawn(study, steps)
    }
    if "broken" in final:
        return {"seed": run.seed, "broken": final["broken"], "steps": len(steps), "curves": curves}
    if "eval/reward" in curves:
        curves["eval/reward"].insert(0, [0, summary["reward_before"]])
    return {
        "seed": run.seed,
        **{name: final[name] for name in ("reward", "parts", "measures", "kl", "length", "samples", "completions")},
        **({} if study.reach is None else {"reached": first(curves["reward/mean"], study.reach)}),
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


def averaged(values: Sequence[float]) -> str:
    return number(mean(values)) if values else "-"


def ranged(values: Sequence[float]) -> str:
    found = interval(values)
    return averaged(values) + (f" [{number(found[0])}, {number(found[1])}]" if found else "")


def share(hits: int, count: int) -> str:
    low, high = wilson(hits, count)
    return f"{hits} of {count} [{low:.2f}, {high:.2f}]"


def columns(runs: Sequence[Mapping[str, Any]], study: StudySettings) -> dict[str, str]:
    """An arm's row, by the names of the columns: means over the runs that came to their end, shares of all."""
    ended = [run for run in runs if "broken" not in run]
    rewards = [run["reward"] for run in ended]
    cells = {
        "final reward": ranged(rewards) + (f" ({len(runs) - len(ended)} broke)" if len(ended) < len(runs) else ""),
        "by seed": " ".join("broke" if "broken" in run else number(run["reward"]) for run in runs),
    }
    if study.above is not None:
        cells[f"above {study.above:g}"] = share(sum(reward > study.above for reward in rewards), len(runs))
    for name in study.final.measures:
        cells[name] = ranged([run["measures"][name] for run in ended])
    cells["KL per response, nats"] = ranged([run["kl"] for run in ended])
    cells["length"] = averaged([run["length"] for run in ended])
    if study.reach is not None:
        steps = [math.inf if run.get("reached") is None else run["reached"] for run in runs]
        got = sum(map(math.isfinite, steps))
        middle = f"{median(steps):g}" if math.isfinite(median(steps)) else "never"
        few = "" if got == len(runs) else f" ({got} of {len(runs)} got there)"
        cells[f"steps to {study.reach:g}: median"] = middle + few
    cells["rollouts"] = averaged([run["rollouts"] for run in ended])
    cost = {name: averaged([run["cost"].get(name, math.nan) for run in ended]) for name in ("cpu_s", "wall_s", *PEAKS)}
    cells["CPU s / wall s"] = f"{cost['cpu_s']} / {cost['wall_s']}"
    cells["peak MiB"] = cost["peak_mb"] + ("" if cost["gpu_peak_mb"] in ("nan", "-") else f", GPU {cost['gpu_peak_mb']}")
    return cells


def markdown(rows: Sequence[Mapping[str, str]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)]) + "\n"


def table(results: Mapping[str, Sequence[Mapping[str, Any]]], study: StudySettings) -> str:
    text = markdown([{"arm": arm} | columns(runs, study) for arm, runs in results.items()])
    last = study.first_seed + study.seeds - 1
    answers = next((f"{run['samples']:,}" for runs in results.values() for run in runs if "samples" in run), "no")
    notes = [
        f"Seeds {study.first_seed} to {last}; the final reward is of {answers} answers of the model that each run left.",
        "Means over seeds with 95 % intervals of Student's t" + ("; shares with Wilson's." if study.above is not None else "."),
    ]
    return text + "\n" + "\n".join(notes) + "\n"


def search_table(searched: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """What every combination of an arm's grid came to, the chosen one marked."""
    rows = [
        {
            "arm": arm,
            "setting": said(choice["setting"]),
            "mean": "-" if choice["mean"] is None else number(choice["mean"]),
            "by seed": " ".join("broke" if reward is None else number(reward) for reward in choice["rewards"]),
            "chosen": "yes" if choice["chosen"] else "",
        }
        for arm, choices in searched.items()
        for choice in choices
    ]
    return markdown(rows)


def said(setting: Changes) -> str:
    return ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in setting.items())
