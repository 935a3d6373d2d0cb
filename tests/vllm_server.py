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
LORA = {"peft_type": "LORA", "r": 4, "target_modules": ["q_proj", "v_proj", "o_proj", "down_proj"]}
STEERED = {
    "role": "policy",
    "fraction": 0.7,
    "sites": [
        {"name": "push", "at": {"layers": [0]}, "vector": {"init": "normal", "std": 0.2},
         "strength": {"dist": "uniform", "low": 0.5, "high": 1.5}, "schedule": {"from": 1.0, "to": 0.2}},
        {"name": "out", "at": {"layers": [1]}, "op": {"type": "ablate"}, "vector": {"init": "normal", "std": 0.2},
         "where": {"prompt": "all", "steps": {"window": [2, 6]}}},
    ],
}  # fmt: skip
"""An adapter and a steering of a model of two blocks."""


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
