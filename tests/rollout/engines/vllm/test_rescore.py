"""Rows scored again: what is chosen, and which defects stop a run. The real server's defects are put in by hand."""

from __future__ import annotations

import copy
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steerl.rollout.common.errors import UserError
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm.client import Gone
from steerl.rollout.engines.vllm.weights import rescore
from steerl.rollout.engines.vllm.weights.sync import Sync
from steerl.rollout.engines.vllm.wire import Answer, Ask, Law
from steerl.rollout.model import adapters
from steerl.rollout.model.policy import Policy
from steerl.rollout.types import Rollout
from steerl.rollout.weights.blocks import Block
from tests.models import tiny_policy
from tests.rollout.engines.vllm.scored import Scorer


def recent(count: int) -> Rollout:
    prompts = [list(range(3, 4 + b)) for b in range(count)]
    return Rollout.of_ids(prompts, [[(7 * b + t) % 60 + 3 for t in range(1 + 5 * b)] for b in range(count)])


def check(server: Any, policy: Policy, batch: Rollout | None, count: int = 5, tolerance: float = 1e-4) -> float:
    return rescore.check_rows(server, policy, batch, count, step=4, tolerance=tolerance)


@pytest.mark.parametrize("family", ["llama", "gpt2", "recurrent_gemma"])
@pytest.mark.parametrize("drawn", [0, 3, 20])
def test_a_server_that_has_the_weights_passes(family: str, drawn: int) -> None:
    policy = tiny_policy(family)
    server = Scorer(policy)
    assert 0 < check(server, policy, recent(drawn) if drawn else None) < 1e-4
    assert server.asked == min(5, drawn or 5)


def test_rows_are_spread_over_the_batch_cut_and_end_where_a_server_ends_them() -> None:
    policy = tiny_policy("llama")
    batch = Rollout.of_ids([[9] * 50, [8, 7], [6]], [[5] * 40, [4, 2, 4], [3]])
    assert rescore.rows(policy, batch, 9, 0) == [([9] * 32, [5] * 32), ([8, 7], [4, 2]), ([6], [3])]
    assert rescore.rows(policy, recent(20), 3, 0) == rescore.rows(policy, recent(20).select([0, 10, 19]), 3, 0)


def test_random_rows_differ_by_step_and_hold_no_end() -> None:
    policy = tiny_policy("llama")
    first, again, other = (rescore.rows(policy, None, 6, step) for step in (0, 0, 1))
    assert first == again != other and len({tuple(prompt) for prompt, _ in first}) == 6
    assert {len(ids) for row in first for ids in row} == {32}
    assert not {2} & {token for row in first for ids in row for token in ids}


def test_one_number_that_is_off_stops_with_its_place() -> None:
    policy = tiny_policy("llama")

    class Off(Scorer):
        def answer(self, prompt: list[int], forced: list[int]) -> Answer:
            answer = super().answer(prompt, forced)
            if len(forced) == 6:
                answer.policy[3] += 0.01
            return answer

    with pytest.raises(
        UserError, match=r"after the sync of step 4 .*token 3 of row 1 has log-prob .* 0\.01 apart, where 0\.001"
    ):
        check(Off(policy), policy, recent(3), tolerance=1e-3)
    assert 0.009 < check(Off(policy), policy, recent(3), tolerance=0.02) < 0.011


def test_a_number_that_is_none_stops() -> None:
    policy = tiny_policy("llama")

    class Nan(Scorer):
        def answer(self, prompt: list[int], forced: list[int]) -> Answer:
            answer = super().answer(prompt, forced)
            answer.policy[0] = float("nan")
            return answer

    with pytest.raises(UserError, match="computes something else than the policy"):
        check(Nan(policy), policy, recent(3))


@pytest.mark.parametrize(
    ("version", "told"), [(3, "the weights of step 3, where those of step 4 were sent"), (-1, "no whole weights, where")]
)
def test_a_sync_that_was_lost_stops(version: int, told: str) -> None:
    policy = tiny_policy("llama")
    with pytest.raises(UserError, match=told):
        check(Scorer(policy, version), policy, recent(3))


def test_a_server_that_is_gone_is_no_error_of_the_users() -> None:
    def gone(*_: Any) -> Any:
        raise Gone("nobody")

    with pytest.raises(Gone, match="nobody"):
        check(gone, tiny_policy("llama"), None)


# -- a real server ---------------------------------------------------------------------------------------------------


@pytest.fixture
def policy(vllm_server: Any) -> Policy:
    given = vllm_server.policy
    copied: Policy = Policy.of(copy.deepcopy(given.model), given.tokenizer)
    return copied


@pytest.fixture
def sync(vllm_server: Any, policy: Policy, tmp_path: Path) -> Iterator[Sync]:
    vllm_server.client.rpc("steerl_hello")
    made = Sync(vllm_server.client, policy, EngineSettings(kind="vllm"), tmp_path)
    yield made
    made.close()


def scored(server: Any, policy: Policy, model: str = "policy", batch: Rollout | None = None) -> float:
    def ask(law: Law, prompts: list[list[int]], asks: list[Ask]) -> list[Answer]:
        for prompt, one in zip(prompts, asks, strict=True):
            server.client.generate(prompt, law, one, model)
        (taken,) = server.client.rpc("steerl_take", json.dumps([one.id for one in asks]))
        return [Answer.of_packed(taken[one.id]) for one in asks]

    return rescore.check_rows(ask, policy, batch, 4, step=4, tolerance=1e-3)


@pytest.mark.vllm
def test_a_real_server_passes_and_each_defect_stops(vllm_server: Any, policy: Policy, sync: Sync) -> None:
    sync.send(4)
    assert scored(vllm_server, policy) < 2e-5
    assert scored(vllm_server, policy, batch=recent(20)) < 2e-5
    sync.send(3)
    with pytest.raises(UserError, match="by the weights of step 3, where those of step 4 were sent"):
        scored(vllm_server, policy)
    sync.send(4)
    policy.core.lm_head.weight.data += 0.01 * torch.randn_like(policy.core.lm_head.weight)
    with pytest.raises(UserError, match="computes something else than the policy"):
        scored(vllm_server, policy)


@pytest.mark.vllm
def test_two_tensors_swapped(vllm_server: Any, policy: Policy, sync: Sync, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (f"model.layers.{k}.mlp.down_proj.weight" for k in range(2))
    saved = Block.saved

    def swapped(self: Block, values: Any) -> Any:
        state = saved(self, values)
        core = dict(policy.core.named_parameters())
        return {name: core.get({first: second, second: first}.get(name, name), value) for name, value in state.items()}

    monkeypatch.setattr(Block, "saved", swapped)
    sync.send(4)
    with pytest.raises(UserError, match="computes something else than the policy"):
        scored(vllm_server, policy)


@pytest.mark.vllm
def test_an_adapter_that_was_not_loaded(vllm_server: Any, policy: Policy, tmp_path: Path) -> None:
    learner = Policy.of(
        adapters.add(policy.model, {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "init_lora_weights": False}), policy.tokenizer
    )
    sync = Sync(vllm_server.client, learner, EngineSettings(kind="vllm"), tmp_path / uuid.uuid4().hex)
    sync.send(4)
    assert scored(vllm_server, learner, sync.model) < 1e-4
    with pytest.raises(UserError, match="computes something else than the policy"):
        scored(vllm_server, learner, "policy")
    sync.close()
