"""The quickstart from end to end, with the shared world and few steps of PPO: every stage, table, files, curve."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.proofs
@pytest.mark.timeout(900)
def test_the_quickstart_runs_every_stage_and_shows_what_changed(tiny_world, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "reviews").symlink_to(tiny_world("reviews"), target_is_directory=True)
    command = [sys.executable, str(ROOT / "scripts/quickstart.py"), "--out", str(tmp_path), "--steps", "4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ ")] == [
        f"scripts/{name}.py" for name in ("make_tiny", "train_sft", "train_reward", "train_ppo")
    ]
    for text in ("mean reward", "share of kind words", "KL per response", "before\n", "after\n"):
        assert text in done.stdout
    # What the README shows is this print, with other numbers: table and reviews alike.
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("```\n")
    shown = next(block for block in readme if block.startswith(" " * 32 + "before")).splitlines()
    printed = done.stdout.splitlines()
    printed = printed[printed.index(shown[0]) :][: len(shown)]

    def shape(lines):
        return [re.sub(r"\d", "0", line) if i < 4 else line.split(" : ")[0] for i, line in enumerate(lines)]

    assert shape(printed) == shape(shown)
    run = tmp_path / "ppo"
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl", "summary.json", "model/config.json", "curves.png"):
        assert (run / name).stat().st_size > 0, name
    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["reward_before"] < 0.35 < summary["reward_after"] <= 1
    assert summary["steps"] == 4 and summary["gap_max"] < 1e-3
