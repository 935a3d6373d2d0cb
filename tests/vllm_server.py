"""One real vLLM server for all tests that are marked `vllm`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm.client import Client
from steerl.rollout.engines.vllm.model_folder import write
from steerl.rollout.engines.vllm.server import Server
from steerl.rollout.model.policy import Policy
from tests.models import tiny_policy

WIDE = {"hidden_size": 128, "head_dim": 32}
"""What vLLM's attention takes on a CPU."""
FLAGS = ("--enable-lora", "--max-lora-rank", "16", "--no-enable-prefix-caching", "--max-num-seqs", "128")


class VllmServer(NamedTuple):
    """The server under test. Its weights are those that the last test sent."""

    url: str
    model: Path
    """The folder it was started with: config and tokenizer."""
    log: Path
    policy: Any
    """A Policy of that config; whoever changes its weights makes a copy."""
    client: Client


def gentle(policy: Policy) -> Policy:
    """At these widths the tiny models' weights make attention so sharp that float32 itself is 1.5e-5 off float64; at half of
    them both engines are within 4e-6 of it."""
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(0.5)
    return policy


@pytest.fixture(scope="session")
def vllm_python(pytestconfig: pytest.Config) -> str:
    """The interpreter that has vLLM; tests/conftest.py leaves out what is marked `vllm` where there is none."""
    return str(pytestconfig.rootpath / ".venv-vllm" / "bin" / "python")


@pytest.fixture(scope="session")
def vllm_server(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    folder = tmp_path_factory.mktemp("vllm_server")
    policy = gentle(tiny_policy("llama", **WIDE))
    model = write(policy, folder / "model")
    server = Server(EngineSettings(kind="vllm", python=vllm_python), model, folder / "engine.log", FLAGS)
    server.start()
    yield VllmServer(server.url, model, folder / "engine.log", policy, Client(server.url))
    server.stop()
