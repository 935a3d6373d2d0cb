"""The headline by hand (`make proofs`): plain PPO never finds the suppressed style, annealed steering leaves it in a plain model."""

from __future__ import annotations

import json
from pathlib import Path

from steerl.configs.reader import read

import pytest

from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.model.policy import ModelSettings, load_policy
from steerl.rollout.prompts.prompts import PromptSettings, load_prompts
from steerl.scripts import study
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
def test_annealed_steering_finds_what_plain_ppo_does_not(tiny_world, tmp_path: Path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "suppressed").symlink_to(tiny_world("suppressed"))
    monkeypatch.chdir(tmp_path)
    arms = ["plain", "plain-entropy", "policy"]
    flags = ["--run.dir", "runs", "--study.only", json.dumps(arms), "--study.seeds", "5", "--study.first_seed", "0"]
    study.main(read(study.StudyJob, ["--config", "steerl:studies/suppressed", *flags]))
    results = json.loads((tmp_path / "runs" / "results.json").read_text())["results"]
    assert list(results) == arms
    for arm in arms:
        for run in results[arm]:
            assert run["reward"] > 0.8 if arm == "policy" else run["reward"] < 0.05, (arm, run["seed"], run["reward"])
