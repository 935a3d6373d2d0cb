"""Server: a real one starts, answers and ends with all its processes."""

from __future__ import annotations

import json

import pytest

from steerl.rollout.decoding.settings import Sampling
from steerl.rollout.engines.vllm.wire import Answer, Ask, Law


@pytest.mark.vllm
def test_a_real_server_draws_a_row(vllm_server):
    policy, client = vllm_server.policy, vllm_server.client
    (hello,) = client.rpc("steerl_hello")
    assert hello["model"] == "LlamaForCausalLM"
    law = Law(Sampling(max_new_tokens=5, seed=1), policy.vocab_size, tuple(policy.eos_ids))
    client.generate([1, 5, 6], law, Ask("one", 0, 0, 0))
    (got,) = client.rpc("steerl_take", json.dumps(["one"]))
    assert 1 <= len(Answer.of_packed(got["one"]).ids) <= 5
