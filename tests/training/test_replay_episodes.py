"""Episodes that were dumped: scored and learned from without their environment; what a run says of them."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from steerl.reward.build import build_reward
from steerl.rollout.common.errors import UserError
from steerl.rollout.common.fingerprint import model_fingerprint, tokenizer_fingerprint
from steerl.rollout.common.run_folder import RunSettings
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.dumps import manifest, store
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.environments.sampler import EpisodeSampler
from steerl.rollout.environments.settings import EnvironmentSettings
from steerl.rollout.environments.types import Answer
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.types import Samples
from steerl.training.algorithm.importance import Correction
from steerl.training.ppo import train
from steerl.training.settings import PPOSettings
from tests.models import tiny_policy
from tests.ppo_runs import prompts_of
from tests.rollout.environments.scripted import scripted

PROMPTS, SAMPLES = 8, 2


def reply(row: dict[str, Any], said: list[Any]) -> Answer:
    """Some are ended by the environment, some by the limit of turns, one is lost; a call fails now and then."""
    total = sum(int(word) for word in said[-1].text.split())
    if total % 11 == 0:
        return Answer(failure="step: OSError: no port")
    reward = None if total % 3 == 0 else total % 7 / 8
    errors = ("add: TypeError: got 'x'",) if total % 5 == 0 else ()
    return Answer(content="9 8 7", reward=reward, done=total % 4 == 0, errors=errors)


@pytest.fixture(scope="module")
def policy() -> Any:
    return tiny_policy("llama", seed=1)


@pytest.fixture(scope="module")
def dump(tmp_path_factory: pytest.TempPathFactory, policy: Any) -> Path:
    folder = tmp_path_factory.mktemp("dumps") / "dump"
    folder.mkdir()
    sampling = Sampling(max_new_tokens=5, n=SAMPLES, stop_ids=[11, 17, 23], batch_size=5)
    sampler = EpisodeSampler(Sampler(policy, sampling), scripted(reply, max_turns=4, max_tokens=30, max_tool_tokens=2))
    plan = manifest.Plan.of(PROMPTS, SAMPLES, batch_size=4, shard_rows=8)
    made_from = {"model.path": model_fingerprint(policy.core), "model.tokenizer": tokenizer_fingerprint(policy.tokenizer)}
    begun = manifest.start(folder, plan, {}, {**made_from, "steering": ""})

    def sample(call: range) -> Samples:
        texts = [f"{5 + row} 9" for row in call]
        batch = PromptBatch([[5 + row, 9] for row in call], list(call), texts, texts)
        return sampler.sample(dataclasses.replace(batch, columns={"place": list(call)}))

    for index in range(len(plan)):
        store.make_shard(folder, plan, index, sample)
    manifest.finish(folder, begun, world_size=1)
    return folder


def stored(dump: Path) -> Samples:
    return Samples.join(list(store.read_dump(dump)))


def test_a_dump_of_episodes_is_learned_from_without_its_environment(tmp_path, dump, policy, caplog):
    """One step on all of it: rewards, metrics and samples are those of the stored episodes, counted here by hand."""
    settings = PPOSettings(replay=str(dump), steps=1, rollouts_per_step=PROMPTS * SAMPLES, minibatches=2, eval_prompts=0,
                           kl_coef=0.0, samples=3, correction=Correction("token_truncate"))  # fmt: skip
    reward = build_reward([{"kind": "environment"}, {"kind": "length", "max": 1, "weight": 0.0}])
    train(policy, prompts_of(policy, 2), reward, Sampling(max_new_tokens=5), settings, RunSettings(str(tmp_path / "run")))
    (step,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rollout, texts = stored(dump)
    episodes = texts.episodes
    turns = [turn for episode in episodes for turn in episode.turns]
    lost = [episode for episode in episodes if episode.failure]
    assert 0 < len(lost) < len(episodes) < len(turns)
    given = [sum(turn.reward or 0.0 for turn in episode.turns) for episode in episodes]
    some = [any(turn.reward is not None for turn in episode.turns) for episode in episodes]
    cut = [episode.ended_by in ("turns", "tokens", "failure") for episode in episodes]
    applies = [value for value, one, stopped in zip(given, some, cut, strict=True) if one or stopped]
    assert 0 < len(applies) < len(given)
    assert step["reward/mean"] == pytest.approx(sum(given) / len(episodes))
    assert step["reward/environment"] == pytest.approx(sum(applies) / len(applies))
    assert step["environment/reward"] == pytest.approx(sum(v for v, one in zip(given, some, strict=True) if one) / sum(some))
    assert step["environment/turns"] == len(turns) / len(episodes) and step["environment/failures"] == len(lost)
    assert step["environment/tool_errors"] == sum(len(turn.errors) for turn in turns) / len(episodes) > 0
    assert step["environment/cut_answers"] == sum(turn.answer != "" for turn in turns) > 0  # three ids, of which two may come
    assert step["rollout/fed_tokens"] == 2 * sum(turn.answer != "" for turn in turns)
    ends = {name.removeprefix("environment/ended_"): v for name, v in step.items() if "ended_" in name}
    assert sum(ends.values()) == pytest.approx(1.0) and ends["failure"] == len(lost) / len(episodes) and ends["environment"] > 0
    assert f"{len(lost)} of 16 episodes lost it: {len(lost)} step: OSError: no port; " in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    place = {key: i for i, key in enumerate(zip(rollout.row_B.tolist(), rollout.sample_B.tolist(), strict=True))}
    for row in rows:
        i = place[row["row"], row["sample"]]
        assert row["episode"] == json.loads(json.dumps(episodes[i].as_json()))
        wanted = {turn.end - 1: turn.reward or 0.0 for turn in episodes[i].turns}
        found = {t: value for t, value in enumerate(row["rewards"]) if value}
        assert found == pytest.approx({t: value for t, value in wanted.items() if value}, abs=1e-6)


def test_runs_without_an_environment_say_nothing_of_one(tmp_path, policy):
    settings = PPOSettings(steps=1, rollouts_per_step=8, minibatches=1, eval_prompts=0)
    reward, run = build_reward([{"kind": "length", "max": 3}]), RunSettings(str(tmp_path / "run"))
    train(policy, prompts_of(policy, 8), reward, Sampling(max_new_tokens=5), settings, run)
    (step,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not [name for name in step if name.startswith("environment/") or "fed" in name]
    assert "episode" not in (tmp_path / "run" / "samples.jsonl").read_text()


def test_the_scores_of_a_dump_are_what_its_environments_gave(tmp_path, dump, capsys):
    from steerl.configs.reader import run_command

    import pyarrow.parquet

    from steerl.scripts.score_rollouts import ScoreJob, main

    terms = json.dumps([{"kind": "environment"}, {"kind": "length", "max": 5, "min": 5, "turns": "last"}])
    run_command(main, ScoreJob, ["--dump.dir", str(dump), "--run.dir", str(tmp_path / "scores"), "--reward", terms])
    files = sorted((tmp_path / "scores").glob("scores-*.parquet"))
    found = [row for file in files for row in pyarrow.parquet.read_table(file).to_pylist()]
    for row, episode in zip(found, stored(dump).texts.episodes, strict=True):
        rewards = [turn.reward for turn in episode.turns if turn.reward is not None]
        expected = math.fsum(rewards) if rewards or episode.ended_by != "environment" else None
        assert row["environment"] == pytest.approx(expected)
        last = episode.turns[-1]
        assert row["length"] == float(last.end - last.first == 5)
        assert row["total"] == pytest.approx((expected or 0.0) + row["length"])


def test_rows_of_the_dump_come_back_with_their_episodes(dump, policy):
    from steerl.training.replay import Replay

    settings = PPOSettings(replay=str(dump), rollouts_per_step=8, eval_prompts=0)
    replay = Replay(dump, policy, settings)
    rollout, texts = replay.draw(replay.batch([5, 0]))
    whole = stored(dump)
    assert texts.episodes == [whole.texts.episodes[i] for i in (10, 11, 0, 1)]
    assert torch.equal(rollout.action_mask_BR[0, : rollout.lengths_B[0]], whole.rollout.select([10]).trim().action_mask_BR[0])


def test_an_evaluation_beside_a_replay_needs_an_environment_of_its_own(tmp_path, dump, policy):
    settings = PPOSettings(replay=str(dump), steps=1, rollouts_per_step=16, minibatches=1, eval_prompts=2,
                           correction=Correction("token_truncate"))  # fmt: skip
    game = EnvironmentSettings(factory=f"{Path(__file__).parents[1] / 'games.py'}:chatter", max_turns=3, max_tokens=30)
    reward, sampling = build_reward([{"kind": "environment"}, {"kind": "length", "max": 1}]), Sampling(max_new_tokens=5)
    with pytest.raises(UserError, match="no environment took part in these rows.* or set ppo.eval_prompts 0"):
        train(policy, prompts_of(policy, 2), reward, sampling, settings, RunSettings(str(tmp_path / "none")))
    run = RunSettings(str(tmp_path / "run"))
    summary = train(policy, prompts_of(policy, 2), reward, sampling, settings, run, environment=game)
    assert summary["reward_before"] is not None
