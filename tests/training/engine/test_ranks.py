"""Two processes give what one gives: metrics, weights, KL weight; uneven rows and a rank without prompts included."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from steerl.rollout.model import adapters
from tests import warm
from tests.models import tiny
from tests.training.engine.ranks import JOBS, SETTINGS


@pytest.fixture(scope="module")
def folders(made_once):
    def one(out):
        done = warm.run([sys.executable, "tests/training/engine/ranks.py", str(out)])
        assert done.returncode == 0, done.stderr[-3000:]

    def two(out):
        done = warm.run_ranks("tests/training/engine/ranks.py", str(out))
        assert done.returncode == 0, done.stderr[-3000:]

    return made_once("one_rank", one), made_once("two_ranks", two)


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
    assert len(rows[0]) == len(rows[1]) == (2 if name == "hooked" else SETTINGS["steps"])
    for single, double in zip(*rows, strict=True):
        assert single.keys() == double.keys()
        for key, value in single.items():
            if not key.startswith(("time/", "memory/")):
                assert double[key] == pytest.approx(value, abs=1e-5, rel=1e-5), (single["step"], key)
    # Not weight by weight: a key's bias has no gradient but rounding, which Adam blows up to whole steps that change nothing.
    laws = [logits_of(JOBS[name][0], folder / "model") for folder in (one, two)]
    assert torch.allclose(laws[0], laws[1], atol=1e-5)
    assert name != "screened" or any(0 < step["reward/screened"] < 1 for step in rows[0])
    assert summaries[1]["reward_after"] == pytest.approx(summaries[0]["reward_after"], abs=1e-5)
    assert all(
        ('"action_mask": [' in (folder / "samples.jsonl").read_text()) == (name in ("gaps", "episodes"))
        for folder in (one, two)
    )
