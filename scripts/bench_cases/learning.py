"""The learning comparison: randomwalks, reward by samples and by seconds, this project beside TRL 1.12's PPOTrainer.

    world (made if missing) ──┬─> ours.py       SEED ──┐
    TRL 1.12 (a folder of ────┼─> trl_112.py    SEED ──┼─> learning.json, a table, learning.png
    its own, first on path)   └─> (defaults, tuned)  ──┘

Every run is a process of its own with one thread. Seconds are its CPU seconds from the first rollouts' reward on (the wall's
are kept beside them): another job on the machine does not change who wins. The reward is the mean over a step's rollouts,
which are drawn at the setting's own temperature; the evaluations after steps 20 and 100 are at temperature 1 for all.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import versions, write_json, written_aside

PEER = "trl==1.12.0"
"""The last TRL with PPO. It runs on the transformers that is installed here."""
GOAL = 0.9
LEARNERS = ("ours", "trl tuned", "trl defaults")


@dataclass(frozen=True)
class LearningSettings:
    """The learning comparison."""

    seeds: int = 5
    """Runs of each learner."""
    first_seed: int = 0
    """The first of them; settings are tuned on seeds that are not reported."""
    steps: int = 100
    """Steps of each run, 128 rollouts a step."""
    peer_steps: int = 0
    """Steps after which the peer, which is slower, is stopped, on the schedule of all its steps; 0 = after all of them."""
    peer: str = ""
    """A folder that holds TRL 1.12; empty = installed into OUT/trl-1.12."""


def measure(out: Path, settings: LearningSettings, learners: Sequence[str] = LEARNERS) -> dict[str, object]:
    """Run everything that is not in learning.json yet, and write it with its table and its plot."""
    out.mkdir(parents=True, exist_ok=True)
    world = make_world(out)
    peer = Path(settings.peer) if settings.peer else install_peer(out / "trl-1.12")
    found = load(out / "learning.json", settings)
    for seed in range(settings.first_seed, settings.first_seed + settings.seeds):
        for learner in learners:
            if str(seed) not in found["runs"].setdefault(learner, {}):
                print(f"{learner}, seed {seed} ...", flush=True)
                found["runs"][learner][str(seed)] = run(learner, world, out / "run", seed, settings, peer)
                write_json(out / "learning.json", found)
    for line in table(found):
        print(line)
    plot(found, out / "learning.png")
    return found


def load(path: Path, settings: LearningSettings) -> dict[str, Any]:
    """What was measured already; a fresh file for other settings."""
    fresh = {"steps": settings.steps, "peer": PEER, "versions": versions(), "runs": {}}
    if not path.is_file():
        return fresh
    found: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    if found.get("steps") != settings.steps:
        raise UserError(f"{path}: has runs of {found.get('steps')} steps, asked for are {settings.steps}; name another --out")
    return found


def make_world(out: Path) -> Path:
    command = [sys.executable, "-m", "steerl", "tiny", "--out", str(out.absolute() / "tiny"), "--worlds", "randomwalks"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out.absolute() / "tiny" / "randomwalks"


def install_peer(folder: Path) -> Path:
    """Into a folder of its own: the TRL of this environment stays as it is."""
    if not (folder / "trl").is_dir():
        command = [sys.executable, "-P", "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PEER]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["pip said nothing"]
            raise UserError(f"bench: {PEER} cannot be installed ({lines[-1]}); give its folder with --learning.peer DIR")
    return folder.absolute()


def run(learner: str, world: Path, folder: Path, seed: int, settings: LearningSettings, peer: Path) -> dict[str, object]:
    """One run in a process of its own; its last line is what it found."""
    setting = [learner.split()[-1], str(settings.peer_steps)]
    module, last = ("ours", []) if learner == "ours" else ("trl_112", setting)
    arguments = [str(world), str(folder.absolute()), str(seed), str(settings.steps), *last]
    return said_by(module, arguments, None if learner == "ours" else peer, f"{learner}, seed {seed}")


def said_by(module: str, arguments: Sequence[str], peer: Path | None, name: str, **extra: str) -> dict[str, object]:
    """What the last line of a child says: a module of this folder in a process of its own, with one thread, and with the
    peer's TRL first on its path. `extra` goes into its environment."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    if peer is not None:
        environment["PYTHONPATH"] = str(peer)
    environment |= {"TOKENIZERS_PARALLELISM": "false", **extra}
    command = [sys.executable, "-m", f"steerl.scripts.bench_cases.{module}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"bench: {name} failed:", *done.stderr.strip().splitlines()[-5:])
    result: dict[str, object] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


# -- what it says -----------------------------------------------------------------------------------------------------


def first_at(rewards: Sequence[float], goal: float = GOAL) -> int | None:
    """The first step whose rollouts reach the goal, counted from 1."""
    return next((step for step, reward in enumerate(rewards, 1) if reward >= goal), None)


def summary(runs: dict[str, Any]) -> dict[str, object]:
    """Of one learner: medians over the seeds, and the worst seed. A seed that never gets there counts as infinite."""
    steps = [first_at(run["rewards"]) for run in runs.values()]
    seconds = [run["seconds"][step - 1] if step else None for step, run in zip(steps, runs.values(), strict=True)]

    def median(values: Sequence[float | None]) -> float:
        return statistics.median(float("inf") if value is None else value for value in values)

    found: dict[str, object] = {
        "seeds": len(runs),
        f"steps to {GOAL}": median(steps),
        f"seconds to {GOAL}": median(seconds),
        f"worst steps to {GOAL}": max(float("inf") if step is None else step for step in steps),
        "seconds a step": statistics.median(run["seconds"][-1] / max(len(run["seconds"]) - 1, 1) for run in runs.values()),
    }
    for step in sorted({int(step) for run in runs.values() for step in run["evaluated"]}):
        values = [run["evaluated"].get(str(step)) for run in runs.values()]
        if None not in values:  # a mean over the runs that came so far would be of other seeds than the rest of the row
            found[f"reward after {step}"], found[f"worst after {step}"] = statistics.mean(values), min(values)
    return found


def table(found: dict[str, Any]) -> list[str]:
    """Markdown."""
    rows = {learner: summary(runs) for learner, runs in found["runs"].items() if runs}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))

    def cell(value: object) -> str:
        return "-" if value is None else "never" if value == float("inf") else f"{value:.3f}".rstrip("0").rstrip(".")

    lines = ["| learner | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    return lines + [
        f"| {learner} | " + " | ".join(cell(row.get(name)) for name in names) + " |" for learner, row in rows.items()
    ]


