"""The headline of steered PPO, in one command: python scripts/prove_steering.py --run.dir runs/suppressed

On `suppressed` (make_tiny.py) the policy knows a style that earns the reward and never shows it. Arms, each in every seed
with the same samples and PPO settings: plain PPO (and a sweep of it), role policy with its strength annealed to 0, role
trainable, role behaviour with every correction. A run is left out when its summary.json is there already.

Leaves RUN/<arm>-<seed>/ (a PPO run each), RUN/table.md, RUN/results.json and RUN/curves.png.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from configs.reader import door
from reward.base import build_reward
from rollout import processes
from rollout.errors import Problem
from rollout.policy import ModelSettings, load_policy
from rollout.prompts import PromptSettings, load_prompts
from rollout.run import RunSettings, versions, write_json, write_text
from rollout.sampling import Sampling
from rollout.steering import load_spec
from rollout.steering.spec import CORRECTIONS
from training.ppo import PPOSettings, train

SETTINGS = PPOSettings(
    steps=60, rollouts_per_step=64, epochs=4, minibatches=2, micro_batch_size=64, learning_rate=1e-3, kl_coef=0.002,
    value="shared", whiten_advantages=False, eval_prompts=64, samples=1,
)  # fmt: skip
SAMPLING = Sampling(max_new_tokens=9, batch_size=64)
REWARD = [{"name": "glad", "kind": "function", "function": "scripts/worlds/suppressed.py:glad"}]
SWEEP: list[dict[str, Any]] = [
    {"learning_rate": rate, "entropy_coef": entropy} for rate in (3e-4, 1e-3, 3e-3, 1e-2) for entropy in (0.0, 0.01)
]  # fmt: skip


@dataclass(frozen=True)
class Job:
    """Measure what steering does for exploration, beside plain PPO."""

    world: str = "tiny/suppressed"
    """The folder that make_tiny.py made."""
    seeds: int = 5
    sweep_seeds: int = 2
    """Seeds of each of the 8 settings of plain PPO's sweep; 0 = no sweep."""
    arms: list[str] = field(default_factory=list)
    """Only these (plain, policy, trainable, behaviour-token_truncate, ...); empty = all."""
    strength: float = 0.3
    """Steering strength at the start."""
    run: RunSettings = field(default_factory=RunSettings)


@dataclass(frozen=True)
class Arm:
    name: str
    steering: dict[str, Any] | None
    settings: PPOSettings
    seeds: int


def arms(job: Job) -> list[Arm]:
    site = {
        "name": "cheer",
        "at": {"layers": [1]},
        "vector": {"file": f"{job.world}/cheer.safetensors"},
        "strength": job.strength,
    }
    fade = {"schedule": {"type": "linear", "from": 1.0, "to": 0.0, "until": 0.7}}
    found = [Arm("plain", None, SETTINGS, job.seeds)]
    found.append(Arm("policy", {"role": "policy", "sites": [{**site, **fade}], "on_deploy": "strip"}, SETTINGS, job.seeds))
    learned = {**site, "vector": {"init": "zeros"}, "strength": 1.0}
    found.append(Arm("trainable", {"role": "trainable", "sites": [learned]}, replace(SETTINGS, learning_rate=1e-2), job.seeds))
    warm = {**site, "strength": job.strength}
    found.append(
        Arm("trainable-from-vector", {"role": "trainable", "sites": [warm]}, replace(SETTINGS, learning_rate=1e-2), job.seeds)
    )
    for kind in CORRECTIONS:
        spec = {"role": "behaviour", "sites": [{**site, **fade}], "correction": {"type": kind, "high": 2.0}}
        found.append(Arm(f"behaviour-{kind}", spec, SETTINGS, job.seeds))
    if job.sweep_seeds:
        for changes in SWEEP:
            name = "plain-" + "-".join(f"{key.split('_')[0]}{value:g}" for key, value in changes.items())
            found.append(Arm(name, None, replace(SETTINGS, **changes), job.sweep_seeds))
    unknown = set(job.arms) - {arm.name for arm in found}
    if unknown:
        raise Problem(f"arms: unknown {sorted(unknown)[0]!r}; choose from {', '.join(arm.name for arm in found)}")
    return [arm for arm in found if not job.arms or arm.name in job.arms]


