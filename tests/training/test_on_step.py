"""train(..., on_step=...): what the hook is told, and a run that it ends."""

from __future__ import annotations

import json

import pytest
import transformers

from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings
from tests.models import tiny_policy
from tests.ppo_runs import prompts_of, share_of_threes

PPO = {"rollouts_per_step": 8, "minibatches": 2, "epochs": 1, "learning_rate": 1e-3, "eval_prompts": 4, "schedule": "linear"}


def run(folder, on_step=None, steps=4, **settings):
    policy, sampling = tiny_policy("gpt2"), Sampling(max_new_tokens=6, stop_ids=[11, 17])
    where = RunSettings(dir=str(folder), save_every=3, **settings)
    return train(policy, prompts_of(policy), share_of_threes, sampling, PPOSettings(steps=steps, **PPO), where, on_step=on_step)


def told(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_the_hook_is_told_what_the_files_hold_and_can_change_nothing(tmp_path):
    seen = []

    def spoil(step, metrics, samples):
        seen.append((step, json.loads(json.dumps(metrics)), json.loads(json.dumps(samples))))
        metrics.clear(), samples[0].clear(), samples.clear()

    whole, hooked = tmp_path / "whole", tmp_path / "hooked"
    run(whole), run(hooked, spoil)
    assert [step for step, _, _ in seen] == [1, 2, 3, 4]
    assert [metrics for _, metrics, _ in seen] == told(hooked, "metrics.jsonl")
    assert [row for _, _, rows in seen for row in rows] == told(hooked, "samples.jsonl")
    assert (hooked / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert (hooked / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_a_run_that_the_hook_ends_is_whole_and_finished(tmp_path):
    summary = run(tmp_path / "run", lambda step, metrics, samples: step == 2)
    assert summary["steps"] == 2 and summary["ended_of"] == 4 and summary["reward_after"] is not None
    assert [row["step"] for row in told(tmp_path / "run", "metrics.jsonl")] == [1, 2]
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "run/model").config.vocab_size
    assert (tmp_path / "run/report.html").is_file()
    # a resume has nothing to do, with or without the hook
    assert run(tmp_path / "run", resume=True) == summary
    assert len(told(tmp_path / "run", "metrics.jsonl")) == 2


def test_an_error_of_the_hook_is_the_programs_own(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run(tmp_path / "run", lambda step, metrics, samples: None if step < 4 else 1 / 0)
    assert [row["step"] for row in told(tmp_path / "run", "metrics.jsonl")] == [1, 2, 3, 4]
    again = run(tmp_path / "run", resume=True)
    assert again["steps"] == 4 and "ended_of" not in again
