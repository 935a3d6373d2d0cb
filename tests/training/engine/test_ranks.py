"""Two processes give what one gives: metrics, weights, KL weight; uneven rows and a rank without prompts included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from steerl.rollout.model import adapters

from tests.models import tiny
from tests.training.engine.ranks import JOBS, SETTINGS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    script = [str(ROOT / "tests/training/engine/ranks.py")]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs/accelerate/ddp.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for name, command in {"one": [sys.executable, *script], "two": [*launch, *script]}.items():
        done = subprocess.run(
            [*command, str(out / name)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
    return out / "one", out / "two"


def logits_of(family: str, folder: Path) -> torch.Tensor:
    """What the saved policy says after some ids."""
    model = tiny(family)
    if (folder / "adapter_config.json").exists():
        model = adapters.load(model, folder)
    else:
        model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
        model.tie_weights()
    ids = torch.tensor([[5, 9, 13, 20, 31, 7]])
    with torch.no_grad():
        outputs = model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    return outputs.logits.log_softmax(-1)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_two_processes_equal_one(folders, name):
    one, two = (folder / name for folder in folders)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    assert [summary["world_size"] for summary in summaries] == [1, 2]
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (one, two)]
    assert len(rows[0]) == len(rows[1]) == SETTINGS["steps"]
    for single, double in zip(*rows, strict=True):
        assert single.keys() == double.keys()
        for key, value in single.items():
            if not key.startswith(("time/", "memory/")):
                assert double[key] == pytest.approx(value, abs=1e-5, rel=1e-5), (single["step"], key)
    # Not weight by weight: a key's bias has no gradient but rounding, which Adam blows up to whole steps that change nothing.
    laws = [logits_of(JOBS[name][0], folder / "model") for folder in (one, two)]
    assert torch.allclose(laws[0], laws[1], atol=1e-5)
    assert summaries[1]["reward_after"] == pytest.approx(summaries[0]["reward_after"], abs=1e-5)