def run_arm(job: Job, arm: Arm, seed: int, folder: Path) -> bool:
    """One PPO run, as scripts/train_ppo.py does it; False where it was stopped on its way."""
    policy = load_policy(ModelSettings(path=f"{job.world}/base"), processes.start().device)
    prompts, held = (
        load_prompts(PromptSettings(path=f"{job.world}/{name}.jsonl"), policy, SAMPLING.max_new_tokens)
        for name in ("prompts", "heldout")
    )
    summary = train(
        policy, prompts, build_reward(REWARD, policy=policy, device=policy.device), replace(SAMPLING, seed=seed), arm.settings,
        RunSettings(dir=str(folder), overwrite=True, seed=seed, keep=1),
        steering=load_spec(arm.steering) if arm.steering else None, heldout=held,
        config={"arm": arm.name, "ppo": asdict(arm.settings), "steering": arm.steering},
    )  # fmt: skip
    return bool(summary)


def outcome(folder: Path) -> dict[str, Any]:
    """Final reward (without steering, but for trained vectors), KL per response, and the curves."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {
        "reward": summary["reward_after"],
        "kl": mean(step["kl/ref"] for step in steps[-5:]),
        "kl_largest": max(step["kl/ref"] for step in steps),
        "curve": [step["reward/mean"] for step in steps],
        "kl_curve": [step["kl/ref"] for step in steps],
        "ess": [step["correction/ess"] for step in steps if "correction/ess" in step],
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| arm | final reward without steering, by seed | above 0.8 | KL per response, end | largest |",
        "|---|---|---|---|---|",
    ]
    for arm, runs in results.items():
        rewards = " ".join(f"{run['reward']:.2f}" for run in runs)
        above = f"{sum(run['reward'] > 0.8 for run in runs)} of {len(runs)}"
        kept = " (with its vector)" if arm.startswith("trainable") else ""
        lines.append(
            f"| {arm}{kept} | {rewards} | {above} | {mean(r['kl'] for r in runs):.1f} | "
            f"{max(r['kl_largest'] for r in runs):.1f} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    try:
        import matplotlib
    except ImportError:
        print("curves.png: not drawn, matplotlib is missing")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), dpi=110)
    for number, (arm, runs) in enumerate((a, r) for a, r in results.items() if not a.startswith("plain-")):
        for seed, run in enumerate(runs):
            for axis, curve in zip(axes, ("curve", "kl_curve"), strict=True):
                axis.plot(
                    range(1, len(run[curve]) + 1),
                    run[curve],
                    color=f"C{number}",
                    alpha=0.75,
                    lw=1.2,
                    label=arm if seed == 0 else None,
                )
    for axis, name in zip(
        axes, ("reward of the rollouts (steered while its strength lasts)", "KL per response to the start, nats"), strict=True
    ):
        axis.set_xlabel("PPO step")
        axis.set_title(name, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(file)


def main(job: Job) -> None:
    if not job.run.dir:
        raise Problem("run.dir: missing; say where the runs are to be written, --run.dir DIR")
    if not (Path(job.world) / "base").exists():
        raise Problem(f"world: {job.world} is not there; make it: python scripts/make_tiny.py --out tiny --worlds suppressed")
    folder = Path(job.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for arm in arms(job):
        for seed in range(arm.seeds):
            place = folder / f"{arm.name}-{seed}"
            if not (place / "summary.json").exists() and not run_arm(job, arm, seed, place):
                return  # told to stop: what is done is there for the next time
            results.setdefault(arm.name, []).append(outcome(place))
            print(f"{arm.name} seed {seed}: {results[arm.name][-1]['reward']:.3f}", flush=True)
    write_text(folder / "table.md", table(results))
    write_json(folder / "results.json", {"results": results, "settings": asdict(SETTINGS), "versions": versions()})
    plot(results, folder / "curves.png")
    print(table(results))


if __name__ == "__main__":
    door(main, Job)
