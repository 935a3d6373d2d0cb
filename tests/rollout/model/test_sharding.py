"""Two ranks whose forward passes are collective: other lengths, fewer prompts or none must neither hang nor change a token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import warm
from tests.models import tiny_policy
from tests.rollout.model import sharded


@pytest.mark.slow
def test_ranks_with_fewer_prompts_or_none(tmp_path: Path) -> None:
    done = warm.run_ranks("tests/rollout/model/sharded.py", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    found = [torch.load(tmp_path / f"out.{rank}") for rank in range(2)]
    for family in sharded.FAMILIES:
        policy = tiny_policy(family)
        for name, shares in sharded.SHARES.items():
            for rank in range(2):
                expected = sharded.sampled(policy, shares[rank], family)
                for key, value in expected.items():
                    assert torch.equal(found[rank][f"{family} {name}"][key], value), (family, name, rank, key)
