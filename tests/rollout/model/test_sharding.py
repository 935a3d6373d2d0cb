"""Two ranks whose forward passes are collective: other lengths, fewer prompts or none must neither hang nor change a token."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.models import tiny_policy
from tests.rollout.model import sharded

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_ranks_with_fewer_prompts_or_none(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "tests/rollout/model/sharded.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [*command, str(rank), port, str(tmp_path / "out")], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    found = [torch.load(tmp_path / f"out.{rank}") for rank in range(2)]
    for family in sharded.FAMILIES:
        policy = tiny_policy(family)
        for name, shares in sharded.SHARES.items():
            for rank in range(2):
                expected = sharded.sampled(policy, shares[rank], family)
                for key, value in expected.items():
                    assert torch.equal(found[rank][f"{family} {name}"][key], value), (family, name, rank, key)
