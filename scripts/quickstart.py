"""The first thing to run: make the embedded default, teach a policy and a reward model, train with PPO, show what changed.

    steerl tiny ──> tiny/reviews/{base, sft.jsonl, preferences.jsonl, prompts.jsonl, heldout.jsonl}
                     │ steerl sft        ──> sft/       the policy answers a prompt and stops
                     │ steerl reward     ──> reward/    a review's kindness, between 0 and 1
                     └ steerl ppo        ──> ppo/       the policy writes kind reviews; curves.png, before/after table

Each stage is a command that is shown, and that can be run again by itself. No network; some minutes on two cores.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerl.configs.reader import run_command

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import versions, write_json
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.model.settings import ModelSettings
from steerl.rollout.prompts.prompts import PromptSettings, load_prompts

ROOT = Path(__file__).resolve().parents[1]
"""The rooms: a checkout, or the installed package."""


@dataclass(frozen=True)
class QuickstartJob:
    """Make the embedded default, run every stage on it, and show what PPO changed."""

    out: str = "runs/quickstart"
    """Where everything is written. A stage that is there already, made by the same code and command, is kept."""
    seed: int = 0
    """Of the stages and of the sampling."""
    steps: int | None = None
    """Steps of PPO; unset = as configs/quickstart.yaml says."""
    samples: int = 3
    """Reviews to show from before and after."""


def main(job: QuickstartJob) -> None:
    began = time.perf_counter()
    out = Path(job.out)
    world = out / "tiny" / "reviews"
    stage(None, "tiny", "--out", str(out / "tiny"), "--worlds", "reviews")
    stage(
        out / "sft", "sft", "--config", "steerl:sft", "--model.path", str(world / "base"),
        "--prompts.path", str(world / "sft.jsonl"), *fresh(out / "sft", job.seed),
    )  # fmt: skip
    stage(
        out / "reward", "reward", "--config", "steerl:reward", "--model.path", str(out / "sft" / "model"),
        "--prompts.path", str(world / "preferences.jsonl"), *fresh(out / "reward", job.seed),
    )  # fmt: skip
    reward = [{"name": "kindness", "kind": "model", "path": str(out / "reward" / "model"), "output": "probability"}]
    stage(
        out / "ppo", "ppo", "--config", "steerl:quickstart", "--model.path", str(out / "sft" / "model"),
        "--prompts.path", str(world / "prompts.jsonl"), "--heldout.path", str(world / "heldout.jsonl"),
        "--reward", json.dumps(reward), "--sampling.seed", str(job.seed), *fresh(out / "ppo", job.seed),
        *([] if job.steps is None else ["--ppo.steps", str(job.steps)]),
    )  # fmt: skip
    draw(out / "ppo")
    show(out, world, job)
    print(f"\n{time.perf_counter() - began:.0f} s in all; {out / 'ppo' / 'curves.png'} has the curves")


def fresh(folder: Path, seed: int) -> list[str]:
    return ["--run.dir", str(folder), "--run.overwrite", "true", "--run.seed", str(seed)]


def stage(folder: Path | None, command: str, *arguments: str) -> None:
    """Run a command as its own process, and show it; not again what is there already."""
    print(f"\n$ steerl {shlex.join([command, *arguments])}", flush=True)
    made_by: dict[str, Any] = {"command": command, "arguments": list(arguments), "code": code_hash(), "versions": versions()}
    del made_by["versions"]["git"]  # the commit alone changes nothing
    note = folder.parent / f".{folder.name}.made.json" if folder is not None else None
    if folder is not None and note is not None:
        if note.exists() and (folder / "summary.json").exists() and json.loads(note.read_text(encoding="utf-8")) == made_by:
            print(f"{folder}: there already")
            return
        note.unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-P", "-m", "steerl", command, *arguments])
    if done.returncode:
        raise UserError(f"quickstart: steerl {command} ended with status {done.returncode}; its message stands above")
    if note is not None:
        write_json(note, made_by)


@functools.cache
def code_hash() -> str:
    """Of all that a stage's outcome may depend on here."""
    found = hashlib.sha256()
    for room in ("rollout", "reward", "training", "configs", "scripts"):
        for path in sorted([*(ROOT / room).rglob("*.py"), *(ROOT / room).rglob("*.yaml")]):
            found.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return found.hexdigest()


def draw(run: Path) -> None:
    """runs/quickstart/ppo/curves.png: reward, and KL per response, by step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    steps = [row["step"] for row in rows]
    left.plot(steps, [row["reward/mean"] for row in rows], label="training")
    held = [(row["step"], row["eval/reward"]) for row in rows if "eval/reward" in row]
    before = json.loads((run / "summary.json").read_text(encoding="utf-8"))["reward_before"]
    left.plot(*zip((0, before), *held, strict=True), "o", label="held out")
    left.set(xlabel="step", ylabel="reward", ylim=(0, 1), title="reward")
    left.legend(loc="lower right")
    right.plot(steps, [row["kl/ref"] for row in rows], color="tab:red")
    right.set(xlabel="step", ylabel="nats", title="KL per response, to the policy before PPO")
    for axis in (left, right):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(run / "curves.png", dpi=120)
    pyplot.close(figure)


def show(out: Path, world: Path, job: QuickstartJob) -> None:
    """The table, and the same prompts answered by both policies with the same random numbers."""
    from steerl.scripts.toy_tasks.reviews import kindness

    summary = json.loads((out / "ppo" / "summary.json").read_text(encoding="utf-8"))
    said = {"before": complete(out / "sft" / "model", world, job), "after": complete(out / "ppo" / "model", world, job)}
    truth = {name: sum(kindness(text) for _, text in rows) / len(rows) for name, rows in said.items()}
    print("\n                                before     after")
    print(f"mean reward                    {summary['reward_before']:7.3f}   {summary['reward_after']:7.3f}")
    print(f"share of kind words            {truth['before']:7.3f}   {truth['after']:7.3f}")
    print(f"KL per response, in nats       {0:7.3f}   {summary['kl_after']:7.3f}")
    for name, rows in said.items():
        print(f"\n{name}")
        for prompt, text in rows[: job.samples]:
            print("  " + textwrap.shorten(prompt + text, 118, placeholder=" ..."))


def complete(model: Path, world: Path, job: QuickstartJob) -> list[tuple[str, str]]:
    """(prompt, completion) of the held-out prompts."""
    import torch

    from steerl.rollout.engines.sampler import Sampler
    from steerl.rollout.model.policy import load_policy

    policy = load_policy(ModelSettings(path=str(model)))
    sampling = Sampling(max_new_tokens=48, seed=job.seed)
    prompts = load_prompts(PromptSettings(path=str(world / "heldout.jsonl")), policy, sampling.max_new_tokens)
    with torch.no_grad():
        _, texts = Sampler(policy, sampling).sample(prompts.batch(range(len(prompts))))
    return list(zip(texts.prompts, texts.completions, strict=True))


def cli() -> None:
    run_command(main, QuickstartJob)


if __name__ == "__main__":
    cli()
