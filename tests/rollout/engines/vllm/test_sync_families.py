"""Weights of other families, each in a server of its own: tied and untied heads, vLLM's modules and transformers', a prefix
cache that would keep what old weights computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steerl.rollout.common.errors import UserError
from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm.client import Client
from steerl.rollout.engines.vllm.model_folder import write
from steerl.rollout.engines.vllm.server import Server
from steerl.rollout.engines.vllm.weights.sync import Sync
from steerl.rollout.model.policy import Policy
from tests.models import tiny_policy
from tests.rollout.engines.vllm.test_sync import answers, gap, moved
from tests.vllm_server import WIDE, gentle

pytestmark = [pytest.mark.vllm, pytest.mark.proofs]
TIED = {**WIDE, "tie_word_embeddings": True}
FAMILIES: dict[str, tuple[str, dict[str, Any], Any]] = {
    "llama of transformers": ("llama", WIDE, "transformers"),
    "qwen3 tied": ("qwen3", TIED, "auto"),
    "qwen3 tied of transformers": ("qwen3", TIED, "transformers"),
    "gemma3": ("gemma3", {**TIED, "query_pre_attn_scalar": 32}, "auto"),
    "gemma3 of transformers": ("gemma3", {**TIED, "query_pre_attn_scalar": 32}, "transformers"),
    "gpt2": ("gpt2", {"n_embd": 128}, "auto"),
    "gpt2 of transformers": ("gpt2", {"n_embd": 128}, "transformers"),
    "gpt_neox": ("gpt_neox", {"hidden_size": 128}, "auto"),
    "qwen3_moe": ("qwen3_moe", {**WIDE, "moe_intermediate_size": 128}, "auto"),
}


@pytest.fixture
def served(request: pytest.FixtureRequest, vllm_python: str, tmp_path: Path) -> Iterator[tuple[Policy, Client]]:
    family, wide, implementation = FAMILIES[request.param]
    policy = gentle(tiny_policy(family, **wide))
    policy.model.requires_grad_(True)
    settings = EngineSettings(kind="vllm", python=vllm_python, model_impl=implementation)
    flags = ("--enable-prefix-caching", "--block-size", "32", "--max-num-seqs", "16")
    server = Server(settings, write(policy, tmp_path / "model"), tmp_path / "engine.log", flags)
    server.start()
    client = Client(server.url)
    client.rpc("steerl_hello")
    yield policy, client
    server.stop()


def names(*left_out: str) -> list[str]:
    return [name for name in FAMILIES if name not in left_out]


@pytest.mark.parametrize("served", names("gpt2 of transformers"), indirect=True)
def test_four_syncs(served: tuple[Policy, Client], tmp_path: Path) -> None:
    policy, client = served
    long = [(7 * t) % 60 + 3 for t in range(70)]  # two blocks of the prefix cache
    sync = Sync(client, policy, EngineSettings(kind="vllm"), tmp_path / "sync")
    for version in range(4):
        moved(policy, version)
        sync.send(version)
        assert gap(client, policy) < 1e-5
        for _ in range(2):
            assert gap(client, policy, prompts=[long]) < 1e-5
        assert answers(client, policy, "policy")[0].versions == (version, version)
    sync.close()


@pytest.mark.parametrize("served", ["gpt2 of transformers"], indirect=True)
def test_what_vllm_drops_is_named(served: tuple[Policy, Client], tmp_path: Path) -> None:
    """Its transformers modules leave c_attn.bias out, for they look like the buffer attn.bias: silently, with other numbers."""
    policy, client = served
    with pytest.raises(
        UserError, match=r"did not get model\.h\.0\.attn\.c_attn\.bias: it was sent.*another engine\.model_impl"
    ):
        Sync(client, policy, EngineSettings(kind="vllm"), tmp_path / "sync").send(0)
