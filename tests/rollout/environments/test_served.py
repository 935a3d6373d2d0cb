"""Episodes on a real vLLM server: the rows that are drawn in process, whatever happens to the server meanwhile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm.engine import VllmEngine
from steerl.rollout.engines.vllm.sampler import ServerSampler
from steerl.rollout.environments.sampler import EpisodeSampler
from steerl.rollout.environments.types import Answer
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.steering import Steering
from steerl.rollout.types import Rollout
from tests.rollout.environments.scripted import scripted
from tests.vllm_server import STEERED

pytestmark = pytest.mark.vllm

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "truncated": {"top_k": 12, "top_p": 0.9, "temperature": 0.8},
    "penalised": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[5, 6]]},
}


def reply(row: dict[str, Any], said: list[Any]) -> Answer:
    """What it says depends on what it was told; odd sums end it."""
    total = sum(int(word) for word in said[-1].text.split())
    if total % 5 == 0:
        return Answer(reward=1.0, done=True)
    return Answer(content=" ".join(str(3 + (total + i) % 40) for i in range(1 + total % 4)), reward=0.25)


def prompts(count: int) -> PromptBatch:
    ids = [[5 + i] * (1 + 3 * i % 7) for i in range(count)]
    return PromptBatch(ids, list(range(count)), [" ".join(map(str, one)) for one in ids], [""] * count)


def served(policy: Policy, url: str, log: Path, sampling: Sampling, steering: Steering | None) -> EpisodeSampler:
    engine = VllmEngine(policy, EngineSettings(kind="vllm", url=url), log, steering=steering, alone=True)
    return EpisodeSampler(ServerSampler(engine, sampling, steering), scripted(reply, max_turns=4, max_tokens=40))


def same(a: Rollout, b: Rollout) -> None:
    assert a.response_ids == b.response_ids
    assert torch.equal(a.action_mask_BR, b.action_mask_BR) and a.stop_B.tolist() == b.stop_B.tolist()
    for name in ("behaviour_logprobs_BR", "policy_logprobs_BR", "entropy_BR"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=1e-5)
    assert (a.kept is None) == (b.kept is None)
    assert a.kept is None or a.kept.lists() == b.kept.lists()  # type: ignore[union-attr]


@pytest.mark.parametrize("steered", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_episodes_as_in_process(vllm_server, name, steered):
    policy, sampling = vllm_server.policy, Sampling(max_new_tokens=7, n=2, seed=3, stop_ids=[7, 8], **SETTINGS[name])
    steering = Steering(policy.model, STEERED, policy.tokenizer, seed=3) if steered else None
    batch = prompts(6)
    far = served(policy, vllm_server.url, vllm_server.log, sampling, steering).draw(batch, step=2, progress=0.5)
    near = EpisodeSampler(Sampler(policy, sampling, steering), scripted(reply, max_turns=4, max_tokens=40))
    close = near.sample(batch, step=2, progress=0.5)
    same(far.rollout, close.rollout)
    assert far.texts.episodes == close.texts.episodes
    turns = [len(episode.turns) for episode in close.texts.episodes or []]
    assert len(set(turns)) > 1 and sum(turns) > 15, "several turns, not the same number everywhere"


def test_a_server_that_dies_between_turns_changes_nothing(vllm_server, vllm_python, tmp_path):
    policy, sampling = vllm_server.policy, Sampling(max_new_tokens=7, n=2, seed=3, stop_ids=[7, 8])
    engine = VllmEngine(
        policy, EngineSettings(kind="vllm", python=vllm_python), tmp_path / "engine.log", longest=64, alone=True
    )
    count = 0

    def deadly(row: dict[str, Any], said: list[Any]) -> Answer:
        nonlocal count
        count += 1
        if count == 9:
            assert engine._server is not None and engine._server._guard is not None
            for process in psutil.Process(engine._server._guard.pid).children(recursive=True):
                process.kill()
        return reply(row, said)

    try:
        far = EpisodeSampler(ServerSampler(engine, sampling), scripted(deadly, max_turns=4, max_tokens=40))
        drawn = far.draw(prompts(6), step=1, progress=0.0)
        assert engine.restarts == 1
    finally:
        engine.close()
    near = EpisodeSampler(Sampler(policy, sampling), scripted(reply, max_turns=4, max_tokens=40))
    same(drawn.rollout, near.sample(prompts(6), step=1).rollout)
