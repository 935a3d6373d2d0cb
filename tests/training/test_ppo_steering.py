"""Steered PPO: the first ratio, the reference, what is trained and what is weighed, for every role."""

from __future__ import annotations

import json

from steerl.configs.reader import run_command

import pytest
import torch

from steerl.rollout.common.errors import UserError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.steering import load_spec
from steerl.scripts import train_ppo
from steerl.training.algorithm.experience import credit
from steerl.training.algorithm.update import learn
from steerl.training.model.reference import Reference
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings, with_correction
from tests.models import tiny_policy
from tests.ppo_runs import LORA, first_scored, job, prompts_of, share_of_threes


def spec(role: str, **more):
    op = {"op": {"type": "loreft", "rank": 2}} if role == "trainable" else {"op": {"type": "noise"}, "strength": 0.6}
    return load_spec({"role": role, "sites": [{"name": "here", "at": {"layers": [1]}, **op}], **more})


CASES = [
    ("policy", "llama", None, {}),
    ("policy", "gpt2", LORA, {"fraction": 0.5}),
    ("policy", "t5", None, {}),
    ("trainable", "gpt2", None, {}),
    ("trainable", "bart", None, {}),
    ("behaviour", "llama", None, {"correction": {"type": "token_truncate"}}),
    ("behaviour", "t5", LORA, {"correction": {"type": "sequence_mask", "high": 5.0}}),
]


@pytest.mark.parametrize("role, family, peft, more", CASES, ids=[f"{r}-{f}-{i}" for i, (r, f, _, _) in enumerate(CASES)])
def test_the_first_ratio_is_one_and_the_reference_is_plain(role, family, peft, more):
    steering = spec(role, **more)
    parts, prompts, ppo = job(family, peft, steering=steering, sampling={"n": 4}, learning_rate=0.0, value_learning_rate=1e-3)
    plain = tiny_policy(family)
    scored = first_scored(parts, prompts, ppo)
    rollout = scored.rollout
    reference = Reference(plain, adapter_off=False).logprobs(rollout)
    assert torch.allclose(scored.reference_logprobs_BR, reference, atol=1e-5)
    assert (rollout.policy_logprobs_BR - scored.old_logprobs_BR).abs().max() < 1e-5  # sampler and trainer mean one law
    steered = (rollout.behaviour_logprobs_BR - reference).abs().amax(1) > 1e-3
    assert steered.any() == (role != "trainable")  # fresh learned vectors change nothing yet
    if more.get("fraction"):
        assert not steered.all()
    experience, metrics = credit(scored, with_correction(ppo, steering), 0.1)
    assert ("correction/ess" in metrics) == (role == "behaviour") == (experience.importance_BR is not None)
    stats = learn(parts.state, experience, ppo, seed=0)
    assert stats.ratio_first_error < 1e-5 and stats.clip_fraction == 0


def test_trainable_trains_the_vectors_alone_and_the_reference_is_no_copy():
    parts, prompts, ppo = job("gpt2", steering=spec("trainable"), learning_rate=1e-2)
    assert parts.reference.policy is parts.policy
    before = {name: p.clone() for name, p in parts.actor_critic.named_parameters()}
    learn(parts.state, credit(first_scored(parts, prompts, ppo), ppo, 0.1)[0], ppo, seed=0)
    changed = {name.split(".")[0] for name, p in parts.actor_critic.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {"vectors", "critic", "head"}


def test_a_schedule_follows_the_steps(tmp_path):
    schedule = {"over": "train_steps", "type": "linear", "from": 1.0, "to": 0.0, "until": 0.5}
    sites = [{"at": {"layers": [1]}, "op": {"type": "noise"}, "strength": 2.0, "schedule": schedule}]
    policy = tiny_policy("gpt2")
    settings = PPOSettings(
        steps=4, rollouts_per_step=8, minibatches=2, epochs=1, eval_prompts=0, learning_rate=1e-3, samples=1, credit="gae"
    )
    folder, steering = RunSettings(dir=str(tmp_path / "run")), load_spec({"role": "policy", "sites": sites})
    train(policy, prompts_of(policy), share_of_threes, Sampling(max_new_tokens=5), settings, folder, steering=steering)
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    strengths = {row["step"]: row["strength"] for row in rows}
    assert [strengths[step] for step in (1, 2, 3, 4)] == pytest.approx([2.0, 1.0, 0.0, 0.0])
    assert all(row["steering"] for row in rows)


@pytest.mark.parametrize("budget", [None, {"nats_per_sequence": 0.05}])
def test_rows_are_learned_from_under_the_steering_they_were_drawn_under(tmp_path, budget):
    """Two sites, drawn strengths and rows, noise, a schedule, a budget that scales, evaluations between: weights that stand
    still have no gap and every ratio is 1, in every step, before and after the budget has moved."""
    sites = [
        {"at": {"layers": [0]}, "op": {"type": "noise"}, "strength": {"dist": "uniform", "low": 0.2, "high": 0.6}},
        {"at": {"layers": [1]}, "vector": [0.3, -0.2] * 16, "strength": {"dist": "normal", "mean": 2.0, "std": 1.0}},
    ]
    sites[1]["schedule"] = {"from": 1.0, "to": 0.2}
    steering = load_spec({"sites": sites, "fraction": 0.5, **({"kl_budget": budget} if budget else {})})
    policy, folder = tiny_policy("llama"), RunSettings(dir=str(tmp_path / "run"), seed=5)
    settings = PPOSettings(
        steps=3, rollouts_per_step=8, minibatches=2, epochs=1, eval_prompts=4, eval_every=1, samples=4, learning_rate=0.0
    )
    train(policy, prompts_of(policy), share_of_threes, Sampling(max_new_tokens=5, n=2), settings, folder, steering=steering)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["gap/max"] < 1e-5 and line["ppo/ratio_first_error"] < 1e-5 for line in lines)
    scales = [line["steering/scale"] for line in lines]
    assert (len(set(scales)) > 1) == (budget is not None)
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {row["strength"] != 0 for row in rows} == {True, False}
    assert max(abs(ratio - 1) for row in rows for ratio in row["ratio"]) < 1e-5


def test_exploration_without_a_correction_is_refused():
    policy = tiny_policy("gpt2")
    with pytest.raises(UserError, match=r"steering.correction: missing"):
        train(policy, prompts_of(policy), share_of_threes, Sampling(), PPOSettings(), RunSettings(), steering=spec("behaviour"))


def test_the_config_of_vspo_runs(tiny_world, tmp_path, monkeypatch):
    """Strengths go round the samples of every prompt, rows count once each, and plain ones are the policy's own."""
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "suppressed").symlink_to(tiny_world("suppressed"))
    monkeypatch.chdir(tmp_path)
    argv = ["--config", "steerl:vspo", "--run.dir", "run", "--ppo.steps", "2", "--ppo.samples", "64", "--ppo.eval_prompts", "0"]
    run_command(train_ppo.main, train_ppo.PPOJob, argv)
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    best = [row for row in rows if row["kind"] == "best"]
    assert len(best) == 128 and {row["sample"] for row in best} == set(range(8))
    for row in best:
        assert row["strength"] == pytest.approx([0.0, 0.1, 0.2, 0.3][row["sample"] % 4]) and set(row["importance"]) == {1.0}
        off = max(abs(a - b) for a, b in zip(row["behaviour_logprobs"], row["policy_logprobs"], strict=True))
        assert (off > 1e-3) == (row["strength"] > 0)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["ppo/ratio_first_error"] < 1e-5 and line["gap/max"] < 1e-4 for line in lines)
    assert not list((tmp_path / "run" / "model").glob("steering*"))
