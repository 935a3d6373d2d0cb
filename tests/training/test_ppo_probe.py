"""Whole runs with a probe among the rewards: screened, resumed in the middle, on episodes, looked at by a plan."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steerl.reward.build import build_reward
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.steering.vectors.files import save_vector
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings
from tests.models import tiny_policy
from tests.ppo_runs import prompts_of

PPO = PPOSettings(
    steps=4,
    rollouts_per_step=8,
    epochs=1,
    minibatches=2,
    micro_batch_size=4,
    learning_rate=1e-3,
    eval_prompts=4,
    samples=1,
    value="shared",
)
LENGTH = {"kind": "length", "min": 2, "max": 5, "unit": "tokens"}


@pytest.fixture
def probe(tmp_path: Path) -> str:
    reading = {"1": {"slope": 1.0, "bias": 0.0, "threshold": 0.0}}
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    notes = {"probe": reading, "component": "block_output", "stack": "decoder", "position": "mean"}
    return str(save_vector(tmp_path / "probe.safetensors", {1: vector}, notes))


def run(folder: Path, parts: list, ppo: PPOSettings = PPO, **settings: object) -> list[dict]:
    policy = tiny_policy("llama")
    sampling = Sampling(max_new_tokens=6, stop_ids=[11, 17, 23])
    train(policy, prompts_of(policy), build_reward(parts, policy), sampling, ppo, RunSettings(dir=str(folder), **settings))
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_screened_rows_are_told_and_a_run_resumes_to_the_bit(probe, tmp_path):
    parts = [LENGTH, {"kind": "probe", "probe": probe, "screen": True}, {"kind": "novelty", "history": "run", "dimensions": 4}]
    whole = run(tmp_path / "whole", parts)
    shares = [step["reward/screened"] for step in whole]
    assert any(0 < share < 1 for share in shares)
    assert shares == [step["reward/probe.above"] for step in whole]
    samples = [json.loads(line) for line in (tmp_path / "whole" / "samples.jsonl").read_text().splitlines()]
    flagged = [row for row in samples if row["parts"]["probe.above"]]
    assert flagged and all(not any(a or 0 for a in row["advantages"]) for row in flagged)
    run(tmp_path / "halves", parts, replace(PPO, steps=2), save_every=2)
    again = run(tmp_path / "halves", parts, resume=True, allow_changes=True)
    assert [step["reward/mean"] for step in again] == [step["reward/mean"] for step in whole]
    assert [step["reward/novelty"] for step in again] == [step["reward/novelty"] for step in whole]
    assert [step["reward/probe"] for step in again] == [step["reward/probe"] for step in whole]


def test_a_run_of_screened_rows_alone_leaves_the_model_as_it_was(probe, tmp_path):
    steps = run(tmp_path / "all", [LENGTH, {"kind": "probe", "probe": probe, "screen": True, "above": -1e9}])
    assert [step["reward/screened"] for step in steps] == [1.0] * 4
    assert all(step["ppo/optimizer_steps"] == 0 and step["kl/ref"] == 0 for step in steps)
    from transformers import AutoModelForCausalLM

    left = AutoModelForCausalLM.from_pretrained(tmp_path / "all" / "model").state_dict()
    assert all(torch.equal(weight, left[name]) for name, weight in tiny_policy("llama").model.state_dict().items())
