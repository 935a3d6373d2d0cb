"""Credit of groups beside the installed TRL's GRPO and RLOO: randomwalks, the same rollouts, groups, lengths and steps.

    search: the same grid for each of the four, on a seed of its own ──> the best by reward at the end is frozen
    then: defaults and tuned of all four, one run each, in turn ──> peers.json, a table

A process each, one thread, as in learning.py, whose clock and evaluation these are.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerl.rollout.common.run_folder import versions, write_json
from steerl.scripts.bench_cases.learning import first_at, make_world, said_by

GRID = {"learning_rate": (2e-4, 4e-4, 8e-4, 1.6e-3), "epochs": (1, 4)}
"""Of every learner, with four minibatches an epoch and a rate that falls to 0."""
SAMPLES = 8
PAIRS = (("group", "grpo"), ("rloo", "rloo"))
"""Our credit, TRL's trainer."""
Setting = dict[str, Any]


@dataclass(frozen=True)
class PeerSettings:
    """The comparison with TRL's GRPO and RLOO."""

    steps: int = 60
    """Steps of each run, 128 rollouts a step."""
    seed: int = 0
    """Of the runs that are reported."""
    search_seed: int = 100
    """Of the runs that settings are chosen by."""


def ours(credit: str, tuned: Setting | None) -> tuple[str, list[str]]:
    """(module, its last arguments): defaults are PPOSettings' own."""
    flags: Setting = {"ppo.credit": credit, "sampling.n": SAMPLES, "ppo.whiten_advantages": "null", "ppo.entropy_coef": 0.0}
    if tuned is None:
        flags |= {"ppo.learning_rate": 1e-5, "ppo.schedule": "constant", "ppo.kl_coef": 0.05}
    else:
        flags |= {"ppo.learning_rate": tuned["learning_rate"], "ppo.epochs": tuned["epochs"], "ppo.minibatches": 4}
        flags |= {"ppo.kl_coef": 0.0, "ppo.reference": "none"}
    return "ours", [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def theirs(method: str, tuned: Setting | None) -> tuple[str, list[str]]:
    """Defaults are TRL's own; one optimizer step of each step's rollouts is."""
    own: Setting = {"num_generations": SAMPLES}
    if tuned is not None:
        own |= {"learning_rate": tuned["learning_rate"], "num_iterations": tuned["epochs"], "minibatches": 4}
        own |= {"beta": 0.0, "lr_scheduler_type": "linear", "gradient_checkpointing": False}
    return "peers.trl_groups", [method, json.dumps(own)]


def measure(out: Path, settings: PeerSettings) -> dict[str, Any]:
    """Run what is not in peers.json yet."""
    out.mkdir(parents=True, exist_ok=True)
    world, path = make_world(out), out / "peers.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"search": {}, "runs": {}}
    found["versions"], found["steps"] = versions() | {"trl": importlib.metadata.version("trl")}, settings.steps
    learners = [learner for credit, method in PAIRS for learner in ((ours, credit), (theirs, method))]

    def run(among: str, make: Any, name: str, tuned: Setting | None, seed: int) -> dict[str, Any]:
        key = f"{make.__name__} {name} {'defaults' if tuned is None else json.dumps(tuned)}"
        if key not in found[among]:
            print(f"{among}: {key} ...", flush=True)
            module, last = make(name, tuned)
            arguments = [str(world), str((out / "run").absolute()), str(seed), str(settings.steps), *last]
            found[among][key] = said_by(module, arguments, None, key)
            write_json(path, found)
        return dict(found[among][key])

    grid = [dict(zip(GRID, values, strict=True)) for values in itertools.product(*GRID.values())]
    searched = {
        (make, name): [(at_end(run("search", make, name, tuned, settings.search_seed), settings), tuned) for tuned in grid]
        for make, name in learners
    }
    rows = []
    for tuned in (False, True):
        for make, name in learners:
            chosen = max(searched[make, name], key=lambda one: one[0])[1] if tuned else None
            rows.append((make, name, chosen, run("runs", make, name, chosen, settings.seed)))
    for line in table(rows, settings):
        print(line)
    return found


def at_end(run: dict[str, Any], settings: PeerSettings) -> float:
    return float(run["evaluated"][str(settings.steps)])


def table(rows: list[tuple[Any, str, Setting | None, dict[str, Any]]], settings: PeerSettings) -> list[str]:
    """Markdown."""
    lines = ["| learner | settings | steps to 0.9 | CPU s to 0.9 | CPU s a step | reward at the end | peak memory, MB |"]
    lines.append("|" + "---|" * 7)
    for make, name, tuned, run in rows:
        step = first_at(run["rewards"])
        told = f"steerl {name}" if make is ours else f"TRL {name.upper()}"
        how = "defaults" if tuned is None else f"rate {tuned['learning_rate']:g}, epochs {tuned['epochs']}"
        reached = (str(step), f"{run['seconds'][step - 1]:.1f}") if step else ("never", "never")
        pace = run["seconds"][-1] / max(len(run["seconds"]) - 1, 1)
        cells = [told, how, *reached, f"{pace:.2f}", f"{at_end(run, settings):.3f}", f"{run['memory'] / 1e6:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
