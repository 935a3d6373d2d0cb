"""Learning over several turns: the toy tasks with a tool and with an environment, a critic and group credit, and an ablation.

    calculator, maze ──> critic, group, no tool          success before and after, seconds
                     ──> critic, zeros, zeros x20        the same rows, another credit

zeros: credit as it is often computed. Values are 0 at the tokens that were fed, and GAE goes over all tokens as time, so that
what comes after an answer is discounted by its length. With lam = gamma = 1 the two are the same. Answers are short here, three
to nine tokens; x20 counts each of their tokens twenty times, as answers of 60 to 180 tokens would be counted.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from steerl.configs.reader import read

import torch
from torch import Tensor

from steerl.rollout.common.run_folder import write_json
from steerl.scripts import make_tiny, train_ppo
from steerl.training.algorithm import advantages

WORLDS, SEEDS, GOAL = ("calculator", "maze"), 5, 0.9
_OTHER = {"ppo.gamma": 0.99, "ppo.lam": 1.0}
ARMS: dict[str, dict[str, Any]] = {
    "critic": {},
    "group": {"ppo.credit": "group", "sampling.n": 8, "ppo.rollouts_per_step": 128, "ppo.minibatches": 4},
    "zeros": {},
    "zeros x20": {},
    "critic, gamma 0.99, lam 1": _OTHER,
    "zeros, gamma 0.99, lam 1": _OTHER,
    "zeros x20, gamma 0.99, lam 1": _OTHER,
    "no tool": {"environment.tools": [], "environment.max_turns": 8},
}
"""Beside the settings of configs/; gamma is 1 and lam 0.95 where they are not named. `no tool` is of the calculator alone."""


def gae_with_zeros(
    rewards_BR: Tensor,
    values_BR: Tensor,
    mask_BR: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_B: Tensor | None = None,
    times: int = 1,
) -> advantages.Credit:
    """Time is tokens, and a token that was fed is worth 0; each of these counts `times` times."""
    values_BR = torch.where(mask_BR, values_BR, 0.0)
    advantages_BR = torch.zeros_like(values_BR)
    last_B = (mask_BR * torch.arange(mask_BR.shape[1])).amax(1)
    after_B = torch.zeros_like(values_BR[:, 0]) if bootstrap_B is None else bootstrap_B.to(values_BR)
    carry_B, next_B = torch.zeros_like(after_B), after_B
    for t in reversed(range(mask_BR.shape[1])):
        for again in range(times):
            counts_B = (t <= last_B) & (~mask_BR[:, t] | (again == 0))
            error_B = rewards_BR[:, t] + gamma * next_B - values_BR[:, t]
            carry_B = torch.where(counts_B, error_B + gamma * lam * carry_B, carry_B)
            next_B = torch.where(counts_B, values_BR[:, t], next_B)
        advantages_BR[:, t] = carry_B
    return advantages.Credit(torch.where(mask_BR, advantages_BR, 0.0), torch.where(mask_BR, advantages_BR + values_BR, 0.0))


@contextlib.contextmanager
def credit_of(arm: str) -> Iterator[None]:
    before = advantages.gae
    if arm.startswith("zeros"):
        advantages.gae = partial(gae_with_zeros, times=20 if "x20" in arm else 1)
    try:
        yield
    finally:
        advantages.gae = before


def measure(out: Path, worlds: tuple[str, ...] = WORLDS, arms: tuple[str, ...] = tuple(ARMS), seeds: int = SEEDS) -> None:
    """Run what is not there yet; leaves WORLD.json, and prints a table."""
    make_tiny.main(make_tiny.TinyJob(str(out / "tiny"), worlds=",".join(worlds)))
    for world in worlds:
        path = out / f"{world}.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        for seed in range(seeds):
            for arm in arms:
                if arm == "no tool" and world != "calculator":
                    continue
                if str(seed) not in found.setdefault(arm, {}):
                    found[arm][str(seed)] = run(out, world, arm, seed)
                    write_json(path, found)
        print(world)
        for line in table(found):
            print(line)


def run(out: Path, world: str, arm: str, seed: int, **more: Any) -> dict[str, Any]:
    """Success before and after, at temperature 1, and of each step's rollouts; the process's own seconds and the wall's."""
    flags = {"run.dir": "run", "run.overwrite": True, "run.seed": seed, "sampling.seed": seed, "ppo.samples": 0}
    words = [word for name, value in (flags | ARMS[arm] | more).items() for word in (f"--{name}", str(value))]
    with contextlib.chdir(out), credit_of(arm):  # the paths of the settings begin there
        job = read(train_ppo.PPOJob, ["--config", f"steerl:{world}", *words])
        began = time.perf_counter(), time.process_time()
        train_ppo.main(job)
    wall, own = time.perf_counter() - began[0], time.process_time() - began[1]
    folder = out / "run"
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rewards = [json.loads(line)["reward/mean"] for line in lines]
    ends = {when: summary[f"reward_{when}"] for when in ("before", "after")}
    return {**ends, "rewards": rewards, "seconds": own, "wall": wall}


def table(found: dict[str, Any]) -> list[str]:
    """Markdown: means over the seeds, and the worst."""
    lines = ["| arm | before | after | worst | mean of all steps | steps to 0.9 | seconds |", "|---|---|---|---|---|---|---|"]
    for arm, runs in found.items():
        each = list(runs.values())
        after = [one["after"] for one in each]
        reached = [next((i for i, r in enumerate(one["rewards"], 1) if r >= GOAL), None) for one in each]
        steps = " ".join("never" if step is None else str(step) for step in sorted(reached, key=lambda step: step or 10**6))
        numbers = [statistics.mean(one["before"] for one in each), statistics.mean(after), min(after)]
        numbers.append(statistics.mean(statistics.mean(one["rewards"]) for one in each))
        seconds = statistics.mean(one["seconds"] for one in each)
        lines.append(f"| {arm} | " + " | ".join(f"{number:.2f}" for number in numbers) + f" | {steps} | {seconds:.0f} |")
    return lines
