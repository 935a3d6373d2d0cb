"""Two processes and one vLLM server: runs end with the weights of runs in process, under DDP, ZeRO-3 and FSDP2."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import warm
from tests.training.engine.test_engines import config_of
from tests.vllm_server import VllmServer

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("engine, jobs, steps", [
    ("ddp", "full,one_prompt", "10"),
    ("zero3", "full,lora", "3"),
    ("fsdp2", "full,lora", "3"),
    pytest.param("ddp", "lora,steered", "10", marks=pytest.mark.proofs),
    pytest.param("zero3", "full,lora,steered,one_prompt", "10", marks=pytest.mark.proofs),
])  # fmt: skip
def test_two_ranks_end_with_the_weights_of_two_in_process(
    vllm_server: VllmServer, tmp_path: Path, engine: str, jobs: str, steps: str
):
    program = ["tests/training/engine/vllm_ranks.py", str(tmp_path / "runs"), vllm_server.url, jobs, steps]
    if engine == "ddp":
        done = warm.run_ranks(*program)
    elif engine == "fsdp2":
        done = warm.run_ranks(*program, "fully_shard")
    else:
        launch = warm.accelerate_launch(config_of(engine, tmp_path), *program)
        done = warm.run(launch, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=550)
    assert done.returncode == 0, done.stderr[-3000:]
    for job in jobs.split(","):
        one, other = (tmp_path / "runs" / job / place for place in ("in", "out"))
        assert json.loads((other / "summary.json").read_text())["world_size"] == 2
        wanted, found = ({n: v for f in p.glob("model/*.safetensors") for n, v in load_file(f).items()} for p in (one, other))
        assert wanted.keys() == found.keys() and wanted
        assert max(float((wanted[name] - found[name]).abs().max()) for name in wanted) <= 1e-5, job
