"""Twenty kills of two ranks under ZeRO-3, each in the middle of loading, saving or exporting: every checkpoint that has its name
is whole, and the run ends with the undisturbed run's weights."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from steerl.training.run import checkpoint
from tests import warm
from tests.training.engine import killed
from tests.training.engine.test_engines import ROOT, config_of, tensors_of

pytestmark = pytest.mark.proofs
# A save has 182 tensors or ranges of the main process, 126 of the other; a load reads as many; an export has 21. Steps 2 and 4
# are saved.
KILLS = [
    *("save 0 1 all", "save 1 70 one", "head 0 1 all", "head 0 2 one", "rename 0 1 all", "save 0 70 one", "save 1 200 all"),
    *("load 0 1 all", "load 1 1 one", "load 0 60 one", "load 1 120 all", "save 1 100 all", "load 0 130 one", "rename 0 1 one"),
    *("export 0 1 all", "load 1 60 all", "export 0 10 one", "export 0 21 all", "rename 0 1 all", "load 1 100 one"),
]


def run(folder: Path, config: Path, kill: str) -> int:
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KILL": kill}
    command = warm.accelerate_launch(config, killed.__file__, str(folder))
    with (folder / "said").open("ab") as said:
        return subprocess.run(command, env=environment, stdout=said, stderr=said, cwd=ROOT, timeout=300).returncode


def test_twenty_kills(tmp_path: Path) -> None:
    assert len(KILLS) == 20
    begun, config = time.monotonic(), config_of("zero3", tmp_path)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(whole, config, "") == 0, (whole / "said").read_text()[-3000:]
    steps = broken / "run" / "checkpoints"
    for place, kill in enumerate(KILLS):
        status = run(broken, config, kill)
        assert status != 0, f"{kill}: it did not come to that"
        left = sorted(steps.glob("step-*"))
        assert all(checkpoint.damaged(path) is None for path in left)
        assert [path.name for path in left] == ["step-000002", "step-000004"][: (place >= 6) + (place >= 14)]
        if (model := broken / "run" / "model").exists():
            AutoModelForCausalLM.from_pretrained(model)
        print(kill, [path.name for path in left], sorted(p.name for p in (broken / "run").rglob("*.tmp")), flush=True)
        (broken / "said").unlink()
    assert run(broken, config, "") == 0, (broken / "said").read_text()[-3000:]
    for name in ("step-000002", "step-000004"):
        found, expected = (tensors_of(folder / "run" / "checkpoints" / name) for folder in (broken, whole))
        assert found.keys() == expected.keys()
        assert all(found[key].numpy().tobytes() == value.numpy().tobytes() for key, value in expected.items())
    models = [load_file(folder / "run" / "model" / "model.safetensors") for folder in (broken, whole)]
    assert models[0].keys() == models[1].keys()
    assert all(models[0][key].numpy().tobytes() == value.numpy().tobytes() for key, value in models[1].items())
    assert not [path.name for path in (broken / "run").rglob("*.tmp")], "left behind"
    assert json.loads((broken / "run" / "summary.json").read_text())["steps"] == killed.JOB["ppo"]["steps"]
    print(f"{len(KILLS)} kills, {time.monotonic() - begun:.0f} s")
