"""One real vLLM server for all tests that are marked `vllm`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from steerl.rollout.engines.settings import EngineSettings
from steerl.rollout.engines.vllm import model_folder
from steerl.rollout.engines.vllm.client import Client
from steerl.rollout.engines.vllm.server import Server
from tests.models import tiny_policy

WIDE = {"hidden_size": 128, "head_dim": 32}
"""What vLLM's attention takes on a CPU."""
FLAGS = ("--enforce-eager", "--enable-lora", "--max-lora-rank", "16", "--no-enable-prefix-caching", "--max-num-seqs", "128")


class VllmServer(NamedTuple):
    """The server under test. Its weights are those that the last test sent."""

    url: str
    model: Path
    """The folder it was started with: config and tokenizer."""
    log: Path
    policy: Any
    """A Policy of that config; whoever changes its weights makes a copy."""
    client: Client


@pytest.fixture(scope="session")
def vllm_python(pytestconfig: pytest.Config) -> str:
    python = pytestconfig.rootpath / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        pytest.skip("no .venv-vllm; make vllm builds it")
    return str(python)


@pytest.fixture(scope="session")
def vllm_server(vllm_python: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    folder = tmp_path_factory.mktemp("vllm_server")
    policy = tiny_policy("llama", **WIDE)
    model = model_folder.write(policy, folder / "model")
    server = Server(EngineSettings(kind="vllm", python=vllm_python), model, folder / "engine.log", FLAGS)
    server.start()
    yield VllmServer(server.url, model, folder / "engine.log", policy, Client(server.url))
    server.stop()
