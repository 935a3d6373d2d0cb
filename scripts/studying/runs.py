"""The runs of a study: those that nobody holds are run here, and the model that each left is measured.

run ── train_ppo ──> RUN/<arm>-<seed>/ ── its model, loaded as users would ──> final.json
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from steerl.configs.reader import to_mapping

import torch

from steerl.reward.build import build_reward
from steerl.rollout.common import processes
from steerl.rollout.common.errors import Broken, Stopped, UserError
from steerl.rollout.common.run_folder import Held, holding, write_json
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.environments.environment import environment_of
from steerl.rollout.environments.sampler import EpisodeSampler
from steerl.rollout.model.policy import load_policy
from steerl.rollout.prompts.prompts import load_prompts
from steerl.rollout.steering import Steering
from steerl.rollout.types import Samples
from steerl.scripts import train_ppo
from steerl.scripts.studying.plan import FinalSettings, Run
from steerl.training.model.reference import Reference

FINAL, HELD = "final.json", ".held"
FINAL_SEED = 10_000
"""Added to a run's seed for the answers that are measured in the end."""
PAUSE = 1.0
"""Seconds between two looks at runs that other processes hold."""


def run_all(runs: Sequence[Run], final: FinalSettings, folder: Path, stop: processes.Stop) -> None:
    """Until all are there: those that nobody holds are run, others waited for (their process may end before it is done)."""
    waiting, told = [run for run in runs if finished(run, final) is None], False
    while waiting:
        for run in waiting:
            if stop.here():
                raise Stopped(f"stopped with {len(waiting)} runs to go; the same command goes on")
            name = str(run.folder.relative_to(folder))
            with contextlib.suppress(Held), holding(folder / HELD / name.replace("/", "-")):
                if finished(run, final) is None:
                    run_one(run, final, name)
        if waiting := [run for run in waiting if finished(run, final) is None]:
            if not told:
                print(f"waiting for {len(waiting)} runs that another process holds", flush=True)
            told = True
            time.sleep(PAUSE)
    with contextlib.suppress(OSError):
        (folder / HELD).rmdir()


def finished(run: Run, final: FinalSettings) -> dict[str, Any] | None:
    """What was measured on a run's model, if it was, and as it is asked for now."""
    path = run.folder / FINAL
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found if found.get("asked") == asked(final) else None


def asked(final: FinalSettings) -> dict[str, object]:
    return {"prompts": final.prompts, "samples": final.samples, "measures": final.measures}


def run_one(run: Run, final: FinalSettings, name: str) -> None:
    print(f"{name} ...", file=sys.stderr, flush=True)
    fresh_peaks()
    config = to_mapping(run.job)
    del config["dry_run"]
    try:
        train_ppo.run(run.job, config)
    except Stopped as stopped:
        raise Stopped(f"{name}: {str(stopped).partition(';')[0]}; the same command goes on with the study") from stopped
    except Held:
        raise
    except Broken as problem:
        found: dict[str, Any] = {"broken": problem.lines[0], "asked": asked(final)}
    except UserError as problem:
        raise UserError(*(f"{name}: {line}" for line in problem.lines)) from problem
    else:
        found = measure(run, final)
    write_json(run.folder / FINAL, found)
    print(f"{name}: {found.get('broken') or 'reward {reward:.3f}, KL {kl:.2f}'.format(**found)}", flush=True)
    gc.collect()  # models in circles


def fresh_peaks() -> None:
    """Peaks of memory are of this run alone, where the system lets them be set back."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def measure(run: Run, final: FinalSettings) -> dict[str, Any]:
    """The model that the run left, with steering.yaml where it left one: reward and measures of its answers, and their KL to
    the model that the run began with."""
    job, device, left = run.job, processes.start().device, run.folder / "model"
    policy = load_policy(replace(job.model, path=str(left), adapter="", tokenizer="", peft=None, revision=""), device)
    spec = left / "steering.yaml"
    steering = Steering(policy.core, spec, policy.tokenizer) if spec.exists() else None
    with torch.no_grad(), environment_of(job.environment, policy) as played:
        held = job.heldout if job.heldout.path else job.prompts
        new = job.environment.response(job.sampling.max_new_tokens)
        prompts = load_prompts(replace(held, path=final.prompts or held.path), policy, new)
        rows = prompts.first(final.samples)
        sampling = replace(job.sampling, n=-(-final.samples // len(rows)), seed=FINAL_SEED + run.seed)
        sampler = Sampler(policy, sampling, steering)
        samples = (sampler if played is None else EpisodeSampler(sampler, played)).sample(prompts.batch(rows))
    scored = {name: scores(terms, samples, policy) for name, terms in final.measures.items()}
    start = load_policy(train_ppo.learnable(replace(job.model, peft=None)), device)
    kl_BR = samples.rollout.policy_logprobs_BR - Reference(start, adapter_off=False).logprobs(samples.rollout)
    return {
        **scores(job.reward, samples, policy),
        "measures": {name: found["reward"] for name, found in scored.items()},
        "kl": float(kl_BR[samples.rollout.action_mask_BR].sum() / len(samples.rollout)),
        "length": float(samples.rollout.actions_B.double().mean()),
        "samples": len(samples.rollout),
        "completions": samples.texts.completions[:3],
        "asked": asked(final),
    }


def scores(terms: Sequence[dict[str, object]], samples: Samples, policy: Any) -> dict[str, Any]:
    """Mean reward of a list of terms, and of each of its parts."""
    with contextlib.closing(build_reward(terms, policy=policy, device=policy.device)) as reward:
        found = reward.still()(*samples)
    parts = {name: float(values.double().nanmean()) for name, values in found.parts.items()}
    return {"reward": float(found.total_B.double().mean()), "parts": parts}