def plot(found: dict[str, Any], path: Path) -> None:
    """Mean reward by samples and by seconds: a thin line for each seed, a thick one for the median."""
    from matplotlib.figure import Figure

    from steerl.scripts.bench_cases.task import ROLLOUTS

    drawing = Figure(figsize=(9.5, 3.6), layout="constrained", dpi=130)
    by_samples, by_seconds = drawing.subplots(1, 2, sharey=True)
    for number, (learner, runs) in enumerate(found["runs"].items()):
        color, shortest = f"C{number}", min(len(one["rewards"]) for one in runs.values())
        for one in runs.values():
            samples = [step * ROLLOUTS for step in range(1, len(one["rewards"]) + 1)]
            by_samples.plot(samples, one["rewards"], color=color, alpha=0.25, linewidth=0.7)
            by_seconds.plot(one["seconds"], one["rewards"], color=color, alpha=0.25, linewidth=0.7)
        middle = [statistics.median(one["rewards"][i] for one in runs.values()) for i in range(shortest)]
        pace = [statistics.median(one["seconds"][i] for one in runs.values()) for i in range(shortest)]
        by_samples.plot([step * ROLLOUTS for step in range(1, shortest + 1)], middle, color=color, linewidth=2, label=learner)
        by_seconds.plot(pace, middle, color=color, linewidth=2, label=learner)
    by_samples.set_xlabel("samples")
    by_samples.set_ylabel("reward of a step's rollouts (optimum 1)")
    by_seconds.set_xlabel("CPU seconds since the first rollouts, one thread")
    for axis in (by_samples, by_seconds):
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right", fontsize=9)
    with written_aside(path) as aside:
        drawing.savefig(aside, format="png")
