"""Rows of a real vLLM server are the rows of the in-process engine: every token, both log-probs, entropy, what was kept, why
a row ended. On one server, whose weights each test sends."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steerl.rollout.common.errors import UserError
from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.sampler import Sampler
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm.engine import VllmEngine
from steerl.rollout.engines.vllm.sampler import ServerSampler
from steerl.rollout.model.policy import Policy
from steerl.rollout.prompts.prompts import PromptBatch
from steerl.rollout.types import Samples
from tests.rollout.engines.vllm.agree import LAWS, assert_same, prompts, shake
from tests.vllm_server import VllmServer

pytestmark = pytest.mark.vllm


@pytest.fixture
def engine(vllm_server: VllmServer, tmp_path: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(vllm_server.policy, EngineSettings(kind="vllm", url=vllm_server.url), tmp_path / "engine.log")
    yield engine
    engine.close()


@pytest.mark.parametrize("law", LAWS)
def test_every_law_draws_the_in_process_rows(engine: VllmEngine, law: str):
    sampling = Sampling(max_new_tokens=20, seed=11, **LAWS[law])
    batch = prompts(engine.policy, 12)
    assert_same(ServerSampler(engine, sampling).sample(batch, step=3), Sampler(engine.policy, sampling).sample(batch, step=3))


def test_a_row_is_the_same_in_any_company(engine: VllmEngine):
    sampling = Sampling(max_new_tokens=16, seed=2, n=2, top_p=0.9)
    batch = prompts(engine.policy, 30)
    sampler = ServerSampler(engine, sampling)
    whole = sampler.sample(batch, step=1)
    order = random.Random(0).sample(range(30), 30)
    shuffled = sampler.sample(batch.select(order), step=1)
    back = [2 * order.index(i) + j for i in range(30) for j in range(2)]
    assert_same(shuffled.select(back), whole)
    alone = [sampler.sample(batch.select([i]), step=1) for i in (0, 7, 29)]
    for i, one in zip((0, 7, 29), alone, strict=True):
        assert one.rollout.response_ids == whole.rollout.response_ids[2 * i : 2 * i + 2]


def test_several_samplers_share_a_server(engine: VllmEngine):
    """Rows of different laws are under way at once, as an evaluation's beside rows that are drawn ahead."""
    batch = prompts(engine.policy, 8)
    laws = [
        Sampling(max_new_tokens=m, seed=s, **kw) for m, s, kw in ((20, 1, {}), (9, 2, {"greedy": True}), (14, 3, {"top_k": 5}))
    ]
    engine.ready(0)
    samplers = [ServerSampler(engine, law) for law in laws]
    begun = [sampler.begin(batch, step=0, progress=0.0) for sampler in samplers]
    for sampler, rows, law in zip(samplers, begun, laws, strict=True):
        assert_same(sampler.finish(rows), Sampler(engine.policy, law).sample(batch, step=0))


def test_new_weights_draw_new_rows(engine: VllmEngine, vllm_server: VllmServer):
    """Four syncs of weights that have nothing in common; the step that they are of is recorded."""
    sampling = Sampling(max_new_tokens=16, seed=5)
    batch = prompts(engine.policy, 8)
    policy = changed(engine.policy, 0)
    engine.policy = engine.weights.policy = policy
    for step in range(4):
        shake(policy, step)
        engine.sync(step)
        got = ServerSampler(engine, sampling).sample(batch, step=step)
        assert_same(got, Sampler(policy, sampling).sample(batch, step=step))
        assert got.rollout.policy_step_B.tolist() == [step] * 8


def test_rows_of_other_weights_stop_the_run(engine: VllmEngine):
    sampler = ServerSampler(engine, Sampling(max_new_tokens=8))
    batch = prompts(engine.policy, 4)
    engine.ready(3)
    engine.client.rpc("steerl_ready", "2")  # as a server that lost a sync
    with pytest.raises(UserError, match=r"row \d+ \(sample 0\) was drawn by the weights of step 2, .* step 3"):
        sampler.sample(batch, step=3)


def test_logits_that_are_no_distribution_name_their_row(engine: VllmEngine):
    policy = changed(engine.policy, 1)
    engine.policy = engine.weights.policy = policy
    with torch.no_grad():
        policy.core.get_output_embeddings().weight[5] = float("nan")
    engine.settings = dataclasses.replace(engine.settings, check_rows=0)
    with pytest.raises(UserError, match=r"logits of row 1 \(sample 0\) at token 0 hold no distribution"):
        ServerSampler(engine, Sampling(max_new_tokens=8)).sample(prompts(policy, 3))


def test_words_that_cannot_be_spelled_are_refused_before_a_row(engine: VllmEngine):
    law = dataclasses.replace(engine.law(Sampling(stop=["a"])), tokenizer_path="/nowhere")
    with pytest.raises(UserError, match=r"cannot draw by these settings of sampling: .*nowhere"):
        engine.ready(0)
        engine.ask(law, [[5]], [])
        engine.begin(law, [[5, 6]], [ask_of(engine)])


def ask_of(engine: VllmEngine) -> Any:
    from steerl.rollout.engines.vllm.wire import Ask

    return Ask("x", 0, 0, 0)


def changed(policy: Policy, seed: int) -> Policy:
    """Another policy of the same shape."""
    other = policy.with_model(copy.deepcopy(policy.model))
    shake(other, seed)
    return other


def test_no_prompts_no_rows(engine: VllmEngine):
    got: Samples = ServerSampler(engine, Sampling(n=3)).sample(PromptBatch.of_ids([], []))
    assert len(got.rollout) == 0 and len(got.texts) == 0
