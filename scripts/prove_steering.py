"""The headline experiment of steered PPO.

    steerl prove --run.dir runs/suppressed

On `suppressed` (make_tiny.py) the policy knows a style that earns the reward and never shows it. Arms, each in every seed
with the same samples and PPO settings: plain PPO (and a sweep of it), role policy with its strength annealed to 0, role
trainable, role behaviour with every correction. A run that is there already is left as it is, so the command may be
stopped and given again.

    run_arm ── PPO as train_ppo.py does it ──> RUN/<arm>-<seed>/
    measure ── its model, loaded afresh, 512 samples of held-out prompts ──> RUN/<arm>-<seed>/final.json
    outcome ── both read ──> RUN/table.md, RUN/results.json, RUN/curves.png
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from steerl.configs.reader import run_command

from steerl.reward.build import build_reward
from steerl.rollout.common import processes
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import RunSettings, versions, write_json, write_text
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model.policy import ModelSettings, load_policy
from steerl.rollout.prompts.prompts import Prompts, PromptSettings, load_prompts
from steerl.rollout.steering import Steering, load_spec
from steerl.rollout.steering.spec.spec import CORRECTIONS
from steerl.training.model.reference import Reference
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings

SETTINGS = PPOSettings(
    steps=60, rollouts_per_step=64, epochs=2, minibatches=2, micro_batch_size=64, learning_rate=1e-3, kl_coef=0.002,
    value="shared", whiten_advantages=False, eval_every=5, eval_prompts=64, samples=1,
)  # fmt: skip
SAMPLING = Sampling(max_new_tokens=9, batch_size=64)
FINAL = 512
"""Samples of the final measurement."""
REWARD = [{"name": "glad", "kind": "function", "function": "steerl.scripts.toy_tasks.suppressed:glad"}]
SWEEP: list[dict[str, Any]] = [
    {"learning_rate": rate, "entropy_coef": entropy, "whiten_advantages": whiten}
    for rate in (1e-3, 1e-2) for entropy in (0.003, 0.03) for whiten in (False, True)
]  # fmt: skip
"""All with an entropy bonus: without one the gradient of a reward that is always 0 is 0, and nothing moves at any rate."""


@dataclass(frozen=True)
class ProveJob:
    """Measure what steering does for exploration, beside plain PPO."""

    world: str = "tiny/suppressed"
    """The folder that make_tiny.py made."""
    seeds: int = 5
    """Of every arm; the sweep has its own number."""
    first_seed: int = 0
    """Settings are tried on other seeds than those that are reported."""
    sweep_seeds: int = 2
    """Seeds of each of the 8 settings of plain PPO's sweep; 0 = no sweep. The best one, if it earned anything, runs on all."""
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


def arms(job: ProveJob) -> list[Arm]:
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
    found.append(
        Arm("trainable-from-vector", {"role": "trainable", "sites": [site]}, replace(SETTINGS, learning_rate=1e-2), job.seeds)
    )
    for kind in CORRECTIONS[:5]:
        spec = {"role": "behaviour", "sites": [{**site, **fade}], "correction": {"type": kind, "high": 2.0}}
        found.append(Arm(f"behaviour-{kind}", spec, SETTINGS, job.seeds))
    if job.sweep_seeds:
        for changes in SWEEP:
            name = "plain-" + "-".join(f"{key.split('_')[0]}{value:g}" for key, value in changes.items())
            found.append(Arm(name, None, replace(SETTINGS, **changes), job.sweep_seeds))
    unknown = set(job.arms) - {arm.name for arm in found}
    if unknown:
        raise UserError(f"arms: unknown {sorted(unknown)[0]!r}; choose from {', '.join(arm.name for arm in found)}")
    return [arm for arm in found if not job.arms or arm.name in job.arms]


def loaded(job: ProveJob, model: str, prompts: str) -> tuple[Any, Prompts]:
    policy = load_policy(ModelSettings(path=model), processes.start().device)
    return policy, load_prompts(PromptSettings(path=f"{job.world}/{prompts}.jsonl"), policy, SAMPLING.max_new_tokens)


