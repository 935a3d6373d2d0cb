"""Time and memory as the work doubles: rows, prompt, response, vocabulary, samples per prompt, one at a time.

The limit's own formulas (limit.py) say how much work a case is, in operations; a straight line through what was measured
means that cost follows work. The slope between neighbors is log(time ratio) / log(work ratio): 1 is linear.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steerl.rollout.common.run_folder import write_json, written_aside
from steerl.scripts.bench_cases import limit
from steerl.scripts.bench_cases.cases import Case
from steerl.scripts.bench_cases.speed import SpeedSettings, child

BASE = Case(hidden=128, layers=4, vocabulary=4096, rows=16, response=32, prompt=32, epochs=2)
DOUBLED: dict[str, tuple[Case, ...]] = {
    "rows": tuple(replace(BASE, rows=rows) for rows in (16, 32, 64, 128)),
    "prompt": tuple(replace(BASE, prompt=prompt) for prompt in (32, 64, 128, 256)),
    "response": tuple(replace(BASE, response=response) for response in (32, 64, 128, 256)),
    "vocabulary": tuple(replace(BASE, vocabulary=size) for size in (4096, 8192, 16_384, 32_768)),
    "samples": tuple(replace(BASE, n=n, rows=16 * n) for n in (1, 2, 4, 8)),
}
_UNIT = {"flops": 1.0, "bandwidth": {"1": math.inf}}
"""A machine of one operation per second: its limits are counts of operations."""


def measure(out: Path, settings: SpeedSettings, quick: bool = False) -> dict[str, Any]:
    """Run what is doubled; leaves scaling.json and scaling.png."""
    rounds, times = (1, 1) if quick else (settings.rounds, settings.times)
    cases = {name: series[:2] if quick else series for name, series in DOUBLED.items()}
    out.mkdir(parents=True, exist_ok=True)
    runs: dict[str, list[dict[str, object]]] = {}
    names = {json.dumps(case.to_json()): case for series in cases.values() for case in series}
    for number in range(rounds):
        for text, case in names.items():
            print(f"round {number + 1} of {rounds}: {case.name} P{case.prompt} ...", flush=True)
            runs.setdefault(text, []).append(child([text, "ours"], None, times, out))
    found = {name: [point(case, runs[json.dumps(case.to_json())]) for case in series] for name, series in cases.items()}
    write_json(out / "scaling.json", found)
    for line in table(found):
        print(line)
    plot(found, out / "scaling.png")
    return found


def point(case: Case, several: Sequence[dict[str, Any]]) -> dict[str, object]:
    """Work, seconds and memory of one case."""
    alive = several[-1]["alive"]
    score, learn = limit.update_seconds(case, alive, _UNIT)
    work = {"sample": limit.decode_seconds(case, alive, _UNIT), "score": score, "learn": learn}
    seconds = {name: statistics.median(s for run in several for s in run["seconds"][name]) for name in work}
    peak = statistics.median(run["peak_mb"] - run["before_mb"] for run in several)
    return {"case": case.to_json(), "work": work, "seconds": seconds, "growth_mb": peak}


def slope(points: Sequence[dict[str, Any]]) -> list[float]:
    """Of the whole update, between neighbors."""
    work = [sum(point["work"].values()) for point in points]
    seconds = [sum(point["seconds"].values()) for point in points]
    pairs = zip(seconds, seconds[1:], work, work[1:], strict=False)
    return [math.log(s2 / s1) / math.log(w2 / w1) for s1, s2, w1, w2 in pairs]


_FIELDS = {"rows": "rows", "prompt": "prompt", "response": "response", "vocabulary": "vocabulary", "samples": "n"}


def table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Markdown."""
    lines = ["| doubled | values | Gflop | seconds | slope between neighbors | MB |", "|" + "---|" * 6]
    for name, points in found.items():
        values = " ".join(f"{point['case'][_FIELDS[name]]:,}" for point in points)
        work = " ".join(f"{sum(point['work'].values()) / 1e9:.1f}" for point in points)
        seconds = " ".join(f"{sum(point['seconds'].values()):.2f}" for point in points)
        slopes = " ".join(f"{value:.2f}" for value in slope(points))
        memory = " ".join(f"{point['growth_mb']:.0f}" for point in points)
        lines.append(f"| {name} | {values} | {work} | {seconds} | {slopes} | {memory} |")
    return lines


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Seconds and memory against the work, a line for each thing that is doubled; dashed: linear from the base."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(9.5, 3.8), layout="constrained", dpi=130)
    by_time, by_memory = drawing.subplots(1, 2)
    for number, (name, points) in enumerate(found.items()):
        work = [sum(point["work"].values()) / 1e9 for point in points]
        seconds = [sum(point["seconds"].values()) for point in points]
        by_time.plot(work, seconds, "o-", color=f"C{number}", label=name)
        by_memory.plot(work, [point["growth_mb"] for point in points], "o-", color=f"C{number}", label=name)
        if number == 0:
            by_time.plot(work, [seconds[0] * w / work[0] for w in work], "k--", linewidth=0.8, label="linear")
    for axis in (by_time, by_memory):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlabel("work of one update, Gflop")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, title="doubled")
    by_time.set_ylabel("CPU seconds, one thread")
    by_memory.set_ylabel("memory beyond the imports, MB")
    with written_aside(path) as aside:
        drawing.savefig(aside, format="png")
