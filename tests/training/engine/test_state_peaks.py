"""What loading, saving and exporting take of a rank's memory above what stands: its share and about a tensor, never the whole."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import warm
from tests.training.engine import peaks
from tests.training.engine.test_engines import ROOT, config_of

pytestmark = pytest.mark.proofs
LARGEST = peaks.WIDE["hidden_size"] * peaks.WIDE["vocab_size"] * 4 / 1e6
SLACK = 25.0
"""MB: what the first calls of a library leave, and pieces that are written."""


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("state")
    size = peaks.saved(folder) / 1e6
    assert size > 490
    yield folder, size
    shutil.rmtree(folder)


@pytest.mark.parametrize("engine", ["zero3", "fsdp2", "zero1", "ddp"])
def test_no_rank_holds_the_whole(engine: str, state: tuple[Path, float], tmp_path: Path) -> None:
    source, size = state
    program = [peaks.__file__, str(source), str(tmp_path)]
    if engine == "fsdp2":
        done = warm.run_ranks(*program, "fully_shard")
    else:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = warm.run(warm.accelerate_launch(config_of(engine, tmp_path), *program), env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    print(f"\n{engine}: state {size:.0f} MB, largest tensor {LARGEST:.0f} MB; {found}")
    moments = size * 2 / 3 / (1 if engine == "ddp" else 2)
    for rank in found:
        assert rank["save"] < LARGEST + SLACK
        assert rank["export"] < 2 * LARGEST + SLACK
        assert rank["load"] < moments + LARGEST + SLACK
    for folder in ("checkpoints", "model"):
        shutil.rmtree(tmp_path / folder)
