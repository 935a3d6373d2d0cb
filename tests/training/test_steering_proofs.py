"""The headline by hand (`make proofs`): plain PPO never finds the suppressed style, annealed steering leaves it in a plain model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model.policy import ModelSettings, load_policy
from steerl.rollout.prompts.prompts import PromptSettings, load_prompts
from steerl.scripts import prove_steering
from steerl.scripts.toy_tasks.suppressed import glad


@pytest.mark.proofs
def test_the_policy_never_earns_the_reward_by_itself(tiny_world):
    world = tiny_world("suppressed")
    policy = load_policy(ModelSettings(path=str(world / "base")))
    prompts = load_prompts(PromptSettings(path=str(world / "prompts.jsonl")), policy, 9)
    settings = Sampling(n=6250, max_new_tokens=9, batch_size=2000, seed=11)
    _, texts = Sampler(policy, settings).sample(prompts.batch(list(range(16))))
    assert len(texts) == 100_000 and sum(glad(texts.prompts, texts.completions)) == 0


@pytest.mark.proofs
def test_annealed_steering_finds_what_plain_ppo_does_not(tiny_world, tmp_path: Path):
    world = tiny_world("suppressed")
    job = prove_steering.ProveJob(world=str(world), run=RunSettings(dir=str(tmp_path / "runs")))
    names = [arm.name for arm in prove_steering.arms(job) if arm.name.startswith(("plain", "policy"))]
    job = replace(job, arms=names)
    prove_steering.main(job)
    for arm in prove_steering.arms(job):
        for seed in range(arm.seeds):
            final = prove_steering.outcome(tmp_path / "runs" / f"{arm.name}-{seed}")["reward"]
            assert final > 0.8 if arm.name == "policy" else final < 0.05, (arm.name, seed, final)
