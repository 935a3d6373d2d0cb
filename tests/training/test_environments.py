"""PPO on episodes: credit by a written-out definition, runs that go on whatever an environment does, servers, resume."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from steerl.reward.build import build_reward
from steerl.rollout.common.errors import ConfigError
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.environments.types import Answer
from steerl.rollout.steering import load_spec
from steerl.training.algorithm.experience import credit, gather_scored, score
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings
from steerl.training.setup import prepare
from tests.models import tiny_policy
from tests.ppo_runs import lone_logprobs, lone_values, prompts_of, warm_head
from tests.rollout.environments.scripted import scripted
from tests.vllm_server import STEERED

GAMES = f"{Path(__file__).resolve().parents[1] / 'games.py'}"


def reply(row: dict[str, Any], said: list[Any]) -> Answer:
    total = sum(int(word) for word in said[-1].text.split())
    reward = None if total % 3 == 0 and len(said) > 1 else total % 7 / 7
    if total % 4 == 0:
        return Answer(reward=reward, done=True)
    return Answer(content=" ".join(str(3 + (total + i) % 40) for i in range(1 + total % 4)), reward=reward)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3", "gemma3", "mistral"])
@pytest.mark.parametrize("gamma, lam", [(0.9, 0.8), (1.0, 0.95)])
def test_values_advantages_and_returns_of_episodes_are_the_written_out_ones(family, gamma, lam):
    policy = tiny_policy(family)
    settings = PPOSettings(rollouts_per_step=24, gamma=gamma, lam=lam, whiten_advantages=False, kl_coef=0.1, bootstrap_cut=True)
    sampling = Sampling(max_new_tokens=6, n=3, stop_ids=[11, 17, 23], batch_size=5, top_p=0.9)
    environment = scripted(reply, max_turns=4, max_tokens=40, max_tool_tokens=3)
    parts = prepare(policy, build_reward([{"kind": "environment"}]), sampling, settings, RunSettings(), environment=environment)
    warm_head(parts.actor_critic)
    with torch.no_grad():  # so that there is a KL
        for parameter in parts.actor_critic.policy_parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    prompts = prompts_of(policy, 8)
    for row in range(8):  # what IdConversation reads
        prompts.table[row]["prompt"] = " ".join(str(7 + row + i) for i in range(1 + 2 * row % 5))
    samples = parts.sampler.draw(prompts.batch(range(8)), step=0, progress=0.0)
    scored = score(parts.actor_critic, parts.reference, *gather_scored(samples, parts.state.reward), settings)
    experience, _ = credit(scored, settings, settings.kl_coef)
    rollout, turns = samples.rollout, 0
    assert samples.texts.episodes is not None and parts.reference is not None
    for i, episode in enumerate(samples.texts.episodes):
        actions = [t for turn in episode.turns for t in range(turn.first, turn.end)]
        assert rollout.action_mask_BR[i].nonzero()[:, 0].tolist() == actions
        turns += len(episode.turns)
        with torch.no_grad():
            values = lone_values(parts.actor_critic, rollout, i)
        state = [*values[actions].tolist(), 0.0 if rollout.ended_B[i] else values[int(rollout.lengths_B[i])].item()]
        kl = scored.old_logprobs_BR[i] - scored.reference_logprobs_BR[i]
        earned = dict.fromkeys(actions, 0.0)
        for turn in episode.turns:
            earned[turn.end - 1] += turn.reward or 0.0
        advantage, after = 0.0, []
        for k in reversed(range(len(actions))):
            reward = earned[actions[k]] - settings.kl_coef * kl[actions[k]].item()
            advantage = reward + gamma * state[k + 1] - state[k] + gamma * lam * advantage
            after.insert(0, advantage)
        torch.testing.assert_close(scored.values_BR[i, actions], values[actions].float(), atol=2e-5, rtol=0)
        expected = torch.tensor(after)
        torch.testing.assert_close(experience.advantages_BR[i, actions], expected, atol=5e-5, rtol=1e-5)
        torch.testing.assert_close(experience.returns_BR[i, actions], expected + torch.tensor(state[:-1]), atol=5e-5, rtol=1e-5)
        assert experience.advantages_BR[i].count_nonzero() <= len(actions)
        if rollout.kept is None:
            torch.testing.assert_close(
                rollout.policy_logprobs_BR[i, actions], lone_logprobs(policy, rollout, i)[actions].float(), atol=1e-5, rtol=0
            )
    assert turns > 40


def ran(
    folder: Path, policy: Any, *, environment: Any = None, engine: Any = None, steering: Any = None, **settings: Any
) -> Any:
    """A run's trained weights."""
    torch.manual_seed(0)
    policy = policy.with_model(copy.deepcopy(policy.model))
    small = {"steps": 3, "rollouts_per_step": 16, "minibatches": 2, "epochs": 2, "learning_rate": 2e-3, "eval_prompts": 4}
    given = EnvironmentSettings(**{"factory": f"{GAMES}:chatter", "max_turns": 3, "max_tokens": 30, **(environment or {})})
    sampling = Sampling(max_new_tokens=7, n=2, stop_ids=[11, 17], seed=4)
    reward = build_reward([{"kind": "environment"}])
    ppo, run = PPOSettings(**{**small, **settings}), RunSettings(str(folder))
    spec = load_spec(steering) if steering else None
    train(policy, prompts_of(policy, 30), reward, sampling, ppo, run, steering=spec, engine=engine, environment=given)
    return {name: value for path in folder.glob("model/*.safetensors") for name, value in load_file(path).items()}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_is_the_same_every_time_and_says_how_its_episodes_went(tmp_path):
    policy = tiny_policy("llama")
    one, two = (ran(tmp_path / name, policy) for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    for step in rows(tmp_path / "one"):
        assert step["gap/max"] < 1e-4 and step["ppo/ratio_first_error"] < 1e-5
        assert 1 < step["environment/turns"] <= 3 and step["environment/reward"] == pytest.approx(step["reward/mean"])


def test_a_run_goes_on_whatever_its_environment_does(tmp_path, caplog, capfd):
    given = {"factory": f"{GAMES}:Rude", "timeout": 1.5, "max_tool_tokens": 8, "max_turns": 2}
    policy = tiny_policy("gpt2")
    ran(tmp_path / "run", policy, environment=given, steps=2, rollouts_per_step=20, eval_prompts=0)
    told = [record.getMessage() for record in caplog.records if "lost it" in record.getMessage()]
    for at, step in enumerate(rows(tmp_path / "run")):
        # of the ten ways three are no failure: much output, no end, a long answer; two samples of each prompt
        lost = 2 * sum(row % 10 not in (2, 6, 7) for row in prompts_of(policy, 30).take(0, 10 * at, 10))
        assert step["environment/failures"] == lost and f"{lost} of 20 episodes" in told[at]
        assert step["environment/ended_failure"] == pytest.approx(lost / 20)
    assert len(capfd.readouterr().err) < 100_000


def test_what_does_not_go_together_with_episodes_is_refused(tmp_path):
    policy = tiny_policy("gpt2")
    with pytest.raises(ConfigError, match=r"environment: has no effect with ppo.replay"):
        ran(tmp_path / "replay", policy, replay="dump", eval_prompts=0)
    with pytest.raises(ConfigError, match="encoder-decoder"):
        ran(tmp_path / "t5", tiny_policy("t5"))
    with pytest.raises(ConfigError, match=r"environment.max_turns: has no effect without environment.tools"):
        EnvironmentSettings(max_turns=3)


@pytest.mark.vllm
@pytest.mark.parametrize("steering", [None, {**STEERED, "role": "policy"}], ids=["plain", "steered"])
def test_ten_steps_of_episodes_on_a_server_are_those_in_process(vllm_server, tmp_path, steering):
    engine = EngineSettings(kind="vllm", url=vllm_server.url)
    near, far = (
        ran(tmp_path / name, vllm_server.policy, engine=how, steering=steering, steps=10)
        for name, how in (("near", None), ("far", engine))
    )
    assert max(float((near[name] - far[name]).abs().max()) for name in near) <= 1e-5
    assert [step["environment/turns"] for step in rows(tmp_path / "far")] == [
        step["environment/turns"] for step in rows(tmp_path / "near")
    ]