def run_arm(job: ProveJob, arm: Arm, seed: int, folder: Path) -> bool:
    """One PPO run, as `steerl ppo` does it; False where it was stopped on its way."""
    policy, prompts = loaded(job, f"{job.world}/base", "prompts")
    _, few = loaded(job, f"{job.world}/base", "heldout")
    rows = [few.table[row] for row in range(len(few))]
    # An evaluation takes one sample a prompt: the few held-out ones, many times.
    held = Prompts(rows * -(-SETTINGS.eval_prompts // len(rows)), few.column, policy, few.settings, few.most)
    summary = train(
        policy, prompts, build_reward(REWARD, policy=policy, device=policy.device), replace(SAMPLING, seed=seed), arm.settings,
        RunSettings(dir=str(folder), overwrite=True, seed=seed, keep=1),
        steering=load_spec(arm.steering) if arm.steering else None, heldout=held,
        config={"arm": arm.name, "ppo": asdict(arm.settings), "steering": arm.steering},
    )  # fmt: skip
    return bool(summary)


def measure(job: ProveJob, arm: Arm, seed: int, folder: Path) -> None:
    """The model that the run left, loaded as its users would, without steering (`trainable`: with what it trained)."""
    policy, held = loaded(job, str(folder / "model"), "heldout")
    spec = folder / "model" / "steering.yaml"
    if spec.exists() != arm.name.startswith("trainable"):
        raise UserError(
            f"{folder}: expected {'a' if arm.name.startswith('trainable') else 'no'} steering.yaml beside the model"
        )
    steering = Steering(policy.core, spec, policy.tokenizer) if spec.exists() else None
    settings = replace(SAMPLING, n=FINAL // len(held), batch_size=FINAL, seed=10_000 + seed)
    rollout, texts = Sampler(policy, settings, steering).sample(held.batch(list(range(len(held)))))
    base, _ = loaded(job, f"{job.world}/base", "heldout")
    kl_BR = rollout.policy_logprobs_BR - Reference(base, adapter_off=False).logprobs(rollout)
    total_B = build_reward(REWARD, policy=policy, device=policy.device)(rollout, texts).total_B
    found = {
        "reward": float(total_B.mean()),
        "kl": float(kl_BR[rollout.action_mask_BR].sum() / len(rollout)),
        "samples": len(rollout),
    }
    write_json(folder / "final.json", found | {"completions": texts.completions[:3]})


def outcome(folder: Path) -> dict[str, Any]:
    """Final reward and KL per response of what the run left, and the curves on the way there."""
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    examined = [step for step in steps if "eval/reward" in step]
    final = json.loads((folder / "final.json").read_text(encoding="utf-8"))
    return {
        "reward": final["reward"],
        "kl": final["kl"],
        "earned": round(sum(step["reward/mean"] * step["rollout/rows"] for step in steps)),
        "curve": [[step["step"], step["reward/mean"]] for step in steps],
        "eval_curve": [[step["step"], step["eval/reward"]] for step in examined],
        "kl_curve": [[step["step"], step["eval/kl"]] for step in examined],
        "ess": [step["correction/ess"] for step in steps if "correction/ess" in step],
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| arm | final reward without steering, by seed | above 0.8 | KL per response, nats | rollouts that earned it "
        "| effective samples of 64: first step, median |",
        "|---|---|---|---|---|---|",
    ]
    for arm, runs in results.items():
        rewards = " ".join(f"{run['reward']:.2f}" for run in runs)
        above = f"{sum(run['reward'] > 0.8 for run in runs)} of {len(runs)}"
        kept = " (with its vector)" if arm.startswith("trainable") else ""
        weighed = [run["ess"] for run in runs if run["ess"]]
        effective = f"{mean(ess[0] for ess in weighed):.1f}, {median(sum(weighed, [])):.1f}" if weighed else "-"
        earned = f"{mean(run['earned'] for run in runs):,.1f}".removesuffix(".0")
        kl = mean(run["kl"] for run in runs)
        lines.append(f"| {arm}{kept} | {rewards} | {above} | {kl:.1f} | {earned} | {effective} |")
    return "\n".join(lines) + "\n"


PANELS = {
    "curve": "reward of the rollouts, steered or not",
    "eval_curve": "reward without steering (trainable: with its vector)",
    "kl_curve": "its KL per response to the start, nats",
}


def plot(results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Above plain, policy and trainable, below the corrections of behaviour: the mean of the seeds, and each seed thinly."""
    try:
        import matplotlib
    except ImportError:
        print(f"{file.name}: not drawn, matplotlib is missing")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    named = [arm for arm in results if not arm.startswith("plain-")]
    rows = [[arm for arm in named if arm.startswith("behaviour") == below] for below in (False, True)]
    rows = [row for row in rows if row]
    if not rows:
        return  # a sweep alone
    figure, axes = pyplot.subplots(len(rows), 3, figsize=(13, 3.6 * len(rows)), dpi=100, squeeze=False)
    for shown, row in zip(axes, rows, strict=True):
        for axis, (key, title) in zip(shown, PANELS.items(), strict=True):
            for number, arm in enumerate(row):
                curves = [run[key] for run in results[arm]]
                for curve in curves:
                    axis.plot(*zip(*curve, strict=True), color=f"C{number}", alpha=0.4, lw=0.8)
                means = [mean(curve[at][1] for curve in curves) for at in range(len(curves[0]))]
                steps = [step for step, _ in curves[0]]
                axis.plot(steps, means, color=f"C{number}", lw=max(5.5 - 1.3 * number, 1.2), label=arm)  # none hides another
            axis.set_title(title, fontsize=10)
            axis.set_xlabel("PPO step")
            axis.spines[["top", "right"]].set_visible(False)
            if key != "kl_curve":
                axis.set_ylim(-0.03, 1.03)
        shown[0].legend(fontsize=8, frameon=False, loc="center right")
    figure.tight_layout()
    figure.savefig(file)


def run_all(job: ProveJob, chosen: list[Arm], folder: Path) -> dict[str, list[dict[str, Any]]] | None:
    """Every arm in every seed; None where it was told to stop: what is done is there for the next time."""
    results: dict[str, list[dict[str, object]]] = {}
    for arm in chosen:
        for seed in range(job.first_seed, job.first_seed + arm.seeds):
            place = folder / f"{arm.name}-{seed}"
            if not (place / "summary.json").exists() and not run_arm(job, arm, seed, place):
                return None
            if not (place / "final.json").exists():
                measure(job, arm, seed, place)
            results.setdefault(arm.name, []).append(outcome(place))
            print(f"{arm.name} seed {seed}: {results[arm.name][-1]['reward']:.3f}", flush=True)
    return results


def main(job: ProveJob) -> None:
    if not job.run.dir:
        raise UserError("run.dir: missing; say where the runs are to be written, --run.dir DIR")
    if not (Path(job.world) / "base").exists():
        raise UserError(f"world: {job.world} is not there; make it: steerl tiny --out tiny --worlds suppressed")
    folder = Path(job.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    chosen = arms(job)
    results = run_all(job, chosen, folder)
    if results is None:
        return
    swept = {arm.name: mean(run["reward"] for run in results[arm.name]) for arm in chosen if arm.name.startswith("plain-")}
    best = max(swept, key=lambda name: swept[name], default=None)
    if best is not None and swept[best] > 0:
        again = run_all(job, [replace(arm, seeds=job.seeds) for arm in chosen if arm.name == best], folder)
        if again is None:
            return
        results |= again
    write_text(folder / "table.md", table(results))
    write_json(folder / "results.json", {"results": results, "settings": asdict(SETTINGS), "versions": versions()})
    plot(results, folder / "curves.png")
    print(table(results))


def cli() -> None:
    run_command(main, ProveJob)


if __name__ == "__main__":
    cli()
